"""Measured curves, and who slows whom: what they say, and what is refused."""

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profile_cases import (
    NAMES,
    calibrated_content,
    contention,
    curve,
    problems,
    put,
    shipped_content,
)

from tidesim.errors import ProfileError
from tidesim.hardware import KINDS, Curve, CurveFigure, Hardware, load_hardware


def test_an_experts_time_is_interpolated_between_points_and_its_rate_held_above_them() -> None:
    # 24 operations a row: 200 ns for one row, 200 for two, 300 for four.
    made = Curve((1, 2, 4), (0.12e9, 0.24e9, 0.32e9))
    seconds = made.product_s(np.array([[0, 1, 2], [3, 4, 8]]), params=12)
    assert (seconds * 1e9).tolist() == [[0, *map(pytest.approx, (200, 200))], [*map(pytest.approx, (250, 300, 600))]]
    one = Curve((1,), (0.12e9,))
    assert one.product_s(np.array([0, 1, 5]), 12) * 1e9 == pytest.approx([0, 200, 1000])


@given(
    st.lists(st.integers(2, 10**6), unique=True, max_size=6).map(sorted),
    st.data(),
)
def test_a_curve_goes_through_its_points_and_stays_between_them(rows: list[int], data: st.DataObject) -> None:
    rows = [1, *rows]
    rates = data.draw(st.lists(st.floats(1e7, 1e15), min_size=len(rows), max_size=len(rows)))
    made = Curve(tuple(rows), tuple(rates))
    at_points = made.product_s(np.array(rows), 3 * 2048 * 512)
    expected = [2 * row * 3 * 2048 * 512 / rate for row, rate in zip(rows, rates, strict=True)]
    assert at_points == pytest.approx(expected, rel=1e-9)
    for index, (low, high) in enumerate(pairwise(rows)):
        (between,) = made.product_s(np.array([(low + high) // 2]), 3 * 2048 * 512)
        ends = sorted(expected[index : index + 2])
        assert ends[0] * (1 - 1e-9) <= between <= ends[1] * (1 + 1e-9)


def test_curves_and_contention_are_read_in_si_units() -> None:
    made = Hardware.from_content(calibrated_content(), "mine.yaml")
    assert made.device.expert_curve == Curve((1, 2, 4), (0.12e9, 0.24e9, 0.32e9))
    assert made.host.expert_curve == Curve((1,), (7e9,))
    assert made.curves["host.expert_curve"] == CurveFigure((1,), (7,), "guess", "timed here")
    assert made.contention is not None
    assert made.contention.host_beside_device == 0.5
    assert made.contention.share("copies", beside="device") == made.contention.copies_beside_device == 0.75
    assert made.sources["contention.copies_beside_device"].source == "timed here"


def test_profiles_have_curves_and_contention_only_where_they_say_so() -> None:
    for name in NAMES:
        plain = load_hardware(name)
        assert (plain.device.expert_curve, plain.host.expert_curve, plain.contention) == (None, None, None)
        assert (plain.curves, {"contention"} & set(plain.content())) == ({}, set())


@pytest.mark.parametrize("name", ["rtx4090", "dgx-spark"])
def test_curves_and_contention_survive_the_round_trip(name: str, tmp_path: Path) -> None:
    content = put(put(shipped_content(name), "contention", contention()), "device.expert_curve", curve())
    made = Hardware.from_content(content, "mine.yaml")
    made.to_yaml(tmp_path / "mine.yaml")
    again = load_hardware(str(tmp_path / "mine.yaml"))
    assert again == made
    assert again.fingerprint == made.fingerprint
    assert again.content() == made.content()
    assert pickle.loads(pickle.dumps(made)) == made
    assert len({made, again}) == 1


# Plans carry the fingerprint of the profile that they were made for.
FINGERPRINTS = {
    "rtx4090": "4ec18cdfa9f3d953ace7c329080ec7ee17f9bce860680847ffce749222a1d8b0",
    "dgx-spark": "75a863917532e303c6d7db51c4cb727615a627c81f112e842bb8ae64854d21b2",
}


def test_the_fingerprints_of_profiles_without_curves_and_contention_are_what_they_always_were() -> None:
    assert {name: load_hardware(name).fingerprint for name in FINGERPRINTS} == FINGERPRINTS


def test_each_point_of_a_curve_and_each_share_is_part_of_the_fingerprint() -> None:
    content = calibrated_content()
    made = Hardware.from_content(content, "mine.yaml")
    changed = [
        put(content, "device.expert_curve", curve((1, 2, 5))),
        put(content, "device.expert_curve", curve(gflops=(0.12, 0.24, 0.33))),
        put(content, "host.expert_curve", curve()),
        put(content, "contention.host_beside_copies.value", 0.99),
        {name: node for name, node in content.items() if name != "contention"},
    ]
    prints = {Hardware.from_content(one, "mine.yaml").fingerprint for one in (content, *changed)}
    assert len(prints) == 1 + len(changed)
    reworded = put(content, "device.expert_curve", curve(gflops=(0.12, 0.24, 0.32), source="elsewhere", kind="guess"))
    assert Hardware.from_content(reworded, "mine.yaml").fingerprint == made.fingerprint


def test_a_share_may_be_replaced_and_a_curve_stays() -> None:
    made = Hardware.from_content(calibrated_content(), "mine.yaml")
    changed = made.replace_figure("contention.device_beside_host", 0.25)
    assert changed.contention is not None
    assert changed.contention.device_beside_host == 0.25
    assert changed.curves == made.curves
    with pytest.raises(ProfileError, match=r"there is no figure 'device.expert_curve'"):
        made.replace_figure("device.expert_curve", 5)


BAD_CURVES = [
    (curve(rows=(1, 2)), "must be one rate for each of the 2 rows, not 3", "gflops"),
    (curve(rows=(2, 4, 8)), "must be 1, as experts with one row are the most frequent, not 2", "rows[0]"),
    (curve(rows=(1, 4, 4)), "must be more than the 4 before it, not 4", "rows[2]"),
    (curve(rows=(1, 4, 2)), "must be more than the 4 before it, not 2", "rows[2]"),
    (curve(rows=(1, 2.5, 4)), "must be a whole number (rows), not 2.5", "rows[1]"),
    (curve(rows=(1, True, 4)), "must be a number (rows), not true", "rows[1]"),
    (curve(rows=(1, [2], 4)), "must be a number (rows), not a list", "rows[1]"),
    (curve(rows=(1, 2, 1 << 70_000)), "must be from 1 to 1000000 (rows), not a huge number", "rows[2]"),
    (curve(rows=(0, 2, 4)), "must be from 1 to 1000000 (rows), not 0", "rows[0]"),
    (curve(rows=[]), "must be a list of whole numbers of rows, ascending from 1, not an empty one", "rows"),
    (curve(rows=4), "must be a list of whole numbers of rows, ascending from 1, not 4", "rows"),
    (curve(rows={1: 2}), "must be a list of whole numbers of rows, ascending from 1, not a mapping", "rows"),
    (curve(rows="1, 2, 4"), "must be a list of whole numbers of rows, ascending from 1, not the text", "rows"),
    (curve(gflops=None), "must be a list of rates at these rows (GFLOP/s), not nothing", "gflops"),
    (curve(gflops=(1, 2, 0)), "must be from 0.01 to 10000000 (GFLOP/s), not 0", "gflops[2]"),
    (curve(gflops=(1, -2, 3)), "must be from 0.01 to 10000000 (GFLOP/s), not -2", "gflops[1]"),
    (curve(gflops=(1, 2, 1e13)), "must be from 0.01 to 10000000 (GFLOP/s), not 10000000000000.0", "gflops[2]"),
    (curve(gflops=(1, 2, float("nan"))), "must be from 0.01 to 10000000 (GFLOP/s), not nan", "gflops[2]"),
    (curve(gflops=(1, "2", 3)), "must be a number (GFLOP/s), not the text '2'", "gflops[1]"),
    (curve(kind="measurd"), f"must be one of {', '.join(KINDS)}, not the text 'measurd'", "kind"),
    (curve(source=""), "must be text and not empty, not the text ''", "source"),
    (curve(unit="TFLOP/s"), "unknown key 'unit'; known are rows, gflops, kind, source.", "unit"),
    ({**curve(), "rows": [1], "rate": [1]}, "unknown key 'rate'", "rate"),
]


@pytest.mark.parametrize(
    ("node", "rule", "where"), BAD_CURVES, ids=[f"{bad[2]}-{i}" for i, bad in enumerate(BAD_CURVES)]
)
@pytest.mark.parametrize("part", ["device", "host"])
def test_a_bad_curve_names_rule_and_path(node: object, rule: str, where: str, part: str) -> None:
    if part == "host":
        rule = rule.replace("10000000 (G", "1000000 (G")
    (problem,) = problems(put(shipped_content(), f"{part}.expert_curve", node))
    assert problem.startswith(f"mine.yaml: {rule}")
    assert problem.endswith(f" @ $.{part}.expert_curve.{where}")


@pytest.mark.parametrize("node", [None, 7, "fast", [1, 2], False])
def test_a_curve_that_is_no_mapping_is_one_clear_error(node: object) -> None:
    (problem,) = problems(put(shipped_content(), "host.expert_curve", node))
    assert problem.startswith("mine.yaml: must be written {rows: [...], gflops: [...], kind: ..., source: ...}, not ")
    assert problem.endswith(" @ $.host.expert_curve")


def test_all_that_is_wrong_with_a_curve_is_reported_at_once() -> None:
    node = {"rows": [1, "x", -3], "gflops": [0], "kind": "felt"}
    paths = [problem.rsplit(" @ ", 1)[1] for problem in problems(put(shipped_content(), "device.expert_curve", node))]
    assert paths == [
        f"$.device.expert_curve.{where}" for where in ("source", "rows[1]", "rows[2]", "gflops[0]", "kind")
    ]


def test_numpy_curves_can_be_written(tmp_path: Path) -> None:
    node = curve(rows=[*np.array([1, 2, 4])], gflops=[*np.array([0.12, 0.24, 0.32], np.float32)])
    made = Hardware.from_content(put(shipped_content(), "device.expert_curve", node), "mine.yaml")
    made.to_yaml(tmp_path / "mine.yaml")
    assert load_hardware(str(tmp_path / "mine.yaml")) == made


def test_contention_is_there_as_a_whole_or_not_at_all() -> None:
    section = contention()
    del section["device_beside_host"], section["copies_beside_host"]
    paths = [problem.rsplit(" @ ", 1)[1] for problem in problems(put(shipped_content(), "contention", section))]
    assert paths == ["$.contention.device_beside_host", "$.contention.copies_beside_host"]
    for node in (None, [], 0.8, "none"):
        (problem,) = problems(put(shipped_content(), "contention", node))
        assert problem.startswith("mine.yaml: must be a section with host_beside_device, device_beside_host")
        assert problem.endswith(" @ $.contention")
    assert len(problems(put(shipped_content(), "contention", {}))) == 6


@pytest.mark.parametrize("value", [0, 0.04, 1.01, -0.5, float("nan"), "0.8", True, None, 80])
def test_a_share_is_from_a_twentieth_to_one(value: object) -> None:
    section = contention(host_beside_copies={"value": value, "kind": "calibrated", "source": "timed here"})
    (problem,) = problems(put(shipped_content(), "contention", section))
    assert problem.endswith(" @ $.contention.host_beside_copies.value")


def test_a_misspelt_section_is_unknown_with_the_nearest() -> None:
    (problem,) = problems(put(shipped_content(), "contentions", contention()))
    assert problem == "mine.yaml: unknown key 'contentions'; did you mean contention? @ $.contentions"
