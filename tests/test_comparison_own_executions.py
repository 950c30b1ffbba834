"""Systems compared as a whole: each policy under the execution of the system that it belongs to."""

import json
from dataclasses import replace

import numpy as np
import pytest
from test_cli import Run, base, run
from toy import TOY, toy_execution, toy_hardware, toy_workload

from tidesim.ceiling import time_ceiling
from tidesim.comparison import OWN_EXECUTIONS, Comparison, compare
from tidesim.execution import EXECUTIONS, Costs, device_memory, execution
from tidesim.policies import POLICIES, policy
from tidesim.simulator import simulate
from tidesim.workload import Workload

__all__ = ["base", "run"]  # fixtures

NAMES = ["fiddler", "lru", "mixtral-offloading", "tide-as-coded"]
BUDGET = 4


def routed(context: str) -> Workload:
    """Two forwards of six rows each in one layer."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((2, 1, 6, 8)), axis=-1)[..., :2]
    counts = (ids.reshape(2, 1, -1, 1) == np.arange(8)).sum(axis=2)
    return toy_workload(*counts, context=context)


def compared(**changes: object) -> Comparison:
    plain = {"model": TOY, "hardware": toy_hardware(), "execution": toy_execution(), "budget": BUDGET, "names": NAMES}
    settings = {"workers": 1, "intervals": (1,), "is_memory_checked": False}
    return compare(routed("block"), routed("block"), **{**plain, **settings, **changes})


BY_CONTEXT = {context: (routed(context), routed(context)) for context in ("block", "full")}


def test_own_executions_are_of_known_policies_and_presets() -> None:
    assert set(OWN_EXECUTIONS) <= set(POLICIES)
    assert set(OWN_EXECUTIONS.values()) <= set(EXECUTIONS)


def test_all_share_one_execution_by_default() -> None:
    comparison = compared()
    assert {row.result.execution for row in comparison.rows} == {"plain"}
    assert not comparison.has_own_executions
    assert not any("own executions" in warning for warning in comparison.warnings)


def test_each_system_runs_as_it_does_and_ours_as_asked() -> None:
    comparison = compared(by_context=BY_CONTEXT)
    how = {row.name: (row.result.execution, row.result.context) for row in comparison.rows}
    assert how == {
        "static in hindsight": ("plain", "block"),
        "lru": ("plain", "block"),
        "fiddler": ("fiddler", "block"),
        "mixtral-offloading": ("mixtral-offloading", "block"),
        "tide-as-coded, tau=1": ("tide-as-coded", "full"),
    }
    document = comparison.to_dict()
    assert (document["execution"], document["context"], document["has_own_executions"]) == ("plain", "block", True)
    assert "own executions" in comparison.warnings[0]


def test_a_row_is_the_run_under_its_execution_and_its_ceiling_too() -> None:
    comparison = compared(by_context=BY_CONTEXT)
    row = next(row for row in comparison.rows if row.name == "mixtral-offloading")
    how = execution("mixtral-offloading")
    alone = simulate(
        routed("block"),
        TOY,
        toy_hardware(),
        policy("mixtral-offloading"),
        budget=BUDGET,
        execution=how,
        seed=0,
        is_memory_checked=False,
    )
    assert row.result == alone
    costs = Costs(TOY, toy_hardware(), how, 6)
    assert row.ceiling == time_ceiling(routed("block"), costs, BUDGET)
    assert comparison.ceiling == compared().ceiling
    assert all(row.ceiling_share <= 1 for row in comparison.rows)


def test_who_does_not_fit_under_its_own_execution_is_left_out() -> None:
    # Logits of all rows take more than those of a block, so that what just does for one is too little for the other.
    wordy, machine = replace(TOY, vocab_size=3000), toy_hardware()
    need = device_memory(wordy, machine, toy_execution(), BUDGET, routed("block").max_tokens, reserve_bytes=0)
    full = replace(machine, device=replace(machine.device, memory_bytes=need.total))
    settings = {"is_memory_checked": True, "reserve_bytes": 0, "by_context": BY_CONTEXT}
    comparison = compared(model=wordy, hardware=full, **settings)
    assert set(comparison.left_out) == {"fiddler", "mixtral-offloading", "tide-as-coded, tau=1"}
    assert all("GiB" in reason for reason in comparison.left_out.values())
    assert {row.name for row in comparison.rows} == {"lru", "static in hindsight"}


def test_the_command_shows_each_execution(run: Run, base: tuple[str, ...]) -> None:
    words = ("compare", *base[1:], "--policy", "tide-as-coded", "--policy", "lru", "--workers", 1, "--own-executions")
    code, out, _ = run(*words, "--json", "--held-out-share", 0.5)
    assert code == 0
    document = json.loads(out)
    assert document["has_own_executions"]
    assert {row["execution"] for row in document["rows"]} == {"overlapped", "tide-as-coded"}
    code, out, _ = run(*words)
    assert code == 0
    assert "own executions" in " ".join(out.split())


@pytest.mark.parametrize("name", sorted(set(EXECUTIONS) - {"overlapped", "engine", "emulated", "disk"}))
def test_the_engine_says_what_of_another_systems_execution_it_cannot_follow(name: str) -> None:
    pytest.importorskip("torch")
    from tidesim.engine.offload import check_execution
    from tidesim.errors import InputError

    if name in ("ktransformers", "freetoken"):
        check_execution(execution(name))  # blocking copies are all that they differ in
        return
    with pytest.raises(InputError, match=f"the engine cannot run execution '{name}', which has .*plan for one"):
        check_execution(execution(name))
