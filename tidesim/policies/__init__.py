"""Who should be on the device, and why: every policy, used by the simulator and by the live engine alike.

A policy sees how many tokens each expert got, and answers with moves. It never sees a clock, so on the same routing
it makes the same moves wherever it runs. Whoever runs the network asks it in one fixed order:

1. `initial` once; it begins a run, so a policy object may be used for one run after another.
2. Forward by forward and, within a forward, layer by layer: `observe`, `serve`, `ahead` and `refresh`, once each. With
   blocking copies `refresh` comes right after `observe`, hence before the layer's experts run, and its moves count for
   this very forward, while moves in other layers are done last; with background copies `refresh` comes last, and its
   moves count from the next forward on.

A policy may also write down at once what it would answer for many forwards (`Policy.write`), for whoever has no need to
hear it layer by layer.

Most policies are compositions of a few pieces: who begins (`composition`), when to refresh and which swaps are worth it
(`Trigger`, `Guard`), how much an expert is worth and who is evicted (`pieces`), what becomes of misses (`splits`, and
`schedules` for those that weigh host against copies), whom to fetch ahead (`prefetch`) and who says so (`predictors`).
A policy of your own derives from `Policy` and overrides what it decides. Each preset states its source, whether it is
as published or as coded, and its tie order. Letters: L MoE layers, E experts per layer. τ is the refresh interval.
"""

import inspect
from collections.abc import Callable, Mapping

from tidesim.errors import InputError, nearest_name
from tidesim.policies.arc import Arc
from tidesim.policies.caches import decayed, lfu, lru, mixtral_offloading, moe_infinity, vllm_expert_cache
from tidesim.policies.fixed import all_device, all_host, ktransformers, llama_cpp, static
from tidesim.policies.gain import Gain
from tidesim.policies.hybrid import (
    daop,
    fiddler,
    freetoken_cpu,
    freetoken_hybrid,
    freetoken_offload,
    hybrimoe,
    ktransformers_dynamic,
)
from tidesim.policies.interface import (
    ALL_ON_HOST,
    Ahead,
    ForwardInfo,
    MissAction,
    Policy,
    Serving,
    Shape,
    decided,
    forwards_of,
)
from tidesim.policies.prefetching import PreGated, finemoe, moe_infinity_paper, next_layer_prefetch
from tidesim.policies.tide import rlx, tide, tide_as_coded

__all__ = [
    "ALL_ON_HOST",
    "POLICIES",
    "Ahead",
    "ForwardInfo",
    "MissAction",
    "Policy",
    "Serving",
    "Shape",
    "decided",
    "forwards_of",
    "parameters_of",
    "policy",
]

POLICIES: dict[str, Callable[..., Policy]] = {
    "all-device": all_device,
    "all-host": all_host,
    "static": static,
    "lru": lru,
    "tide": tide,
    "tide-as-coded": tide_as_coded,
    "gain": Gain,
    "rlx": rlx,
    "lfu": lfu,
    "decayed": decayed,
    "arc": Arc,
    "mixtral-offloading": mixtral_offloading,
    "moe-infinity": moe_infinity,
    "vllm-expert-cache": vllm_expert_cache,
    "ktransformers": ktransformers,
    "llama-cpp": llama_cpp,
    "fiddler": fiddler,
    "freetoken-offload": freetoken_offload,
    "freetoken-hybrid": freetoken_hybrid,
    "freetoken-cpu": freetoken_cpu,
    "hybrimoe": hybrimoe,
    "ktransformers-dynamic": ktransformers_dynamic,
    "daop": daop,
    "pre-gated": PreGated,
    "moe-infinity-paper": moe_infinity_paper,
    "finemoe": finemoe,
    "next-layer-prefetch": next_layer_prefetch,
}


def policy(name: str, **params: object) -> Policy:
    """The policy called `name`, made with `params`.

    Raise InputError if there is no such policy (the nearest name is given), or if it takes other parameters.

    Examples
    --------
    >>> policy("tide", refresh_interval=4).refresh_interval
    4
    """
    signature = parameters_of(name)
    for param in params:
        if param not in signature:
            raise InputError(f"policy {name!r} takes no {param!r}; it takes {', '.join(signature) or 'no parameter'}.")
    for param, accepted in signature.items():
        if param not in params and accepted.default is inspect.Parameter.empty:
            raise InputError(f"policy {name!r} needs {param!r}; pass it to policy().")
    return POLICIES[name](**params)


def parameters_of(name: str) -> Mapping[str, inspect.Parameter]:
    """What the policy called `name` is made with. Raise InputError, with the nearest name, if there is none."""
    if name not in POLICIES:
        raise InputError(f"no policy {name!r}; {nearest_name(name, POLICIES)}")
    return inspect.signature(POLICIES[name]).parameters
