"""Placements that never change: misses run on the host, or, in large forwards of some systems, in scratch memory."""

from typing import Literal, get_args

import numpy.typing as npt

from tidesim.errors import BudgetError, InputError
from tidesim.policies.composition import (
    Composition,
    MostPopular,
    RandomIds,
    Start,
    first_ids,
    first_layers,
    last_layers,
    nobody,
)
from tidesim.policies.interface import Policy, Shape
from tidesim.policies.rules import Rule
from tidesim.policies.splits import ByTokens, DropAll, OnHost, StreamLayer
from tidesim.residency import Placement

Strategy = Literal["uniform", "frequency", "front-loading", "random"]


def all_device() -> Policy:
    """Every expert on the device: the upper reference, if it fits. Every budget must be E, else BudgetError is raised
    at the beginning of a run.
    """

    def everybody(shape: Shape) -> Placement:
        if min(shape.budgets) < shape.num_experts:
            raise BudgetError(
                f"policy 'all-device' needs a budget of all {shape.num_experts} experts in every layer, "
                f"not {min(shape.budgets)}; raise the budget, or take policy 'static'."
            )
        return first_ids(shape)

    return Composition("all-device", everybody, rule=Rule("never"))


def all_host() -> Policy:
    """No expert on the device, every miss on the host: the lower reference. It leaves its budget unused."""
    return Composition("all-host", nobody, rule=Rule("never"))


def static(popularity: npt.ArrayLike) -> Policy:
    """The most popular experts of each layer, for good; every miss on the host.

    The "Fiddler" baseline of the TIDE paper (arXiv 2605.20179) is of this kind. It is not Fiddler's own policy, which
    ranks (layer, expert) pairs of the whole network and may copy a missed expert. Ties: the lower id first.

    Parameters
    ----------
    popularity : [L, E], how often each expert was routed to, for instance a workload's `counts.sum(axis=0)`.
    """
    return Composition("static", MostPopular(popularity), rule=Rule("never"))


def ktransformers(
    strategy: Strategy = "uniform", popularity: npt.ArrayLike | None = None, threshold: int | None = 500
) -> Policy:
    """KTransformers (kt-kernel in an SGLang fork), as coded: a fixed mask of experts on the device, misses on the host.

    A forward of at least `threshold` tokens streams all experts of the layer through room for a layer, residents once
    more among them, and forgets them. Smaller ones, and so those of a block with a KV cache, leave the misses to the
    host. Each layer's experts on the device keep their copies in host memory.

    What differs: the draw of "random" is NumPy's, not PyTorch's, though the seed is 42 too. "frequency" falls back to
    even counts there where none are recorded; here they must be given. Putting part of the host's work off to the next
    layer ("deferral") changes the output, and is left out. With dynamic update it is `ktransformers-dynamic`. For its
    `Execution`: the host beside the device, called once per layer, and no write-back.

    Parameters
    ----------
    strategy : "uniform": ids 0..B-1 of each layer. The others divide all slots over the network: "frequency": the most
        popular pairs of layer and expert (ties: the lower layer, then the lower id); "front-loading": whole layers from
        the first one on, then the first ids of the next; "random": any pairs.
    popularity : [L, E], for "frequency", how often each expert was routed to.
    threshold : tokens; 500 as on the project's command line, its text names 1024 to 4096. None: nobody is streamed.

    Raise InputError if there is no such strategy, or "frequency" has no popularity.
    """
    return Composition(
        "ktransformers" if strategy == "uniform" else f"ktransformers-{strategy}",
        _mask(strategy, popularity),
        split=OnHost() if threshold is None else ByTokens(threshold, StreamLayer(), OnHost()),
        scope="layer" if strategy == "uniform" else "network",
        scratch_layers=0 if threshold is None else 1,
    )


def _mask(strategy: Strategy, popularity: npt.ArrayLike | None) -> Start:
    """Who is on the device by a strategy of KTransformers. Raise InputError as `ktransformers` does."""
    if strategy not in get_args(Strategy):
        raise InputError(f"strategy(={strategy!r}) must be one of {', '.join(map(repr, get_args(Strategy)))}.")
    if strategy == "frequency":
        if popularity is None:
            raise InputError("strategy 'frequency' needs popularity, how often each expert was routed to, [L, E].")
        return MostPopular(popularity, across="network")
    starts: dict[str, Start] = {
        "uniform": first_ids,
        "front-loading": first_layers,
        "random": RandomIds(42),
    }
    return starts[strategy]


def llama_cpp(threshold: int = 32) -> Policy:
    """llama.cpp with -ncmoe N, as coded: all experts of the first N layers are on the host, those of the others not.

    N is the least that the slots of all layers together allow, so the last sum(budgets) // E layers are whole on the
    device and the slots left over stay free. In forwards of fewer than `threshold` tokens the host computes all experts
    of a host layer. In others the used ones are copied to the device in ascending ids, run there, and are forgotten. A
    forward of the whole sequence, as block diffusion without a KV cache has it, is nearly always of the second kind.

    What differs: runs of neighbouring ids are one copy for each of the three tensors there, here each expert is copied
    alone. An expert runs as it arrives; there a tensor's experts run when all of them are there. Room for a layer of
    experts is counted for the copies. For its `Execution`: blocking copies (they are on the compute stream) from
    pageable memory, without write-back, and the host serial. There are no ties.

    Parameters
    ----------
    threshold : tokens; 32 is the default of GGML_OP_OFFLOAD_MIN_BATCH there.
    """
    split = ByTokens(threshold, DropAll(), OnHost())
    return Composition("llama-cpp", last_layers, split=split, scope="network", scratch_layers=1)
