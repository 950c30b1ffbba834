"""One run, from its inputs to its result."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from tidesim.execution import Execution
from tidesim.hardware import Hardware
from tidesim.moe import MoEConfig
from tidesim.paper_run import PaperRun, check_counts
from tidesim.policies import Policy
from tidesim.result import Decision, Interval, RunResult
from tidesim.simulator.actors import Run
from tidesim.simulator.recording import RecordedRun, Task
from tidesim.workload import Workload


def simulate(
    workload: Workload,
    model: MoEConfig,
    hardware: Hardware,
    policy: Policy,
    *,
    budget: int | Sequence[int],
    execution: Execution,
    seed: int | None = None,
    decisions: Callable[[Decision], None] | None = None,
    timeline: list[Interval] | None = None,
    spent: npt.NDArray[np.int64] | None = None,
    tasks: list[Task] | None = None,
    reserve_bytes: int | None = None,
    is_memory_checked: bool = True,
    expected: Hardware | None = None,
) -> RunResult:
    """Run `workload` under `policy`, with the sizes of `model`, on `hardware`.

    Parameters
    ----------
    budget : expert slots on the device, one number or one per MoE layer. They are filled before the clock starts.
    seed : only for the record; nothing here is random.
    decisions : called with one `Decision` per forward and MoE layer, in order.
    timeline : an empty list, filled with what ran when, in order of their starts; see `result.Interval`.
    spent : int64 [F, L + 1], filled with the ns that each MoE layer of each forward takes, and what lies outside them.
    tasks : an empty list, filled with what ran, and with what each task waited for; see `Task`.
    reserve_bytes, is_memory_checked : see `execution.check_memory`, which is left out if the latter is False, for
        questions about machines that do not exist.
    expected : the profile that the policy decides by, if it does and takes the machine for another than `hardware`.

    Raise InputError if workload, model and execution do not fit together, BudgetError if the experts do not fit the
    machine, ValueError if the policy's moves are not possible.
    """
    check_counts(workload)
    paper = PaperRun(
        workload=workload,
        model=model,
        hardware=hardware,
        policy=policy,
        budget=budget,
        execution=execution,
        seed=seed,
        reserve_bytes=reserve_bytes,
        is_memory_checked=is_memory_checked,
        expected=expected,
    )
    what = (workload, paper.costs, policy, paper.shape, decisions, timeline, spent)
    run = Run(*what) if tasks is None else RecordedRun(*what, tasks)
    run.play()
    return paper.result(run.books.totals(paper.costs))
