"""What a policy decides on a workload, written down move by move: to be timed on any machine, as often as one likes.

A policy never looks at a clock, so its moves are the same on every machine whose predicted times it is told, or, if it
goes by the routing alone, on every machine at all.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.policies import ForwardInfo, Policy, Shape, forwards_of
from tidesim.policies.interface import AHEAD, DROP, KEEP, NOBODY, REFRESH, Counts, Mask, Written
from tidesim.policies.rules import Rule
from tidesim.replay.bits import num_bits
from tidesim.residency import Moves, Placement, Residency, Swap
from tidesim.windows import forget
from tidesim.workload import Workload

__all__ = ["AHEAD", "DROP", "KEEP", "NOBODY", "NO_SCRIPT", "REFRESH", "Decisions", "Script", "decide"]


class Script(NamedTuple):
    """Moves as compiled code reads them; experts are named as in `clock`, and -1 is nobody.

    Parameters
    ----------
    first : int64 [F * L + 1], where the moves of each layer of each forward begin.
    part : uint8, `REFRESH`, `KEEP`, `DROP` or `AHEAD`.
    layer : int32, where who comes in belongs. enter, leave : int32, who that is, and who goes out for it.
    """

    first: npt.NDArray[np.int64]
    part: npt.NDArray[np.uint8]
    layer: npt.NDArray[np.int32]
    enter: npt.NDArray[np.int32]
    leave: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """All that is decided in a run: who is resident at first, and then a script, or a rule that is followed.

    Parameters
    ----------
    budgets : slots of each layer. scratch : experts that fit into scratch memory.
    scripts : one for each stretch of forwards, to be taken once; None where a rule is followed.
    """

    placement: Placement
    budgets: tuple[int, ...]
    scratch: int
    rule: Rule | None
    scripts: Iterable[Script] | None


NO_SCRIPT = Script(np.zeros(1, np.int64), np.empty(0, np.uint8), *np.empty((3, 0), np.int32))
# Of one layer, with no slot.
NO_DECISIONS = Decisions(placement=Placement(((),)), budgets=(0,), scratch=0, rule=None, scripts=None)


def decide(
    workload: Workload, policy: Policy, shape: Shape, stretches: Sequence[slice], *, is_background: bool
) -> Decisions:
    """What `policy` decides on `workload`; with background copies refreshes come last in a layer.

    It is asked about a stretch when its script is taken. Policies with a `rule` are not asked beyond their first
    placement, which is as they say it is. Raise ValueError if the policy's moves are not possible, and whatever the
    policy raises at the beginning of a run.
    """
    placement, scratch = policy.initial(shape), policy.scratch_experts(shape.num_experts)
    scripts = None
    if policy.rule is None:
        residency = Residency(shape.num_experts, shape.budgets, placement, is_pooled=policy.scope == "network")
        written = _written(workload, policy, stretches, residency.everybody.copy())
        scripts = written or _Writer(residency, scratch).write(workload, policy, stretches, is_background)
    return Decisions(
        placement=placement,
        budgets=shape.budgets,
        scratch=scratch,
        rule=policy.rule,
        scripts=scripts,
    )


def _written(
    workload: Workload, policy: Policy, stretches: Sequence[slice], is_resident: Mask
) -> Iterator[Script] | None:
    """What a policy writes itself, if it does."""
    first = policy.write(workload, stretches[0], is_resident)
    if first is None:
        return None
    later = (policy.write(workload, stretch, is_resident) for stretch in stretches[1:])
    return (_script_of(written, workload.num_experts) for written in chain([first], later) if written is not None)


def _script_of(written: Written, num_experts: int) -> Script:
    """The same with experts named through all layers."""
    part, layer, *names = written.moves.T
    home = layer * num_bits(num_experts)
    enter, leave = (np.where(name == NOBODY, NOBODY, home + name).astype(np.int32) for name in names)
    return Script(written.first, part.astype(np.uint8), layer.copy(), enter, leave)


class _Writer:
    """Asks a policy for every layer of every forward, in the order in which a simulator asks."""

    def __init__(self, residency: Residency, scratch: int) -> None:
        self._residency, self._scratch = residency, scratch
        self._moves = array("i")  # part, layer, enter and leave of one move after another: there may be millions

    def write(
        self, workload: Workload, policy: Policy, stretches: Sequence[slice], is_background: bool
    ) -> Iterator[Script]:
        """The scripts of a run that has begun."""
        forwards = forwards_of(workload)
        for stretch in stretches:
            self._moves, first = array("i"), [0]
            for forward in forwards[stretch]:
                # Counts that are mapped from a file are narrower, and a policy may take them from each other.
                for layer, counts in enumerate(workload.counts[forward.index].astype(np.int32, copy=False)):
                    self._ask(policy, forward, layer, counts, is_background)
                    first.append(len(self._moves) // 4)
            forget(workload.counts)
            part, *columns = np.frombuffer(self._moves, np.int32).reshape(-1, 4).T
            yield Script(np.array(first), part.astype(np.uint8), *map(np.ascontiguousarray, columns))

    def _ask(self, policy: Policy, forward: ForwardInfo, layer: int, counts: Counts, is_background: bool) -> None:
        """All that a policy decides around one layer of a forward."""
        everybody = self._residency.everybody
        policy.observe(forward, layer, counts, everybody)
        if not is_background:
            self._refresh(layer, policy.refresh(forward, layer, counts, everybody))
        missed = np.flatnonzero((counts > 0) & ~everybody[layer]).tolist()
        serving = policy.serve(forward, layer, missed, counts, everybody)
        serving.check(layer, self._scratch)
        self._write(KEEP, layer, self._residency.fetch(layer, serving.keep))
        self._write(DROP, layer, [Swap(expert, None) for expert in serving.drop])
        for there, moves in policy.ahead(forward, layer, counts, everybody):
            self._write(AHEAD, there, self._residency.apply(there, moves))
        if is_background:
            self._refresh(layer, policy.refresh(forward, layer, counts, everybody))

    def _refresh(self, layer: int, moves: Moves) -> None:
        self._write(REFRESH, layer, self._residency.apply(layer, moves))

    def _write(self, part: int, layer: int, swaps: Sequence[Swap]) -> None:
        N = num_bits(self._residency.num_experts)
        for enter, leave in swaps:
            out = NOBODY
            if leave is not None:
                home, victim = self._residency.victim(layer, leave)
                out = home * N + victim
            self._moves.extend((part, layer, NOBODY if enter is None else layer * N + enter, out))
