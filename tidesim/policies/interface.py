"""What a policy is told and what it answers: the one interface that simulator, replay and live engine ask.

Letters: L MoE layers, E experts per layer. τ is the refresh interval.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from tidesim.execution import Costs
from tidesim.policies.rules import Rule, Steps
from tidesim.residency import NO_MOVES, Moves, Placement
from tidesim.result import Decision
from tidesim.workload import ForwardKind, Workload

Counts = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Interval = int | tuple[int, ...] | None
MissAction = Literal["host", "fetch", "split"]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a policy has to fill: `budgets[layer]` slots in each layer, out of `num_experts` experts.

    `costs` is what everything takes on the machine, as its profile predicts; None where nobody says, as in tests.
    """

    num_experts: int
    budgets: tuple[int, ...]
    costs: Costs | None = None

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.budgets)


@dataclass(frozen=True, slots=True)
class ForwardInfo:
    """Which forward it is; `index` counts all forwards of the run, `tokens` the rows that this one routes."""

    index: int
    sequence: int
    kind: ForwardKind
    block: int
    step: int
    is_first_block: bool
    tokens: int


def forwards_of(workload: Workload) -> list[ForwardInfo]:
    """Each forward of a workload as a policy is told of it."""
    columns = (
        workload.sequence,
        workload.kind,
        workload.block,
        workload.step,
        workload.is_first_block,
        workload.tokens,
    )
    return [
        ForwardInfo(index, sequence, ForwardKind(kind), block, step, is_first_block, tokens)
        for index, (sequence, kind, block, step, is_first_block, tokens) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        )
    ]


@dataclass(frozen=True, slots=True)
class Serving:
    """What becomes of a layer's missed experts. Those that are named nowhere are computed by the host.

    Parameters
    ----------
    keep : copied into slots, in this order, run on the device, and stay. `evict` names one victim, in order, for each
        copy that finds no free slot.
    drop : copied into scratch memory after those, in this order, run on the device if they have rows, and forgotten. A
        resident expert may be among them: it is copied all the same, and runs from its slot.
    """

    keep: Moves = NO_MOVES
    drop: tuple[int, ...] = ()

    def on_host(self, missed: Sequence[int]) -> list[int]:
        """Those of `missed` that the host computes, in order."""
        fetched = {*self.keep.promote, *self.drop}
        return [expert for expert in missed if expert not in fetched]

    def check(self, layer: int, scratch: int) -> None:
        """Raise ValueError if an expert is fetched twice, or dropped where there is no scratch memory."""
        if len({*self.keep.promote, *self.drop}) < len(self.keep.promote) + len(self.drop):
            raise ValueError(
                f"layer {layer}: keep(={self.keep.promote}) and drop(={self.drop}) must name an expert at most once."
            )
        if self.drop and scratch < 1:
            raise ValueError(
                f"layer {layer}: drop(={self.drop}) needs scratch memory; the policy has scratch(={scratch})."
            )


ALL_ON_HOST = Serving()


class Ahead(NamedTuple):
    """Moves in another layer than the one that is running."""

    layer: int
    moves: Moves


def decided(
    forward: ForwardInfo,
    layer: int,
    hits: int,
    misses: int,
    moved: Sequence[Moves],
    serving: Serving,
    ahead: Sequence[Ahead],
) -> Decision:
    """All that a policy decided around a layer of a forward; `moved` are the moves in that layer, in their order."""
    return Decision(
        forward=forward.index,
        layer=layer,
        promote=tuple(expert for moves in moved for expert in moves.promote),
        evict=tuple(expert for moves in moved for expert in moves.evict),
        hits=hits,
        misses=misses,
        drop=serving.drop,
        ahead=tuple((there, moves.promote, moves.evict) for there, moves in ahead),
    )


# What a move is part of. They come in this order within a layer of a forward, but that of a refresh may be last.
REFRESH, KEEP, DROP, AHEAD = range(4)
NOBODY = -1


class Written(NamedTuple):
    """All moves of some forwards.

    Parameters
    ----------
    first : int64 [F * L + 1], where the moves that are decided around each layer of each forward begin.
    moves : int32 [M, 4], what each is part of, the layer that it is in, who comes in and who goes out for it; an expert
        is named by its id in that layer, and -1 is nobody.
    """

    first: npt.NDArray[np.int64]
    moves: npt.NDArray[np.int32]


class Policy(ABC):
    """Decides who is resident, and what becomes of who is not. Derive own policies from this class.

    Attributes
    ----------
    name : what results call it.
    scope : "layer": each layer has its own slots. "network": all layers share the sum of the slots, a victim may be of
        any layer, and is named as l * E + e: expert e of layer l. Whoever is promoted or dropped is of the layer that
        the moves are for, and is named by its id in that layer.
    scratch : experts that fit into the scratch memory that `Serving.drop` goes through, and
    scratch_layers : the whole layers of experts that fit into it besides.
    is_routing_only : whether it decides by the routing alone; if not, by the profile's predicted times too, which it
        finds in `Shape.costs`. Neither kind ever looks at a clock.
    rule : the same decisions in a word, if there is one, for a compiled replay that does not ask then.
    miss_action : what becomes of misses, for the record: "host", "fetch" or "split" between the two.
    refresh_interval : denoising steps from one refresh to the next, one number or one per layer, for the record;
        None if the policy has no such thing.
    refresh_steps : the denoising steps of a block that are refreshed, where these are listed one by one; likewise.
    """

    name: str
    scope: Literal["layer", "network"] = "layer"
    scratch: int = 0
    scratch_layers: int = 0
    is_routing_only: bool = True
    rule: Rule | None = None
    miss_action: MissAction = "host"

    @property
    def refresh_interval(self) -> Interval:
        """See the class."""
        return None

    @property
    def refresh_steps(self) -> Steps | None:
        """See the class."""
        return None

    def scratch_experts(self, num_experts: int) -> int:
        """Experts that fit into scratch memory, if a layer has `num_experts`."""
        return self.scratch + self.scratch_layers * num_experts

    @abstractmethod
    def initial(self, shape: Shape) -> Placement:
        """Begin a run: forget everything learnt, and say who is resident before the first forward."""

    # Below, `counts` [E] is the tokens that each expert of `layer` got in this forward, and `is_resident` [L, E] who is
    # on the device now; neither may be changed or kept. A policy that has nothing to say there leaves it as it is.

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """The router of `layer` is done: the first that is heard of it, once in each forward."""
        return

    def refresh(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> Moves:
        """The moves of this forward in `layer`, all evictions before all promotions; called once for each."""
        return NO_MOVES

    def serve(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Serving:
        """What becomes of `missed`, the experts (ascending ids, may be none) that have rows and are not resident."""
        return ALL_ON_HOST

    def ahead(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> Sequence[Ahead]:
        """Moves in other layers, whose copies queue up behind those of this layer's misses."""
        return ()

    def write(self, workload: Workload, forwards: slice, is_resident: Mask) -> Written | None:
        """All that would be answered about the next `forwards` of `workload`, at once; None: it is to be asked.

        Who is resident, [L, E], is changed by the moves.
        """
        return None
