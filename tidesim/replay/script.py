"""What a policy decides on a workload, written down move by move: to be timed on any machine, as often as one likes.

A policy never looks at a clock, so its moves are the same on every machine whose predicted times it is told, or, if it
goes by the routing alone, on every machine at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.policies import Policy, Shape, forwards_of
from tidesim.policies.interface import AHEAD, DROP, KEEP, NOBODY, REFRESH, Mask
from tidesim.policies.rules import Rule
from tidesim.replay.bits import num_bits
from tidesim.replay.routing import parts_of
from tidesim.residency import Moves, Placement, Residency, Swap
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

    def cut(self, forwards: slice, num_layers: int) -> "Script":
        """The moves of some forwards, if it has any."""
        return self._replace(first=self.first[forwards.start * num_layers : forwards.stop * num_layers + 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """All that is decided in a run: who is resident at first, and then a script, or a rule that is followed.

    Parameters
    ----------
    budgets : slots of each layer. scratch : experts that fit into scratch memory.
    """

    placement: Placement
    budgets: tuple[int, ...]
    scratch: int
    rule: Rule | None
    script: Script


NO_SCRIPT = Script(np.zeros(1, np.int64), np.empty(0, np.uint8), *np.empty((3, 0), np.int32))


def decide(workload: Workload, policy: Policy, shape: Shape, *, is_background: bool) -> Decisions:
    """What `policy` decides on `workload`; with background copies refreshes come last in a layer.

    Policies with a `rule` are not asked beyond their first placement, which is as they say it is. Raise ValueError if
    the policy's moves are not possible, and whatever the policy raises at the beginning of a run.
    """
    placement, scratch = policy.initial(shape), policy.scratch_experts(shape.num_experts)
    script = NO_SCRIPT
    if policy.rule is None:
        residency = Residency(shape.num_experts, shape.budgets, placement, is_pooled=policy.scope == "network")
        written = _written(workload, policy, residency.everybody.copy())
        script = written or _Writer(residency, scratch).write(workload, policy, is_background)
    return Decisions(
        placement=placement,
        budgets=shape.budgets,
        scratch=scratch,
        rule=policy.rule,
        script=script,
    )


def _written(workload: Workload, policy: Policy, is_resident: Mask) -> Script | None:
    """What a policy writes itself, if it does."""
    first, moves = [np.zeros(1, np.int64)], []
    for forwards in parts_of(workload):
        written = policy.write(workload, forwards, is_resident)
        if written is None:
            return None
        first.append(first[-1][-1] + written.first[1:])
        moves.append(written.moves)
    part, layer, *names = np.concatenate(moves).T
    home = layer * num_bits(workload.num_experts)
    enter, leave = (np.where(name == NOBODY, NOBODY, home + name).astype(np.int32) for name in names)
    return Script(np.concatenate(first), part.astype(np.uint8), layer.copy(), enter, leave)


class _Writer:
    """Asks a policy for every layer of every forward, in the order in which a simulator asks."""

    def __init__(self, residency: Residency, scratch: int) -> None:
        self._residency, self._scratch = residency, scratch
        self._rows: list[tuple[int, int, int, int]] = []

    def write(self, workload: Workload, policy: Policy, is_background: bool) -> Script:
        """The script of a run that has begun."""
        first = [0]
        for forward in forwards_of(workload):
            # Counts that are mapped from a file are narrower, and a policy may take them from each other.
            for layer, counts in enumerate(workload.counts[forward.index].astype(np.int32, copy=False)):
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
                first.append(len(self._rows))
        part, *columns = np.array(self._rows, np.int32).reshape(-1, 4).T
        return Script(np.array(first), part.astype(np.uint8), *map(np.ascontiguousarray, columns))

    def _refresh(self, layer: int, moves: Moves) -> None:
        self._write(REFRESH, layer, self._residency.apply(layer, moves))

    def _write(self, part: int, layer: int, swaps: Sequence[Swap]) -> None:
        N = num_bits(self._residency.num_experts)
        for enter, leave in swaps:
            out = NOBODY
            if leave is not None:
                home, victim = self._residency.victim(layer, leave)
                out = home * N + victim
            self._rows.append((part, layer, NOBODY if enter is None else layer * N + enter, out))
