"""Caches: every missed expert is fetched, and takes the place of another one, in forwards of all kinds.

The device computes everything. The experts of a forward run residents first, then the fetched ones in ascending ids. If
a forward misses more experts than there are slots, the fetched ones follow each other through the slots, or through
scratch memory under `lru`.
"""

from tidesim.policies.composition import Composition, first_ids, last_ids
from tidesim.policies.interface import Policy
from tidesim.policies.pieces import Arrival, Decayed, FrequencyOverAge, InUse, LastUse, Recency, Visits
from tidesim.policies.rules import Rule
from tidesim.policies.splits import KeepAll, KeepBest
from tidesim.policies.victims import Lowest

# --- plain rules ---


def lru() -> Policy:
    """Fetch every missed expert; after each forward the B most recently used ones of a layer are there.

    Textbook rule, of no project. All experts, on the device or not, are ordered by their last use: the later the
    forward the more recent, and in one forward the higher the id. The misses that are then among the B most recent ones
    stay; the victims are the least recent residents, the least recent first. When a forward uses more experts than
    there are slots, so that its lower ids are not among them, those are copied after the others into scratch memory for
    one expert, and forgotten. Before its first use an expert is less recent than all that were used, and the lower id
    more recent than the higher one: the first residents are ids 0..B-1. There are no ties.

    The order does not depend on B. So this is a stack algorithm (Mattson et al., "Evaluation techniques for storage
    hierarchies", 1970): residents at one budget are residents at all larger ones, and one pass over the routing counts
    what happens at all budgets; see `replay.lru_curve`.
    """
    recency = Recency()
    return Composition(
        "lru", first_ids, split=KeepBest(recency), victims=Lowest(recency), scratch=1, rule=Rule("most-recent")
    )


def lfu() -> Policy:
    """Fetch every missed expert and keep it, in the place of the least frequently used one of its layer.

    Textbook rule, of no project. A use is a forward that routes to an expert, however many tokens; uses are counted
    while an expert is on the device, and begin again when it comes back. Who was just fetched has one use, so it is
    often the next victim, even in the same forward. The first residents are ids 0..B-1, not used yet. Ties: the least
    recently used, as in `mixtral_offloading`, then the lower id.
    """
    return Composition("lfu", first_ids, split=KeepAll(), victims=Lowest(Visits(is_kept=False), LastUse()))


def decayed(keep: float = 0.9) -> Policy:
    """Fetch every missed expert and keep it, in the place of the one of its layer with least tokens of late.

    Textbook rule (exponential smoothing), of no project. Tokens are counted for all experts, on the device or not, the
    current forward's included, and each forward weighs `keep` times as much as the one after it. The first residents
    are ids 0..B-1. Ties: the lower id goes first.

    Parameters
    ----------
    keep : in 0..1; 0: this forward alone counts, 1: all forwards count alike. Raise InputError otherwise.
    """
    return Composition("decayed", first_ids, split=KeepAll(), victims=Lowest(Decayed(keep)))


# --- systems ---


def mixtral_offloading() -> Policy:
    """mixtral-offloading (github.com/dvmazur/mixtral-offloading), as coded: a least recently used cache per layer.

    All active experts are marked as most recent before the first copy, ascending ids, residents first. A mark moves
    nothing for one that is absent, and one that comes in is marked once more. So the order in a forward depends on who
    was resident, unlike in `lru`: residents in use are used first, in ascending ids, then each one fetched. A resident
    in use is protected by its recency alone, and misses beyond the number of slots cycle through the layer's slots. The
    lowest ids are offloaded there, so the first residents are the B highest (oldest: the lowest of them). There are no
    ties.

    Left out: the window. The first min(3, B, misses) swaps are issued up front there, and one more behind each expert
    that was fetched and ran. All copies are on the stream that computes, so this changes the order of things and not
    their sum. The `Execution` to run it under has blocking copies from pinned memory with write-back: a swap is one
    copy in and one copy of the victim out. The four transfer buffers beside the slots are not counted. The paper's
    loading ahead for the next layer is not in the code.
    """
    rule = Rule("least-recent")
    return Composition("mixtral-offloading", last_ids, split=KeepAll(), victims=Lowest(LastUse()), rule=rule)


def moe_infinity() -> Policy:
    """MoE-Infinity (github.com/TorchMoE/MoE-Infinity) as coded, without the prefetching that its code has turned off.

    All layers share one pool of slots. Misses are fetched in ascending ids. The victim is the expert with fewest visits
    in the whole network; ties: the lower id, then the lower layer. A visit is a forward in which it ran on the
    device. Visits outlast an eviction, and all go back to 0 with each sequence.

    The original locks the active experts of a layer until each has run; here nobody who has rows in the running layer
    is a victim as long as there is another one, and then those with fewest visits are. There everything begins on a
    drive and the pool is empty; here ids 0..B-1 of each layer are the first residents. The pool is one device's; with
    more of them, expert e belongs to device e modulo their number there. For its `Execution`: copies in the background
    from pinned memory, without write-back, and no host compute.

    Later versions of the code, in forwards of more than one token, fetch what finds no free slot into one place beside
    the pool and forget it. That is left out.
    """
    victims = Lowest(InUse(), Visits("sequence"), scope="network", tie="expert")
    return Composition("moe-infinity", first_ids, split=KeepAll(), victims=victims, scope="network")


def vllm_expert_cache() -> Policy:
    """The expert cache proposed for vLLM (github.com/vllm-project/vllm, pull request 37190), as coded there.

    Each layer has its own slots and its own clock, which counts the uses of experts. The victim has the fewest uses
    since it came in for its age, `pieces.FrequencyOverAge`; nobody who has rows in this forward is one. Ties: who came
    in first, then the lower id.

    What differs: a forward with more experts than slots is split by tokens there, each part fetching anew what the part
    before evicted. Here each missed expert is fetched once, in ascending ids, and as soon as all residents are in use
    the victim is one of them, by the same measure. Hits and misses are used in one ascending order there; here the
    residents come first, which shifts ages by a few uses. The cache is empty at first there; here ids 0..B-1 begin,
    without a use. Copies are made one by one from pinned memory, without write-back, for its `Execution`.
    """
    victims = Lowest(InUse(), FrequencyOverAge(), Arrival())
    return Composition("vllm-expert-cache", first_ids, split=KeepAll(), victims=victims)
