"""Profiles that describe no machine, and files that hold none: every problem is named, with its place."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profile_cases import leaves, problems, put, shipped_content, write

from tidesim.errors import ProfileError
from tidesim.hardware import FIGURE_KEYS, KINDS, load_hardware
from tidesim.shipped import shipped_folder

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
