"""Studies: which cases a grid has, and what is wrong with one that cannot be read."""

from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from study_cases import LINK, content, save, small_trace, study

from tidesim.errors import InputError
from tidesim.study import KEYS, Study
from tidesim.study.reading import DEFAULTS, REQUIRED
from tidesim.trace import Trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_trace(tmp_path_factory.mktemp("study") / "t.h5")


def problems(trace: Path, **changes) -> list[str]:
    """What is said about a study with these changes."""
    with pytest.raises(InputError) as refused:
        study(trace, **changes)
    return str(refused.value).splitlines()


# --- the grid ---


def test_policies_that_never_refresh_are_run_once(trace: Path) -> None:
    cases = study(trace).cases
    told = [(case.policy, case.budget, case.refresh_interval) for case in cases]
    budgets = (2, None, 17)
    assert told == [("static", budget, None) for budget in budgets] + [
        ("tide", budget, interval) for budget in budgets for interval in (1, 2, 3)
    ]


@given(
    budgets=st.lists(st.integers(0, 20) | st.just("largest"), min_size=1, max_size=6),
    intervals=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    policies=st.lists(st.sampled_from(["lru", "tide", "static", "rlx"]), min_size=1, max_size=5),
    bits=st.lists(st.sampled_from([16, 8, 4]), min_size=1, max_size=4),
    factors=st.lists(st.sampled_from(["x0.5", "x1", "x2", 12.5]), min_size=1, max_size=4),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_grid_has_every_combination_once(trace: Path, budgets, intervals, policies, bits, factors) -> None:
    machines = ["rtx4090", {"profile": "rtx4090", "figures": {LINK: factors}}]
    axes = {"budgets": budgets, "intervals": intervals, "policies": policies, "weight_bits": bits, "machines": machines}
    found = study(trace, **axes)
    kinds = {policy: len(set(intervals)) if policy in ("tide", "rlx") else 1 for policy in policies}
    # The profile as it is, and with its own figure, are one machine.
    others = (len(set(bits)), len({"x1", *factors}), len(set(budgets)))
    assert len(found.cases) == prod(others) * sum(kinds.values())
    assert len({case.key for case in found.cases}) == len(found.cases)
    assert len({found.cases.index(case) for case in found.cases}) == len(found.cases)


def test_a_key_changes_with_every_setting_and_with_nothing_else(trace: Path, tmp_path: Path) -> None:
    case = study(trace).cases[-1]
    assert case.key == study(trace, budgets=[1, 17]).cases[-1].key
    rules = case.rules
    other = small_trace(tmp_path / "other.h5", num_sequences=5)
    changed = [
        study(other).cases[-1],
        replace(case, model=case.model.with_weight_bits(8)),
        replace(case, policy="rlx"),
        replace(case, params=(("margin", 1.0),)),
        replace(case, budget=3),
        replace(case, refresh_interval=7),
        replace(case, batch_size=2),
        *(replace(case, rules=replace(rules, **change)) for change in ({"seed": 1}, {"is_memory_checked": False})),
        *(
            study(trace, machines=machines).cases[-1]
            for machines in (["l4"], [{"profile": "rtx4090", "figures": {LINK: [9]}}])
        ),
        study(trace, executions=["tide-as-coded"]).cases[-1],
    ]
    assert len({case.key, *(one.key for one in changed)}) == len(changed) + 1


def test_figures_are_given_in_their_unit_or_relative_to_the_profile(trace: Path) -> None:
    figures = {LINK: ["x0.5", "x1", 50], "host.cores": [8]}
    found = study(trace, machines=[{"profile": "rtx4090", "figures": figures}], policies=["lru"], budgets=[2])
    own = {path: found.cases[0].machine.hardware.sources[path].value for path in figures}
    assert [case.machine.hardware.sources[LINK].value for case in found.cases][1:] == [23.9, 50]
    assert found.cases[0].machine.hardware.sources[LINK].value == 0.5 * 23.9
    assert own["host.cores"] == 8
    assert [case.machine.label for case in found.cases] == [
        f"rtx4090, {LINK}=11.95, host.cores=8",
        "rtx4090, host.cores=8",
        f"rtx4090, {LINK}=50, host.cores=8",
    ]
    assert found.figures == (LINK, "host.cores")


def test_what_is_run_was_not_known_before(trace: Path) -> None:
    (case, *_) = study(trace, held_out_share=0.5).cases
    run, known = set(case.trace.sequences), set(case.trace.corpus)
    assert (len(run), run | known, run & known) == (2, {0, 1, 2, 3}, set())
    (case, *_) = study(trace, held_out_share=0).cases
    assert case.trace.sequences == case.trace.corpus == (0, 1, 2, 3)


def test_the_seed_of_the_command_goes_before_that_of_the_study(trace: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "s.yaml", **content(trace, seed=4))
    assert Study.read(file).cases[0].rules.seed == 4
    assert Study.read(file, seed=9).cases[0].rules.seed == 9


def test_every_key_is_described_and_has_a_default_or_must_be_there(trace: Path) -> None:
    said = {"models", "held_out_share", "seed", "reserve_gib", "ignore_memory"}
    assert set(KEYS) == {*REQUIRED, *DEFAULTS, *said}
    (case,) = Study.from_content({"traces": [str(trace)], "machines": ["l4"], "policies": ["lru"]}).cases
    assert (case.budget, case.execution.name, case.batch_size, case.model.weight_bits) == (None, "overlapped", 1, 16)
    with Trace.open(trace) as opened:
        assert case.model == opened.config


# --- what is wrong ---


def test_every_problem_is_named_at_once_with_its_path(trace: Path) -> None:
    said = problems(
        trace,
        budget=[1],
        budgets=[2, "all", -1, True, 1.5],
        intervals=[],
        policies=["tied", {"name": "decayed", "keep": "much"}, {"keep": 1}],
        machines=[
            "rtx4091",
            {"profile": "rtx4090", "figures": {"links.h2d_pinned.bandwith_gb_s": [3], LINK: [0, "2x"]}},
        ],
        executions=["overlaped"],
        models=["llada3"],
        seed=-1,
        held_out_share=1,
    )
    paths = [problem.rsplit(" @ ", 1)[1] for problem in said]
    assert paths == [
        "$.budget",
        "$.held_out_share",
        "$.seed",
        "$.machines[0]",
        "$.machines[1].figures.links.h2d_pinned.bandwith_gb_s",
        f"$.machines[1].figures.{LINK}[0]",
        f"$.machines[1].figures.{LINK}[1]",
        "$.policies[0]",
        "$.policies[1].keep",
        "$.policies[2].name",
        "$.models[0]",
        "$.executions[0]",
        *(f"$.budgets[{index}]" for index in (1, 2, 3, 4)),
        "$.intervals",
    ]
    text = "\n".join(said)
    for near in ("'budgets'", "rtx4090", f"'{LINK}'", "'tide'", "'overlapped'"):
        assert f"did you mean {near}" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"traces": None}, "required key missing: routing traces: paths, or names of shipped ones @ $.traces"),
        ({"traces": ["no.h5"]}, "no trace 'no.h5'"),
        ({"machines": {"profile": "rtx4090"}}, "must be a list (profiles"),
        (
            {"machines": [{"figures": {}}]},
            "required key missing: the profile, a path or a shipped name @ $.machines[0]",
        ),
        ({"machines": [{"profile": "rtx4090", "figure": {}}]}, "unknown key 'figure'; did you mean 'figures'?"),
        ({"machines": [{"profile": "rtx4090", "figures": [LINK]}]}, "must be a mapping {dotted path: [values]}"),
        ({"machines": [{"profile": "dgx-spark", "figures": {LINK: [1]}}]}, f"dgx-spark has no figure '{LINK}'"),
        (
            {"machines": [{"profile": "rtx4090", "figures": {"host.cores": ["x0.33"]}}]},
            "must be a whole number (cores)",
        ),
        (
            {"machines": [{"profile": "rtx4090", "figures": {LINK: [float("nan")]}}]},
            "must be a number, or text such as",
        ),
        ({"machines": [{"profile": "rtx4090", "figures": {LINK: [10**400]}}]}, "not a huge number"),
        ({"policies": [{"name": "gain", "corpus": "t.h5"}]}, "is learnt from the sequences that are not run"),
        ({"policies": [{"name": "tide", "refresh_interval": 4}]}, "stands under intervals"),
        ({"policies": [{"name": "lru", "keep": 0.9}]}, "policy 'lru' takes no parameter 'keep'; it takes none."),
        ({"policies": [{"name": "fiddler", "mode": "published "}]}, "must be coded or published, not the text"),
        ({"policies": [{"name": "fiddler", "cpu_offload": 1}]}, "must be true or false, not 1"),
        ({"policies": [{"name": "decayed", "keep": float("inf")}]}, "must be a number, not inf"),
        ({"policies": [{"name": "pre-gated", "predictor": "magic"}]}, "must be one of previous, oracle, look-ahead"),
        ({"policies": [{"name": "pre-gated", "predictor": ["oracle"]}]}, "must be one of previous, oracle, look-ahead"),
        ({"weight_bits": [16.0]}, "must be 16, 8 or 4, not 16.0"),
        ({"batch_sizes": [0]}, "must be a whole number from 1 to 2147483647, not 0 @ $.batch_sizes[0]"),
        ({"reserve_gib": "1.5"}, "must be a number of GiB >= 0, not the text '1.5'"),
        ({"ignore_memory": "no"}, "must be true or false, not the text 'no'"),
        ({"intervals": [0]}, "must be a whole number from 1 to 2147483647, not 0"),
        ({"budgets": [*range(2000)], "intervals": [*range(1, 2000)]}, "at most 1000000 are run, so split it @ $"),
        (
            {"machines": [{"profile": "rtx4090", "figures": {LINK: [*range(1, 300)], "host.cores": [*range(1, 300)]}}]},
            "makes 89401 machines; at most 10000 are allowed, so split it @ $.machines[0]",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_rule(trace: Path, changes, said: str) -> None:
    told = problems(trace, **changes)
    assert any(said in problem for problem in told), told
    assert len(told) == 1


def test_one_sequence_cannot_be_split(tmp_path: Path) -> None:
    (said,) = problems(small_trace(tmp_path / "one.h5", num_sequences=1))
    assert "give a held-out share of 0" in said
    assert said.endswith("@ $.traces[0]")


def test_two_machines_of_one_name_are_refused(trace: Path, tmp_path: Path) -> None:
    case = study(trace).cases[0]
    changed = tmp_path / "mine.yaml"
    case.machine.hardware.replace_figure(LINK, 3).to_yaml(changed)
    (said,) = problems(trace, machines=["rtx4090", str(changed)])
    assert "are different machines called 'rtx4090'" in said
    assert len(study(trace, machines=["rtx4090", "rtx4090.yaml"]).cases) == 24


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnopq"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a mapping with the keys of a study, not nothing"),
        ("- a\n- b\n", "must be a mapping with the keys of a study, not a list"),
        ("traces: [a", "is not valid YAML (line"),
        ("traces: !!python/object/apply:os.system [echo]\n", "is not valid YAML"),
        ("traces: &t [*t]\n", "must be text and not empty, not a list @ $.traces[0]"),
        ("budgets: [1]\nbudgets: [2]\n", "key 'budgets' stands twice, again on line 2"),
        ("? [1, 2]\n: 3\n", "is not valid YAML"),
        ("1: 2\n~: 3\n", "unknown key 'nothing'"),
        (f"? 0x{'f' * 9000}\n: 1\n", "unknown key 'a huge number'"),
        (f"seed: 0x{'f' * 9000}\n", "must be a whole number from 0 to 2147483647, not a huge number"),
        (f"{'k' * 500}: 1\n", f"unknown key '{'k' * 60}...'"),
        (BOMB + "traces: *q\n", "must be text and not empty, not a list @ $.traces[2]"),
        ("policies: [on, 2020-01-01, ~]\n", "must be text and not empty, not 2020-01-01 @ $.policies[1]"),
        ("\x00", "is not valid YAML"),
    ],
)
def test_hostile_files_are_refused_in_words(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as refused:
        Study.read(file)
    assert said in str(refused.value)
    assert len(str(refused.value)) < 9000


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Study.read(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match="is not valid YAML"):
        Study.read(tmp_path / "binary.yaml")
