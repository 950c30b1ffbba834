"""tidesim's own policy: an expert moves when the time that it will save exceeds what the move costs now.

TIDE (arXiv 2605.20179) asks how often to choose the resident experts afresh, and answers with one number for the whole
run, tuned on the machine. Between two refreshes nothing moves and the link is idle, and at a refresh everything moves
at once, whether or not it will be of use. Here every forward and layer decides for itself, with the times that the
machine's profile predicts:

1. *What is an expert worth?* The forwards, of the next few, that are expected to use it (`foresight`), times what one
   avoided miss with its rows saves. Counts of the block, the sequence and a corpus go into the expectation, and
   placements outlive blocks: where one ends, it turns to the experts that blocks begin with.
2. *Just in time.* When the router is done it is known who is missing. The link can fetch some of them while the host
   computes the others, and the device runs each as it arrives. As many are fetched as make the layer shortest, given
   also what those that stay will save later: first those that save most, now and later. With the host beside the device
   and copies in the background both work until they meet, and a copy costs nothing as long as the host is the longer
   side.
3. *Who stays?* An expert that was fetched stays if it is worth more than the resident that is worth least, whose place
   it takes. Otherwise it goes through scratch memory and is forgotten. So a budget below what a forward touches does
   no harm, where a cache would evict what it needs next.
4. *Idle link.* If the link would have nothing to do before the next layer's router is done, the best absent expert of
   that layer comes in, provided that it is worth more than the worst resident there. If it is used at once, its fetch
   has merely begun earlier; and what the next block will want comes while this one ends.
5. *Prefill* needs nearly all experts once. It is decided by the same sums; that its use says little about what comes
   next is in the expectation, which is learnt apart for it.

It never looks at a clock: times are predicted and added up on paper, so simulator and engine make the same moves. Ties:
fewer fetches, and the lower id.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tidesim.errors import InputError
from tidesim.execution import Costs
from tidesim.policies.composition import MostPopular
from tidesim.policies.foresight import Foresight
from tidesim.policies.interface import (
    ALL_ON_HOST,
    Ahead,
    Counts,
    ForwardInfo,
    Mask,
    MissAction,
    Policy,
    Serving,
    Shape,
)
from tidesim.residency import Moves, Placement
from tidesim.workload import Workload

Floats = npt.NDArray[np.float64]

# An idle link brings in who is worth so many uses more than the victim: a copy for less would only stand in the way.
_LEAST_LEAD = 0.05


class Gain(Policy):
    """See the module.

    Parameters
    ----------
    corpus : sequences to learn from what is used again.

    Raise InputError at the beginning of a run without predicted times, or with a corpus of another shape.
    """

    name = "gain"
    miss_action: MissAction = "split"
    is_routing_only = False
    scratch = 2

    def __init__(self, corpus: Workload) -> None:
        self._foresight = Foresight(corpus)

    def initial(self, shape: Shape) -> Placement:
        """The experts that blocks begin with, as far as there are slots."""
        if shape.costs is None:
            raise InputError("policy 'gain' decides by predicted times; give the machine's profile.")
        self._budgets = shape.budgets
        self._paper = PaperClock(shape.costs)
        self._foresight.begin(shape)
        return MostPopular(self._foresight.at_start)(shape)

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """See `Policy`."""
        self._foresight.observe(forward, layer, counts, is_resident)
        self._paper.pass_dense(forward)

    def serve(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Serving:
        """Fetch as many of `missed` as make the layer shortest, and keep those that are worth a slot."""
        worth_ns, paper = self._worth_ns(layer), self._paper
        work = LayerWork(paper.costs, forward, counts, is_resident[layer])
        if not missed:
            paper.pass_layer(work.device_ns, 0)
            return ALL_ON_HOST
        saved_ns = worth_ns[missed] + paper.costs.host_expert_ns[counts[missed]]
        experts = np.array(missed)[np.argsort(-saved_ns, kind="stable")]
        victims, num_free = self._victims(layer, worth_ns, is_resident[layer])
        lead_ns = _leads(worth_ns[experts], np.concatenate([np.zeros(num_free), worth_ns[victims]]))
        # Who takes the slot of an expert that has rows comes only after that one has run.
        is_held_up = np.concatenate([np.zeros(num_free, np.bool_), counts[victims] > 0])
        times_ns = work.times_ns(experts, paper.copy_ns, paper.backlog_ns, is_held_up)
        num_fetched = int(np.argmin(times_ns - np.concatenate([[0.0], np.cumsum(lead_ns)])))
        paper.pass_layer(float(times_ns[num_fetched]), num_fetched)
        return self._serving(experts[:num_fetched], lead_ns[:num_fetched] > 0, victims, num_free)

    def _worth_ns(self, layer: int) -> Floats:
        """What each expert of `layer` will save on the device, [E]."""
        worth_ns: Floats = self._foresight.of(layer) * self._paper.saving_ns[self._foresight.rows[layer]]
        return worth_ns

    def _victims(self, layer: int, worth_ns: Floats, is_resident: Mask) -> tuple[npt.NDArray[np.intp], int]:
        """Residents, those worth least first, and the number of free slots."""
        residents = np.flatnonzero(is_resident)
        order = np.argsort(worth_ns[residents], kind="stable")
        return residents[order], self._budgets[layer] - len(residents)

    def _serving(
        self, fetched: npt.NDArray[np.intp], stays: Mask, victims: npt.NDArray[np.intp], num_free: int
    ) -> Serving:
        keep, drop = fetched[stays].tolist(), fetched[~stays].tolist()
        evict = victims[: max(0, len(keep) - num_free)].tolist()
        return Serving(Moves(tuple(keep), tuple(evict)), tuple(drop))

    def ahead(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> Sequence[Ahead]:
        """One expert of the next layer, if the link would be idle: the best absent one for the worst resident."""
        target = (layer + 1) % len(is_resident)
        if not self._paper.has_idle_link(forward):
            return ()
        worth_ns, mine = self._worth_ns(target), is_resident[target]
        victims, num_free = self._victims(target, worth_ns, mine)
        absent = np.flatnonzero(~mine)
        if not len(absent) or not (num_free or len(victims)):
            return ()
        best = int(absent[np.argmax(worth_ns[absent])])
        least_ns = 0.0 if num_free else worth_ns[victims[0]] + _LEAST_LEAD * self._paper.saving_ns[1]
        if worth_ns[best] <= least_ns:
            return ()
        self._paper.pass_copy()
        return [Ahead(target, Moves((best,), () if num_free else (int(victims[0]),)))]


def _leads(worth_ns: Floats, room_ns: Floats) -> Floats:
    """By how much each of the fetched is worth more than whom it would replace, one after another; 0 if by nothing.

    `room_ns` is what those are worth whose place is to be had; there may be fewer than are fetched.
    """
    lead_ns = np.zeros(len(worth_ns))
    num = min(len(worth_ns), len(room_ns))
    lead_ns[:num] = np.maximum(worth_ns[:num] - room_ns[:num], 0.0)
    return lead_ns


class LayerWork:
    """What a layer takes in one forward, by how many of its missed experts are fetched.

    Attributes
    ----------
    device_ns : the residents' part.
    """

    def __init__(self, costs: Costs, forward: ForwardInfo, counts: Counts, is_resident: Mask) -> None:
        self._costs, self._counts, self._num_rows = costs, counts, forward.tokens
        hit = counts[(counts > 0) & is_resident]
        self.device_ns = sum(costs.experts_ns(int(costs.loop_ns[hit].sum()), len(hit), int(hit.sum())))

    def times_ns(self, experts: npt.NDArray[np.intp], copy_ns: float, backlog_ns: float, is_held_up: Mask) -> Floats:
        """If the first 0, 1, .. of the missed `experts` are fetched and the host computes the rest, [n + 1].

        A copy takes `copy_ns`; `backlog_ns` is what the link still has to do before it can begin. `is_held_up` says of
        the places that are to be had, in order, whether their residents must run before a copy can begin.
        """
        costs, execution, rows = self._costs, self._costs.execution, self._counts[experts]
        alone_ns = costs.fetched_ns[rows].astype(np.float64)
        ran_ns = np.cumsum(alone_ns)
        if execution.copies == "background":
            # A copy begins when it may and the one before it has ended; an expert runs when it has arrived and those
            # before it have run.
            ready_ns = np.full(len(experts), backlog_ns)
            held_up = is_held_up[: len(experts)]
            ready_ns[: len(held_up)][held_up] = max(backlog_ns, self.device_ns)
            copied_ns = np.arange(len(experts)) * copy_ns
            arrived_ns = np.maximum.accumulate(ready_ns - copied_ns) + copied_ns + copy_ns
            start_ns = np.maximum.accumulate(arrived_ns - (ran_ns - alone_ns))
            device_ns = np.maximum(self.device_ns, start_ns) + ran_ns
        else:
            device_ns = self.device_ns + np.arange(1, len(experts) + 1) * copy_ns + ran_ns
        device_ns = np.concatenate([[self.device_ns], device_ns])
        host_ns = self._host_ns(rows)
        return np.maximum(device_ns, host_ns) if execution.host == "parallel" else device_ns + host_ns

    def _host_ns(self, rows: Counts) -> Floats:
        """The host's part without the first 0, 1, .. of the missed experts, [n + 1]."""
        each_ns, pairs = self._costs.host_expert_ns[rows], rows.astype(np.int64)
        left_ns = np.concatenate([[0], np.cumsum(each_ns[::-1])])[::-1]
        left_pairs = np.concatenate([[0], np.cumsum(pairs[::-1])])[::-1]
        host_ns: Floats = left_ns + self._costs.host_call_ns(np.minimum(self._num_rows, left_pairs), left_pairs)
        return host_ns


class PaperClock:
    """Predicted time, added up: where the run is, and how long the link has something to do.

    What lies between two forwards is left out, and so is what the dense part of a layer attends to besides the
    forward's own rows. The rows of a batch are taken for those of one sequence, which attend to each other.

    Attributes
    ----------
    copy_ns : what fetching one expert takes of the link. Its victim goes out first where it is written back: in the
        background on a lane of its own, so that the slower of the two counts.
    saving_ns : [max_rows + 1], what one miss less saves, by its rows: host and link share misses, so it is what both
        take for one side by side; or what the host alone takes, where the link is of no help.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self._is_background = costs.execution.copies == "background"
        copies_ns = float(costs.promote_ns), float(costs.evict_ns)
        self.copy_ns = max(copies_ns) if self._is_background else sum(copies_ns)
        host_ns = costs.host_expert_ns.astype(np.float64)
        is_shared = self._is_background and costs.execution.host == "parallel"
        both_ns = np.maximum(host_ns + self.copy_ns, 1.0)
        self.saving_ns: Floats = host_ns * self.copy_ns / both_ns if is_shared else host_ns
        rows = np.arange(costs.max_rows + 1)
        kernel_ns, launch_ns = costs.layer_ns(rows, np.zeros_like(rows))
        self._dense_ns: list[float] = (kernel_ns + launch_ns).astype(np.float64).tolist()  # by rows
        self._router_ns = self._now_ns = self._link_free_ns = 0.0

    @property
    def backlog_ns(self) -> float:
        """What the link still has to do."""
        return max(0.0, self._link_free_ns - self._now_ns)

    def has_idle_link(self, forward: ForwardInfo) -> bool:
        """Whether copies run beside everything else and the link is free before the next layer's router is done."""
        return self._is_background and self._link_free_ns < self._now_ns + self._dense_ns[forward.tokens]

    def pass_dense(self, forward: ForwardInfo) -> None:
        """The dense part of a layer, up to its router."""
        self._now_ns += self._dense_ns[forward.tokens]
        self._router_ns = self._now_ns

    def pass_layer(self, layer_ns: float, num_copies: int) -> None:
        """The routed experts of a layer, and the copies that began with them."""
        if num_copies and self._is_background:
            self._link_free_ns = max(self._link_free_ns, self._now_ns) + num_copies * self.copy_ns
        self._now_ns += layer_ns

    def pass_copy(self) -> None:
        """One copy more, behind those that began when the router was done."""
        self._link_free_ns = max(self._link_free_ns, self._router_ns) + self.copy_ns
