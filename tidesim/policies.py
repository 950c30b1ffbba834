"""Who should be on the device, and why: one class per policy, used by the simulator and by the live engine alike.

A policy sees how many tokens each expert got, and answers with `Moves`. It never sees a clock, so on the same routing
it makes the same moves wherever it runs. Whoever runs the network asks it in one fixed order:

1. `initial` once; it begins a run, so a policy object may be used for one run after another.
2. Forward by forward and, within a forward, layer by layer: `fetch` once if `miss_action` is "fetch", and `refresh`
   once. With blocking copies `refresh` comes before the layer's experts run, hence before `fetch`, and its moves
   count for this very forward; with background copies it comes after them, and its moves count from the next on.

Each class states its source, whether it is as published or as coded, and its tie order. Letters: L MoE layers,
E experts per layer. τ is the refresh interval.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from tidesim.errors import BudgetError, InputError, nearest_name
from tidesim.residency import NO_MOVES, Moves, Placement, per_layer
from tidesim.workload import ForwardKind

Counts = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Interval = int | tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Shape:
    """What a policy has to fill: `budgets[layer]` slots in each layer, out of `num_experts` experts."""

    num_experts: int
    budgets: tuple[int, ...]

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


class Policy(Protocol):
    """Decides who is resident. Own policies may derive from this class or just have its members.

    Attributes
    ----------
    name : what results call it.
    miss_action : what becomes of a routed expert that is not resident. "host": the host computes it. "fetch": it is
        copied to the device, runs there, and stays.
    refresh_interval : denoising steps from one refresh to the next, one number or one per layer, for the record;
        None if the policy has no such thing.
    """

    name: str
    miss_action: Literal["host", "fetch"]

    @property
    def refresh_interval(self) -> Interval:
        """See the class."""
        return None

    def initial(self, shape: Shape) -> Placement:
        """Begin a run: forget everything learnt, and say who is resident before the first forward."""
        ...

    def refresh(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> Moves:
        """The moves of this forward in `layer`; called once for each, whatever the interval.

        `counts` [E] is the tokens that each expert got in this forward, `is_resident` [E] who is on the device now;
        neither may be changed or kept. The default never moves anything.
        """
        return NO_MOVES

    def fetch(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Moves:
        """How to bring in every expert of `missed` (ascending ids, may be none); for `miss_action` "fetch" only.

        `promote` names all of `missed` in the order of their copies, `evict` one victim, in order, for each copy that
        finds no free slot. Called in every forward and layer, so that a policy can keep track of use.
        """
        raise NotImplementedError(f"policy {self.name!r} has miss_action {self.miss_action!r} and fetches nothing.")


def policy(name: str, **params: object) -> Policy:
    """The policy called `name`, made with `params`.

    Raise InputError if there is no such policy (the nearest name is given), or if it takes other parameters.

    Examples
    --------
    >>> policy("tide", refresh_interval=4).refresh_interval
    4
    """
    if name not in POLICIES:
        raise InputError(f"no policy {name!r}; {nearest_name(name, POLICIES)}")
    # A class without an __init__ of its own shows the catch-all one that typing gives a Protocol.
    signature = inspect.signature(POLICIES[name]).parameters.values()
    accepted = {param.name: param.default for param in signature if param.kind == param.POSITIONAL_OR_KEYWORD}
    for param in params:
        if param not in accepted:
            raise InputError(f"policy {name!r} takes no {param!r}; it takes {', '.join(accepted) or 'no parameter'}.")
    for param, default in accepted.items():
        if param not in params and default is inspect.Parameter.empty:
            raise InputError(f"policy {name!r} needs {param!r}; pass it to policy().")
    return POLICIES[name](**params)


# --- fixed placements ---


class AllDevice(Policy):
    """Every expert on the device: the upper reference, if it fits. Every budget must be E."""

    name = "all-device"
    miss_action = "host"

    def initial(self, shape: Shape) -> Placement:
        """All experts. Raise BudgetError if a budget is below E."""
        if min(shape.budgets) < shape.num_experts:
            raise BudgetError(
                f"policy {self.name!r} needs a budget of all {shape.num_experts} experts in every layer, "
                f"not {min(shape.budgets)}; raise the budget, or take policy 'static'."
            )
        return _first_ids(shape)


class AllHost(Policy):
    """No expert on the device, every miss on the host: the lower reference. It leaves its budget unused."""

    name = "all-host"
    miss_action = "host"

    def initial(self, shape: Shape) -> Placement:
        """No expert."""
        return Placement(((),) * shape.num_layers)


class Static(Policy):
    """The most popular experts of each layer, for good; every miss on the host.

    The "Fiddler" baseline of the TIDE paper (arXiv 2605.20179) is of this kind. It is not Fiddler's own policy, which
    ranks (layer, expert) pairs of the whole network and may copy a missed expert. Ties: the lower id first.

    Parameters
    ----------
    popularity : [L, E], how often each expert was routed to, for instance a workload's `counts.sum(axis=0)`.
    """

    name = "static"
    miss_action = "host"

    def __init__(self, popularity: npt.ArrayLike) -> None:
        self._popularity = np.asarray(popularity)

    def initial(self, shape: Shape) -> Placement:
        """The `budget` most popular experts of each layer. Raise InputError if `popularity` is not [L, E]."""
        wanted = (shape.num_layers, shape.num_experts)
        if self._popularity.shape != wanted:
            raise InputError(
                f"popularity has shape {list(self._popularity.shape)}; it must be [L, E] = {list(wanted)}."
            )
        return Placement.of(
            np.argsort(-row, kind="stable")[:budget]
            for row, budget in zip(self._popularity, shape.budgets, strict=True)
        )


# --- fetch on demand ---


class LRU(Policy):
    """Fetch every missed expert and keep it, in the place of the least recently used one of its layer.

    The policy of Mixtral-Offloading (dvmazur/mixtral-offloading, as coded): the experts of a forward are used resident
    ones first, ascending ids, and all residents in use count as used before the first copy. So a forward's own
    residents are the last victims; when a forward misses more experts than there are slots, the fetched ones follow.
    Two things differ: nothing is fetched ahead, and the first residents are ids 0..B-1 (oldest: 0), not the highest
    ids. It serves prefill and commit forwards like any other. There are no ties: uses are totally ordered.
    """

    name = "lru"
    miss_action = "fetch"

    def initial(self, shape: Shape) -> Placement:
        """Experts 0..B-1 of each layer. Raise BudgetError if a layer has no slot to fetch into."""
        if min(shape.budgets) < 1:
            raise BudgetError(f"policy {self.name!r} fetches into slots; budget(={min(shape.budgets)}) must be >= 1.")
        self._budgets = shape.budgets
        # Ordered by last use, the longest unused first.
        self._last_used = [OrderedDict.fromkeys(range(budget)) for budget in shape.budgets]
        return _first_ids(shape)

    def fetch(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Moves:
        """All of `missed`, ascending, each in the place of the least recently used expert at that moment."""
        last_used = self._last_used[layer]
        for expert in np.flatnonzero((counts > 0) & is_resident).tolist():
            last_used.move_to_end(expert)
        victims = []
        for expert in missed:
            if len(last_used) == self._budgets[layer]:
                victims.append(last_used.popitem(last=False)[0])
            last_used[expert] = None
        return Moves(tuple(missed), tuple(victims))


# --- TIDE ---


class _Periodic(Policy):
    """A policy that refreshes every τ denoising steps, counted from each block's first step; misses run on the host."""

    miss_action = "host"

    def __init__(self, refresh_interval: int | Sequence[int] = 1) -> None:
        numbers = tuple(refresh_interval) if isinstance(refresh_interval, Sequence) else (refresh_interval,)
        if not all(isinstance(number, int) and number >= 1 for number in numbers):
            raise InputError(f"refresh_interval(={refresh_interval}) must be a whole number >= 1, or one per layer.")
        self._interval = numbers if isinstance(refresh_interval, Sequence) else refresh_interval

    @property
    def refresh_interval(self) -> Interval:
        """τ, one number or one per layer."""
        return self._interval

    def initial(self, shape: Shape) -> Placement:
        """Experts 0..B-1 of each layer. Raise InputError if there are intervals for another number of layers."""
        self._intervals = per_layer(self._interval, shape.num_layers, "refresh_interval")
        return _first_ids(shape)

    def _is_due(self, forward: ForwardInfo, layer: int) -> bool:
        return forward.kind == ForwardKind.DENOISE and forward.step % self._intervals[layer] == 0


class Tide(_Periodic):
    """TIDE as published (arXiv 2605.20179v1, algorithm 1): hottest host expert for coldest device expert.

    A counter per layer and expert adds up the tokens routed to it. Every τ denoising steps, counted from each block's
    first step, the hottest expert on the host changes places with the coldest one on the device, and so on for
    as long as the one on the host is strictly hotter. Misses run on the host.

    What the paper leaves open is decided here: the counter covers every forward of the run (it is not cleared between
    blocks or sequences, and the refreshing forward's own routing is in it), and the first residents are ids 0..B-1, as
    in the released code. The published engine has no KV cache, hence no prefill and no commit forwards; here
    they are counted but never refresh. Ties: among equally hot host experts and among equally cold device
    experts the lower id goes first.

    Parameters
    ----------
    refresh_interval : τ >= 1, one number or one per layer.
    """

    name = "tide"

    def initial(self, shape: Shape) -> Placement:
        """Experts 0..B-1 of each layer, and all counters at zero."""
        self._hits = np.zeros((shape.num_layers, shape.num_experts), np.int64)
        return super().initial(shape)

    def refresh(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> Moves:
        """Swaps while a host expert is strictly hotter than a device expert."""
        hits = self._hits[layer]
        hits += counts
        if not self._is_due(forward, layer):
            return NO_MOVES
        hottest = np.argsort(-hits, kind="stable")
        coldest = np.argsort(hits, kind="stable")
        on_host, on_device = hottest[~is_resident[hottest]], coldest[is_resident[coldest]]
        length = min(len(on_host), len(on_device))
        # The hits of one list fall and those of the other rise, so the swaps worth making come first.
        num_swaps = int(np.count_nonzero(hits[on_host[:length]] > hits[on_device[:length]]))
        if not num_swaps:
            return NO_MOVES
        return Moves(tuple(on_host[:num_swaps].tolist()), tuple(on_device[:num_swaps].tolist()))


class TideAsCoded(_Periodic):
    """TIDE as its released code does it (github.com/ims-kdks/TIDE), which differs from the paper in most points.

    It refreshes on each denoising step whose number within its block is a multiple of τ, and on every step of a
    sequence's first decoded block. A refresh looks at this forward's counts alone: the targets are the (at most) B
    experts with most tokens, those without any left out. Absent targets are promoted, most tokens first. As many
    residents that are no targets are evicted: the first ones in the iteration order of a CPython set. That
    set is rebuilt at each refresh, from the targets in their order and then the residents that stay, so neither counts
    nor recency decide: with at least 77 elements CPython (3.11 to 3.14) iterates small integers in ascending order,
    below that the order depends on what was put in before. The class builds real sets in the same way,
    and therefore needs CPython.

    The first residents are ids 0..B-1. Misses run on the host. The released code has no KV cache, hence no prefill and
    no commit forwards, and counts every row of its window; here such forwards never refresh. Ties: PyTorch's top-k
    leaves the order of equal counts open; here the lower id comes first.

    Parameters
    ----------
    refresh_interval : τ >= 1 (`jump_steps` there), one number or one per layer.
    """

    name = "tide-as-coded"

    def initial(self, shape: Shape) -> Placement:
        """Experts 0..B-1 of each layer, put into the sets in that order."""
        self._budgets = shape.budgets
        self._resident: list[set[int]] = [set(range(budget)) for budget in shape.budgets]
        return super().initial(shape)

    def refresh(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> Moves:
        """Swaps towards the experts with most tokens in this forward, victims in set order."""
        is_first_block = forward.is_first_block and forward.kind == ForwardKind.DENOISE
        if not (is_first_block or self._is_due(forward, layer)):
            return NO_MOVES
        hottest = np.argsort(-counts, kind="stable")[: self._budgets[layer]]
        targets = hottest[counts[hottest] > 0].tolist()
        residents, wanted = self._resident[layer], set(targets)
        promote = [expert for expert in targets if expert not in residents]
        candidates = [expert for expert in residents if expert not in wanted]
        # Even without a move the set is built anew, and that can change the order of its next iteration.
        wanted.update(candidates[len(promote) :])
        self._resident[layer] = wanted
        return Moves(tuple(promote), tuple(candidates[: len(promote)])) if promote else NO_MOVES


POLICIES: dict[str, Callable[..., Policy]] = {
    AllDevice.name: AllDevice,
    AllHost.name: AllHost,
    Static.name: Static,
    LRU.name: LRU,
    Tide.name: Tide,
    TideAsCoded.name: TideAsCoded,
}


def _first_ids(shape: Shape) -> Placement:
    return Placement(tuple(tuple(range(budget)) for budget in shape.budgets))
