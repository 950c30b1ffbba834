"""From a case to its row: the one place where a study runs anything."""

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np

from tidesim.errors import InputError
from tidesim.execution import DeviceMemory, check_memory, device_memory, largest_budget
from tidesim.policies import Policy
from tidesim.policies.knowledge import Knowledge
from tidesim.result import RunResult
from tidesim.study.case import Case, Routing, Scalar, figure_of
from tidesim.study.columns import FIGURE, MEMORY_PARTS, Row, Status
from tidesim.timing import timed
from tidesim.trace import Trace
from tidesim.workload import Workload

Held = TypeVar("Held")

_KEPT_POLICIES = 64


class Known(NamedTuple):
    """The workload that cases run, and what their policies may know before."""

    workload: Workload
    corpus: Workload


def make_known(routing: Routing) -> Known:
    """Count who was routed to whom. Raise what `known_parts` raises."""
    return Known(**dict(known_parts(routing)))


def known_parts(routing: Routing) -> Iterator[tuple[str, Workload]]:
    """The fields of `Known`, one after another: both together may take much memory.

    Raise TraceError if the trace cannot be used, or InputError if it has changed since it was read.
    """
    with Trace.open(routing.trace.file) as opened:
        if opened.fingerprint != routing.trace.fingerprint:
            raise InputError(f"{opened.path} has changed since the study was read; start again with another --out.")
        parts = (routing.trace.sequences, routing.trace.corpus)
        for name, part in zip(Known._fields, parts, strict=True):
            yield name, _workload(opened, routing, part)


def _workload(opened: Trace, routing: Routing, sequences: Sequence[int]) -> Workload:
    counted = opened.workload(routing.context, sequences, has_lookahead=opened.has_lookahead, is_mapped=True)
    return counted.tiled(routing.num_layers).batched(routing.batch_size)


def prepared(cases: Iterable[Case], put: Callable[[Routing], Held]) -> Iterator[tuple[Case, Held | None, str]]:
    """Each case with what `put` gave for its workload, or None and the reason why there is none.

    `put` is called once for all cases that share a workload and stand beside each other, just before the first of them.
    """
    routing: Routing | None = None
    held: Held | None = None
    refusal = ""
    for case in cases:
        if case.routing != routing:
            routing, held, refusal = case.routing, None, ""
            try:
                held = put(routing)
            except InputError as error:
                refusal = str(error)
        yield case, held, refusal


def score(case: Case, known: Known, figures: Sequence[str]) -> Row:
    """Run a case; whatever goes wrong is said in its row.

    `figures` are the dotted paths that have a column of their own.
    """
    try:
        return _row(case, figures, "ok", outcome=_outcome(case, known))
    except InputError as error:
        return infeasible(case, figures, str(error))
    # One case must not end a study of thousands: its row says what happened, and the command that it did.
    except Exception as error:
        return failed(case, figures, error)


def infeasible(case: Case, figures: Sequence[str], reason: str) -> Row:
    """The row of a case whose settings do not go together."""
    return _row(case, figures, "infeasible", reason)


def failed(case: Case, figures: Sequence[str], error: Exception) -> Row:
    """The row of a case that ended in an error that nobody expects."""
    return _row(case, figures, "failed", f"{type(error).__name__}: {error}")


def _row(
    case: Case,
    figures: Sequence[str],
    status: Status,
    reason: str | None = None,
    outcome: dict[str, Scalar] | None = None,
) -> Row:
    varied = {f"{FIGURE}{path}": figure_of(case.machine, path) for path in figures}
    versions = {"python_version": platform.python_version(), "numpy_version": np.__version__}
    said: dict[str, Scalar] = {"status": status, "reason": reason}
    return {"case": case.key, **case.settings(), **varied, **versions, **said, **(outcome or {})}


def _outcome(case: Case, known: Known) -> dict[str, Scalar]:
    """Every figure of the run, and what it needs on the device."""
    policy = _policy(known, case.policy, case.params, case.refresh_interval)
    budget = _budget(case, known, policy)
    memory = _memory(case, known, policy, budget)
    result = _run(case, known, policy, budget)
    metrics = ("tok_per_s", "makespan_s", "num_forwards", "generated_tokens", "hit_rate", "hits", "misses")
    moves = ("promotions", "evictions", "drops", "num_copies", "h2d_bytes", "d2h_bytes")
    return {
        "budget": budget,
        **{name: getattr(result, name) for name in (*metrics, *moves)},
        **{f"{part}_s": part_s for part, part_s in result.breakdown_s.items()},
        **{f"{name}_busy_share": share for name, share in result.busy_share.items()},
        "device_memory_bytes": memory.total,
        **{f"memory_{part}_bytes": getattr(memory, part) for part in MEMORY_PARTS},
    }


@lru_cache(maxsize=_KEPT_POLICIES)
def _policy(known: Known, name: str, params: tuple[tuple[str, Scalar], ...], refresh_interval: int | None) -> Policy:
    """The policy; the same object for the same arguments, so that a replay asks it once for all machines."""
    own: dict[str, Scalar] = dict(params)
    if refresh_interval is not None:
        own["refresh_interval"] = refresh_interval
    return Knowledge(workload=known.workload, corpus=known.corpus).make(name, own)


def _budget(case: Case, known: Known, policy: Policy) -> int:
    """Slots of each layer: those asked for, or the most that fit beside the policy's scratch memory."""
    if case.budget is not None:
        return case.budget
    if policy.name == "all-device":
        return case.model.num_experts
    scratch = policy.scratch_experts(case.model.num_experts)
    most = (known.workload.max_tokens, case.rules.reserve_bytes, scratch, known.workload.batch_size)
    return largest_budget(case.model, case.machine.hardware, case.execution, *most)


def _memory(case: Case, known: Known, policy: Policy, budget: int) -> DeviceMemory:
    """What the case needs on the device. Raise BudgetError if it does not fit, unless the study does not ask."""
    reckon = check_memory if case.rules.is_memory_checked else device_memory
    return reckon(
        case.model,
        case.machine.hardware,
        case.execution,
        budget,
        known.workload.max_tokens,
        case.rules.reserve_bytes,
        policy.scratch_experts(case.model.num_experts),
        known.workload.batch_size,
    )


def _run(case: Case, known: Known, policy: Policy, budget: int) -> RunResult:
    return timed(
        known.workload,
        case.model,
        case.machine.hardware,
        policy,
        budget=budget,
        execution=case.execution,
        seed=case.rules.seed,
        is_memory_checked=False,
    )
