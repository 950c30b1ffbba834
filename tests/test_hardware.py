import copy
import pickle
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tidesim.errors import ProfileError
from tidesim.hardware import FIGURE_KEYS, KINDS, Curve, CurveFigure, Hardware, Link, load_hardware
from tidesim.shipped import shipped_folder, shipped_names

NAMES = [name.removesuffix(".yaml") for name in shipped_names("hardware_profiles")]
DISCRETE = [name for name in NAMES if name not in ("jetson-agx-orin", "dgx-spark")]

# Peaks of the data sheets: memory GB/s, dense bf16 TFLOP/s with fp32 accumulation, link GB/s one way.
PEAKS = {
    "rtx3090": (936, 71, 31.5),
    "rtx4060-laptop": (256, 28.3, 15.75),
    "rtx4090": (1008, 165.2, 31.5),
    "rtx5090": (1792, 209.5, 63),
    "rtx-pro-6000": (1792, 467.8, 63),
    "l4": (300, 121, 31.5),
    "a100-40gb": (1555, 312, 31.5),
    "a100-80gb": (2039, 312, 31.5),
    "h100-pcie": (2000, 756, 63),
    "h100-sxm": (3350, 989, 63),
    "h200": (4800, 989, 63),
}


@cache
def parsed(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((shipped_folder("hardware_profiles") / f"{name}.yaml").read_text())
    return content


def shipped_content(name: str = "rtx4090") -> dict[str, Any]:
    return copy.deepcopy(parsed(name))


def put(content: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy of `content` with the leaf at the dotted `path` set."""
    changed = copy.deepcopy(content)
    *sections, name = path.split(".")
    inner = changed
    for section in sections:
        inner = inner[section]
    inner[name] = value
    return changed


def leaves(node: dict[str, Any], path: str = "") -> Iterator[str]:
    for name, below in node.items():
        if isinstance(below, dict):
            yield from leaves(below, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def problems(content: object) -> list[str]:
    with pytest.raises(ProfileError) as caught:
        Hardware.from_content(content, "mine.yaml")
    return str(caught.value).splitlines()


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- the shipped profiles -----------------------------------------------------------------------------------------


def test_the_thirteen_machines_are_shipped() -> None:
    assert set(NAMES) == {*PEAKS, "jetson-agx-orin", "dgx-spark"}


@pytest.mark.parametrize("name", NAMES)
def test_shipped_profile_loads_under_its_own_name(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.name == name
    assert hardware == load_hardware(f"{name}.yaml")
    assert hardware == load_hardware(str(shipped_folder("hardware_profiles") / f"{name}.yaml"))
    assert hardware.is_unified == (hardware.links is None) == (name not in DISCRETE)


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_kind_and_source(name: str) -> None:
    hardware = load_hardware(name)
    expected = {key.path for key in FIGURE_KEYS if not (key.is_optional or (hardware.is_unified and key.is_copy))}
    assert set(hardware.sources) == expected
    for path, figure in hardware.sources.items():
        assert figure.kind in KINDS, path
        assert len(figure.source) > 5, path
        if figure.kind == "derived":
            assert re.search(r"\d", figure.source), f"{path} must state its arithmetic"


@pytest.mark.parametrize("name", NAMES)
def test_derived_products_in_sources_are_the_values(name: str) -> None:
    # Sources that open with a product, "0.92 x 1008 GB/s ...", must give the figure they stand with.
    for path, figure in load_hardware(name).sources.items():
        if match := re.match(r"(\d[\d.]*)(?: sockets)? x (\d[\d.]*)(?: x (\d[\d.]*))? [GTu]", figure.source):
            product = float(match[1]) * float(match[2]) * float(match[3] or 1)
            assert figure.value == pytest.approx(product, rel=0.005), path


@pytest.mark.parametrize("name", sorted(PEAKS))
def test_achievable_figures_stay_near_or_below_the_data_sheet(name: str) -> None:
    hardware = load_hardware(name)
    memory_gb_s, tflops, link_gb_s = PEAKS[name]
    assert hardware.links is not None
    assert 0.7 * memory_gb_s <= hardware.device.bytes_per_s / 1e9 <= 0.95 * memory_gb_s
    assert 0.7 * memory_gb_s <= hardware.device.experts_bytes_per_s / 1e9 <= 0.96 * memory_gb_s
    # GeForce clocks exceed the boost that their nominal peak is stated for.
    assert 0.5 * tflops <= hardware.device.flops_per_s / 1e12 <= 1.16 * tflops
    assert 0.15 * tflops <= hardware.device.grouped_flops_per_s / 1e12 <= 0.4 * tflops
    assert 0.75 * link_gb_s <= hardware.links.h2d_pinned.bytes_per_s / 1e9 <= 0.9 * link_gb_s
    assert 0.75 * link_gb_s <= hardware.links.d2h_pinned.bytes_per_s / 1e9 <= 0.91 * link_gb_s


@pytest.mark.parametrize("name", DISCRETE)
def test_pageable_copies_are_no_faster_than_pinned(name: str) -> None:
    links = load_hardware(name).links
    assert links is not None
    for num_bytes in (0, 4096, 6_291_456, 1 << 30):
        assert links.h2d_pinned.copy_s(num_bytes) <= links.h2d_pageable.copy_s(num_bytes)
        assert links.d2h_pinned.copy_s(num_bytes) <= links.d2h_pageable.copy_s(num_bytes)
        assert links.d2h_pageable.copy_s(num_bytes) <= links.d2h_fresh.copy_s(num_bytes)


@pytest.mark.parametrize("name", NAMES)
def test_device_outpaces_its_host_and_eager_ops_outlast_launches(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.host.bytes_per_s < hardware.device.bytes_per_s
    assert hardware.host.bf16_flops_per_s < hardware.device.flops_per_s
    assert hardware.device.kernel_launch_s < hardware.device.eager_op_s < hardware.host.call_overhead_s


def test_devices_rank_as_their_generations_do() -> None:
    ranking = ("rtx4060-laptop", "l4", "rtx3090", "rtx4090", "a100-40gb", "a100-80gb", "h100-pcie", "h100-sxm", "h200")
    rates = [load_hardware(name).device.bytes_per_s for name in ranking]
    assert rates[:1] + rates[2:] == sorted(rates[:1] + rates[2:])
    a100, h100 = load_hardware("a100-80gb").device, load_hardware("h100-sxm").device
    assert h100.flops_per_s > 2 * a100.flops_per_s
    assert h100.experts_bytes_per_s > a100.experts_bytes_per_s
    assert h100.gemm_overhead_s <= a100.gemm_overhead_s


def test_ice_lake_hosts_are_slower_in_bf16_than_in_fp32() -> None:
    for name in ("l4", "a100-40gb", "a100-80gb"):
        host = load_hardware(name).host
        assert 0.13 <= host.bf16_flops_per_s / host.fp32_flops_per_s <= 0.27


def test_units_are_converted_once() -> None:
    hardware = load_hardware("rtx4090")
    assert hardware.device.memory_bytes == 24 * 2**30
    assert isinstance(hardware.device.memory_bytes, int)
    assert hardware.device.bytes_per_s == 927e9
    assert hardware.device.flops_per_s == pytest.approx(167.9e12)
    assert hardware.device.eager_op_s == pytest.approx(7e-6)
    assert hardware.host.cores == 16
    assert hardware.host.bf16_flops_per_s == 2200e9
    assert hardware.nvme.latency_s == pytest.approx(100e-6)
    assert hardware.links is not None
    assert hardware.links.duplex_factor == 0.54


# --- copies ---------------------------------------------------------------------------------------------------------


def test_copy_takes_latency_plus_bytes_over_bandwidth() -> None:
    # One expert of LLaDA2.0-mini, 3 x 2048 x 512 x 2 = 6 291 456 bytes, at 25 GB/s: 251.65824 us, and 10 us before.
    link = Link(bytes_per_s=25e9, latency_s=10e-6)
    assert link.copy_s(6_291_456) == pytest.approx(261.65824e-6, rel=1e-12)
    assert link.copy_s(0) == 10e-6


def test_copy_refuses_negative_bytes() -> None:
    with pytest.raises(ValueError, match=r"num_bytes\(=-1\) must be >= 0"):
        Link(bytes_per_s=25e9, latency_s=0.0).copy_s(-1)


# --- curves and contention ------------------------------------------------------------------------------------


def curve(rows: object = (1, 2, 4), gflops: object = (0.12, 0.24, 0.32), **changes: object) -> dict[str, object]:
    lists = {"rows": [*rows] if isinstance(rows, tuple) else rows}
    lists["gflops"] = [*gflops] if isinstance(gflops, tuple) else gflops
    return {**lists, "kind": "calibrated", "source": "timed here", **changes}


def contention(**changes: object) -> dict[str, object]:
    """A section with shares 0.5, 0.55, .. 0.75 in the order of the keys."""
    names = [key.path.removeprefix("contention.") for key in FIGURE_KEYS if key.is_optional]
    figures = {
        name: {"value": 0.5 + 0.05 * index, "kind": "calibrated", "source": "timed here"}
        for index, name in enumerate(names)
    }
    return {**figures, **changes}


def calibrated_content() -> dict[str, Any]:
    content = put(shipped_content(), "contention", contention())
    return put(put(content, "device.expert_curve", curve()), "host.expert_curve", curve((1,), (7,), kind="guess"))


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


# --- what-if, round trip, identity -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_through_yaml_gives_an_equal_machine(name: str, tmp_path: Path) -> None:
    hardware = load_hardware(name)
    hardware.to_yaml(tmp_path / "again.yaml")
    again = load_hardware(str(tmp_path / "again.yaml"))
    assert again == hardware
    assert again.fingerprint == hardware.fingerprint


def test_writing_where_nothing_can_be_written_is_a_profile_error(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"absent.mine\.yaml: cannot be written"):
        load_hardware("rtx4090").to_yaml(tmp_path / "absent" / "mine.yaml")


@given(value=st.floats(min_value=0.01, max_value=2000))
def test_replaced_figure_changes_that_figure_alone(value: float) -> None:
    hardware = Hardware.from_content(parsed("rtx4090"), "rtx4090")
    changed = hardware.replace_figure("links.h2d_pinned.bandwidth_gb_s", value)
    assert changed.links is not None
    assert hardware.links is not None
    assert changed.links.h2d_pinned.bytes_per_s == value * 1e9
    assert changed.links.h2d_pinned.latency_s == hardware.links.h2d_pinned.latency_s
    assert (changed.device, changed.host, changed.nvme) == (hardware.device, hardware.host, hardware.nvme)
    assert {path for path in hardware.sources if changed.sources[path] != hardware.sources[path]} == {
        "links.h2d_pinned.bandwidth_gb_s"
    }
    assert changed.sources["links.h2d_pinned.bandwidth_gb_s"].kind == "guess"
    assert "23.9" in changed.sources["links.h2d_pinned.bandwidth_gb_s"].source


def test_replacing_an_unknown_figure_names_the_nearest() -> None:
    with pytest.raises(
        ProfileError, match=r"rtx4090: .*'links.h2d_pined.bandwidth'.*links\.h2d_pinned\.bandwidth_gb_s"
    ):
        load_hardware("rtx4090").replace_figure("links.h2d_pined.bandwidth", 50)


def test_replacing_a_link_of_a_unified_machine_is_refused() -> None:
    with pytest.raises(ProfileError, match="dgx-spark: there is no figure"):
        load_hardware("dgx-spark").replace_figure("links.h2d_pinned.bandwidth_gb_s", 50)


def test_replacing_by_an_absurd_value_is_refused() -> None:
    with pytest.raises(
        ProfileError, match=r"must be from 0\.25 to 2048 \(GiB\), not 0 @ \$\.device\.memory_gib\.value"
    ):
        load_hardware("rtx4090").replace_figure("device.memory_gib", 0)


def test_numpy_figures_can_be_written(tmp_path: Path) -> None:
    for value in (np.int64(48), np.float64(48), np.float32(48)):
        changed = Hardware.from_content(put(shipped_content(), "device.memory_gib.value", value), "mine.yaml")
        changed.to_yaml(tmp_path / "big.yaml")
        assert load_hardware(str(tmp_path / "big.yaml")) == changed
        assert changed.device.memory_bytes == 48 * 2**30


def test_fingerprint_follows_values_not_words() -> None:
    hardware, content = load_hardware("rtx4090"), shipped_content()
    reordered = dict(reversed(content.items()))
    reworded = put(put(content, "name", "mine"), "device.memory_gib.source", "counted")
    for same in (reordered, reworded, put(content, "device.memory_gib.value", 24.0)):
        assert Hardware.from_content(same, "mine.yaml").fingerprint == hardware.fingerprint
    assert hardware.replace_figure("host.cores", 17).fingerprint != hardware.fingerprint
    assert len({load_hardware(name).fingerprint for name in NAMES}) == len(NAMES)


def test_machines_can_be_sent_to_other_processes_and_kept_in_sets() -> None:
    hardware = load_hardware("l4")
    assert pickle.loads(pickle.dumps(hardware)) == hardware
    assert len({hardware, load_hardware("l4")}) == 1


# --- what is refused ------------------------------------------------------------------------------------------------


BAD_LEAVES = [
    ("device.memory_gib.value", 0, "must be from 0.25 to 2048 (GiB), not 0"),
    ("device.memory_gib.value", 100_000, "must be from 0.25 to 2048 (GiB), not 100000"),
    ("device.memory_gib.value", "24", "must be a number (GiB), not the text '24'; write it without quotes or exponent"),
    ("device.memory_gib.value", True, "must be a number (GiB), not true"),
    ("device.memory_gib.value", None, "must be a number (GiB), not nothing"),
    ("device.memory_gib.value", [24], "must be a number (GiB), not a list"),
    ("device.memory_gb_s.value", 1e6, "must be from 1 to 20000 (GB/s), not 1000000.0"),
    ("device.memory_gb_s.value", -927, "must be from 1 to 20000 (GB/s), not -927"),
    ("device.memory_gb_s.value", float("nan"), "must be from 1 to 20000 (GB/s), not nan"),
    ("device.bf16_tflops.value", float("inf"), "must be from 0.001 to 10000 (TFLOP/s), not inf"),
    ("device.bf16_tflops.value", 1 << 70_000, "must be from 0.001 to 10000 (TFLOP/s), not a huge number"),
    ("device.bf16_tflops.kind", "measurd", f"must be one of {', '.join(KINDS)}, not the text 'measurd'"),
    ("device.bf16_tflops.source", "  ", "must be text and not empty, not the text '  '"),
    ("device.bf16_tflops.source", 7, "must be text and not empty, not 7"),
    ("host.cores.value", 15.5, "must be a whole number (cores), not 15.5"),
    ("links.h2d_pinned.bandwidth_gb_s.value", 23_900, "must be from 0.01 to 2000 (GB/s), not 23900"),
    ("links.h2d_pinned.latency_us.value", -1, "must be from 0 to 100000 (us), not -1"),
    ("links.duplex_factor.value", 1.5, "must be from 0.05 to 1 (share), not 1.5"),
    ("links.nvme.bandwidth_gb_s.value", 0, "must be from 0.01 to 200 (GB/s), not 0"),
    ("unified_memory", "no", "must be true or false, not the text 'no'"),
    ("name", "", "must be text and not empty, not the text ''"),
    ("name", 4090, "must be text and not empty, not 4090"),
    ("schema", "tidesim-hardware/2", "must be 'tidesim-hardware/1', not the text 'tidesim-hardware/2'"),
    ("device.memory_gib", 24, "must be written {value: ..., kind: ..., source: ...}, not 24"),
    ("host", [], "must be a section with cores, memory_gib"),
    ("links.nvme", None, "must be a section with bandwidth_gb_s, latency_us, not nothing"),
]


@pytest.mark.parametrize(("path", "value", "rule"), BAD_LEAVES, ids=[leaf[0] for leaf in BAD_LEAVES])
def test_bad_leaf_names_file_rule_and_path(path: str, value: object, rule: str) -> None:
    (problem,) = problems(put(shipped_content(), path, value))
    assert problem.startswith(f"mine.yaml: {rule}")
    assert problem.endswith(f" @ $.{path}")


def bad_value(path: str) -> st.SearchStrategy[object]:
    never: st.SearchStrategy[object] = st.one_of(st.none(), st.lists(st.integers()), st.just({"a": 1}), st.just(b"x"))
    text = st.text(alphabet="24e.- ax{}:'\n", max_size=60)
    if path.endswith(".value"):
        key = next(key for key in FIGURE_KEYS if f"{key.path}.value" == path)
        outside = st.one_of(
            st.floats(max_value=key.low, exclude_max=True), st.floats(min_value=key.high, exclude_min=True)
        )
        return st.one_of(never, st.booleans(), text, outside, st.just(float("nan")))
    if path == "unified_memory":
        return st.one_of(never, st.integers(), text)
    if path.endswith(".kind") or path == "schema":
        return st.one_of(never, text, st.integers())
    return st.one_of(never, st.text(alphabet=" \t\n"), st.integers(), st.booleans())


@pytest.mark.parametrize("name", ["rtx4090", "dgx-spark"])
@given(data=st.data())
def test_any_one_bad_leaf_is_exactly_one_problem_that_names_it(name: str, data: st.DataObject) -> None:
    content = shipped_content(name)
    path = data.draw(st.sampled_from(sorted(leaves(content))))
    (problem,) = problems(put(content, path, data.draw(bad_value(path))))
    assert problem.startswith("mine.yaml: ")
    assert problem.endswith(f" @ $.{path}")


@pytest.mark.parametrize("path", ["name", "host", "host.cores", "links.nvme", "links.h2d_pinned.latency_us.source"])
def test_missing_key_is_named_with_what_it_means(path: str) -> None:
    content = shipped_content()
    *sections, name = path.split(".")
    inner = content
    for section in sections:
        inner = inner[section]
    del inner[name]
    (problem,) = problems(content)
    assert re.fullmatch(rf"mine\.yaml: required key missing: .+ @ \$\.{re.escape(path)}", problem)


def test_misspelt_key_is_unknown_with_the_nearest_and_the_right_one_is_missing() -> None:
    content = shipped_content()
    content["device"]["memory_gbs"] = content["device"].pop("memory_gb_s")
    unknown, missing = problems(content)
    assert unknown.startswith("mine.yaml: unknown key 'memory_gbs'; did you mean memory_gb_s")
    assert unknown.endswith(" @ $.device.memory_gbs")
    assert missing == (
        "mine.yaml: required key missing: achievable memory bandwidth, streaming large weights (GB/s)"
        " @ $.device.memory_gb_s"
    )


def test_key_like_no_other_lists_the_known_ones() -> None:
    (problem,) = problems(put(shipped_content(), "links.nvme.zzz", 1))
    assert problem == "mine.yaml: unknown key 'zzz'; known are bandwidth_gb_s, latency_us. @ $.links.nvme.zzz"


def test_all_problems_are_reported_at_once() -> None:
    content = put(put(shipped_content(), "host.cores.value", 0), "device.bf16_tflops.kind", "felt")
    del content["links"]["duplex_factor"]
    paths = {problem.rsplit(" @ ", 1)[1] for problem in problems(content)}
    assert paths == {"$.host.cores.value", "$.device.bf16_tflops.kind", "$.links.duplex_factor"}


def test_unified_memory_with_links_is_refused_link_by_link() -> None:
    found = problems(put(shipped_content(), "unified_memory", True))
    assert [problem.rsplit(" @ ", 1)[1] for problem in found] == [
        f"$.links.{name}"
        for name in ("d2h_fresh", "d2h_pageable", "d2h_pinned", "duplex_factor", "h2d_pageable", "h2d_pinned")
    ]
    assert all("with unified_memory nothing is copied" in problem for problem in found)


@pytest.mark.parametrize("content", [None, [], "text", 7])
def test_content_that_is_no_mapping_is_one_clear_error(content: object) -> None:
    (problem,) = problems(content)
    assert problem.startswith("mine.yaml: must be a mapping with the keys of a profile, not ")


# --- the file -------------------------------------------------------------------------------------------------------


def test_keys_that_stand_twice_are_refused_with_their_line(tmp_path: Path) -> None:
    text = (shipped_folder("hardware_profiles") / "rtx4090.yaml").read_text() + "name: other\n"
    text = text.replace("    value: 24\n", "    value: 24\n    value: 48\n")
    path = write(tmp_path, text)
    with pytest.raises(ProfileError) as caught:
        load_hardware(path)
    lines = str(caught.value).splitlines()
    assert lines == [
        f"{path}: key 'value' stands twice, again on line 9; keep one @ $.device.memory_gib.value",
        f"{path}: key 'name' stands twice, again on line {text.count(chr(10))}; keep one @ $.name",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "name: [",
        "\tname: x",
        "a: b: c",
        "--- 1\n--- 2\n",
        "? [1]\n: 2",
        "x: !!python/object/apply:os.system [id]",
        "x: 2001-99-99",
        "[" * 5000,
        "\x00",
    ],
)
def test_yaml_that_cannot_be_parsed_is_one_profile_error(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ProfileError, match="is not valid YAML") as caught:
        load_hardware(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_one_profile_error(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ProfileError, match="is not valid YAML"):
        load_hardware(str(tmp_path / "mine.yaml"))


def test_aliases_that_point_at_themselves_or_explode_stay_short(tmp_path: Path) -> None:
    layers = "\n".join(f"a{i}: &a{i} [{', '.join(f'*a{i - 1}' for _ in range(10))}]" for i in range(1, 12))
    path = write(tmp_path, f"loop: &loop [*loop]\na0: &a0 [x]\n{layers}\nname: *a11\n")
    with pytest.raises(ProfileError, match=r"must be text and not empty, not a list @ \$\.name") as caught:
        load_hardware(path)
    assert len(str(caught.value)) < 5000


def test_a_folder_and_an_unknown_name_are_profile_errors(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read"):
        load_hardware(str(tmp_path))
    with pytest.raises(ProfileError, match=r"no hardware profile 'rtx409'.*did you mean rtx4090"):
        load_hardware("rtx409")
