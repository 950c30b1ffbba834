"""Systems that fetch experts for layers that are still to run. All compute on the device alone.

Some of the originals keep prefetches in a queue that a miss overtakes, and remove from it those of layers that have
run. Here the link is first come first served and a copy once ordered is made, so a miss may wait for prefetches: to say
otherwise a policy would need a clock. Where an original does not say who begins, or begins empty and reads from a
drive, the first residents are ids 0..B-1 of each layer.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from tidesim.errors import InputError
from tidesim.policies.composition import Composition, first_ids, nobody
from tidesim.policies.interface import Ahead, Counts, ForwardInfo, Mask, MissAction, Policy, Serving, Shape
from tidesim.policies.pieces import FrequencyOverAge, Visits, everything_in
from tidesim.policies.predictors import ExpectedVisits, NearestForward, NearestSequence, Predictor
from tidesim.policies.prefetch import CumulativeShare, MostExpected, Prefetch, all_expected
from tidesim.policies.splits import KeepAll
from tidesim.policies.victims import Highest, Lowest, Victims
from tidesim.residency import Moves, Placement
from tidesim.workload import Workload


class PreGated(Policy):
    """Pre-gated MoE (arXiv 2308.12066) as its released code does it, without the optional cache.

    There are two buffers. When the router of layer l is done, whoever is not needed there gives up its slot, and all
    experts that the predictor names for layer l + 1 are fetched, ascending ids. The first layer finds nobody and
    fetches on demand; after the last layer's router all slots are given up, so nothing is kept for the next forward.

    The original retrains the network so that the router of layer l chooses for layer l + 1. An `Oracle` is that
    network, exactly; `Recorded` is what an unmodified one can do. Then experts that nobody foretold are fetched on
    demand, ascending ids, into slots that layer l does not need. All layers share the slots. If these cannot hold two
    layers' experts, the lower ids are fetched ahead as far as there is room and the others on demand; and if not even
    one layer's, the higher ids go through scratch memory, which holds one expert. There are no ties.

    Parameters
    ----------
    predictor : who is needed in the next layer.
    """

    name = "pre-gated"
    scope: Literal["layer", "network"] = "network"
    scratch = 1
    miss_action: MissAction = "fetch"

    def __init__(self, predictor: Predictor) -> None:
        self._predictor, self._pieces = predictor, everything_in([predictor])

    def initial(self, shape: Shape) -> Placement:
        """See `Policy`. Both buffers are empty."""
        self._num_slots = sum(shape.budgets)
        for piece in self._pieces:
            piece.begin(shape)
        return nobody(shape)

    def observe(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> None:
        """See `Policy`."""
        for piece in self._pieces:
            piece.observe(forward, layer, counts, is_resident)

    def serve(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Serving:
        """See `Policy`. The slots of the layer before are taken first, ascending ids, then those of this layer."""
        num_free = self._num_slots - int(np.count_nonzero(is_resident))
        idle = _not_needed(layer, counts, is_resident)
        keep = missed[: num_free + len(idle)]
        return Serving(Moves(tuple(keep), tuple(idle[: max(0, len(keep) - num_free)])), tuple(missed[len(keep) :]))

    def ahead(self, forward: ForwardInfo, layer: int, counts: Counts, is_resident: Mask) -> Sequence[Ahead]:
        """See `Policy`."""
        if layer == len(is_resident) - 1:
            everybody = tuple(np.flatnonzero(is_resident).tolist())
            return [Ahead(layer, Moves(evict=everybody))] if everybody else ()
        idle = _not_needed(layer, counts, is_resident)
        num_free = self._num_slots - int(np.count_nonzero(is_resident)) + len(idle)
        expected = all_expected(self._predictor.predict(forward, layer, layer + 1), 1.0)
        moves = Moves(tuple(expected[:num_free]), tuple(idle))
        return [Ahead(layer + 1, moves)] if moves else ()


def _not_needed(layer: int, counts: Counts, is_resident: Mask) -> list[int]:
    """Residents that have no rows in the running layer, as moves over the whole network name them."""
    idle = is_resident.copy()
    idle[layer] &= counts == 0
    ids: list[int] = np.flatnonzero(idle).tolist()
    return ids


def _shared_cache(name: str, victims: Victims, prefetch: Prefetch) -> Policy:
    """One cache for all layers, filled by a prefetch and on demand.

    Misses are fetched in ascending ids and kept. A victim is neither expected in a later layer nor used by the running
    one. If there is none, a prefetch is left out, and a miss goes through scratch memory, which holds one expert.
    """
    return Composition(
        name,
        first_ids,
        split=KeepAll(),
        victims=victims,
        prefetch=prefetch,
        is_in_use_safe=True,
        scope="network",
        scratch=1,
    )


def moe_infinity_paper(corpus: Workload, mode: Literal["coded", "published"] = "published") -> Policy:
    """MoE-Infinity as in its paper (arXiv 2401.14361): experts of like sequences are prefetched for all later layers.

    After each router the sequence so far is matched against those of `corpus`, see `predictors.NearestSequence`.
    Whoever the nearest one used in a later layer is fetched unless it is there, most tokens times nearness first. They
    are all candidates, also those without a slot, and no victims until their layer runs; all else is as in
    `_shared_cache`. Visits are counted when a copy is made, prefetches too, and when a resident is used; they outlast
    an eviction, and start again with each sequence.

    As published, all layers are compared and the victim has the fewest visits. As coded (the project's older path,
    off in its present code), only later layers are compared, every expert of a later layer is a candidate by a floor of
    1e-8 tokens, and victims are sorted the wrong way round: the most visited goes first.

    What differs: misses do not overtake prefetches (see the module), and the store of sequences is `corpus` as it is,
    without additions or replacement. Ties, open in the original: the lower layer first, then the lower id.

    Parameters
    ----------
    corpus : sequences that ran before; not those that are run.
    mode : see above. Raise InputError if it is another one.
    """
    if mode not in ("coded", "published"):
        raise InputError(f"mode(={mode!r}) must be 'coded' or 'published'.")
    visits, is_coded = Visits("sequence"), mode == "coded"
    predictor = NearestSequence(corpus, "later", floor=1e-8) if is_coded else NearestSequence(corpus)
    victims = Highest(visits, scope="network") if is_coded else Lowest(visits, scope="network")
    name = "moe-infinity-paper-as-coded" if is_coded else "moe-infinity-paper"
    return _shared_cache(name, victims, Prefetch(predictor, furthest=None, order="network"))


def finemoe(corpus: Workload, distance: int = 6, least: int = 8) -> Policy:
    """FineMoE (github.com/IntelliSys-Lab/FineMoE-EuroSys26) as first released: like forwards need like experts.

    After the router of layer l this forward's layers so far are matched against the forwards of `corpus`, see
    `predictors.NearestForward`. For each layer from l + `distance` on the experts with the highest shares in the
    nearest forward are chosen as long as these add up to 1 - cosine at most, and at least `least` of them. They are
    fetched by share over distance, whatever their layer, unless they are there. The victim has the lowest product of
    its last predicted share and its visits, see `predictors.ExpectedVisits`; all else is as in `_shared_cache`.

    What differs: the original matches router probabilities of one token, here it is the shares of a forward's tokens,
    so `least` (its top-k) is small for a forward of many tokens. It finds the first `distance` layers by the nearest
    prompt embedding; a workload has none, so nothing is known of them: they are fetched on demand, are worth nothing
    and are the first victims. It adds 1e-6 to every expert so that all are ranked; here who has no share in the nearest
    forward is not fetched. Its store replaces the most redundant prompt; here it is `corpus` as it is. Misses do not
    overtake prefetches (see the module). Ties, open in the original: the lower layer first, then the lower id.

    Parameters
    ----------
    corpus : forwards that ran before; not those that are run.
    distance : layers from the one that runs to the nearest one that is fetched for, >= 1. Raise InputError otherwise.
    least : experts of a layer that are fetched at least, if so many are expected; >= 0.
    """
    if distance < 1 or least < 0:
        raise InputError(f"distance(={distance}) must be >= 1, and least(={least}) must be >= 0.")
    predictor = NearestForward(corpus)
    victims = Lowest(ExpectedVisits(predictor, distance), scope="network")
    prefetch = Prefetch(predictor, CumulativeShare(least), nearest=distance, furthest=None, order="network")
    return _shared_cache("finemoe", victims, prefetch)


def next_layer_prefetch(predictor: Predictor, most: int | None = None) -> Policy:
    """A cache in each layer, filled on demand and, one layer ahead, by a predictor; like tinyserve's for vLLM's cache.

    Misses are fetched in ascending ids and kept; after each router the experts that are expected in the next layer
    are fetched too, most expected first. The victim has the fewest uses since it came in for its age in uses of its
    layer (vLLM, pull request 37190; `pieces.FrequencyOverAge`); an expert that is fetched ahead counts as used once. A
    victim of a prefetch is not expected itself; if there is none left, the others are fetched on demand.

    What differs: tinyserve's own predictor is the next layer's router on the current hidden state, which is `Recorded`
    here. With more experts in use than slots vLLM splits a forward, and here they take turns in the slots. Ties: the
    lower id.

    Parameters
    ----------
    predictor : who is needed in the next layer.
    most : experts that are fetched ahead in a layer at most; None: all that are expected. Raise InputError if < 0.
    """
    if most is not None and most < 0:
        raise InputError(f"most(={most}) must be >= 0.")
    return Composition(
        "next-layer-prefetch",
        first_ids,
        split=KeepAll(),
        victims=Lowest(FrequencyOverAge()),
        prefetch=Prefetch(predictor, all_expected if most is None else MostExpected(most)),
    )
