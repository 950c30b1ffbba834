"""Who is compared: each policy with the parameters, and the slots, that it is run with."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tidesim.policies import POLICIES, parameters_of

# References that do not use the same memory, and are no rivals.
_NOT_RIVALS = ("all-device",)

# What the row is called whose residents are chosen by the very sequences that are run.
STATIC_IN_HINDSIGHT = "static in hindsight"

# The execution of the system that a policy belongs to. Policies that are not here belong to no system, or to one whose
# way of running has no preset. The paper's TIDE has no public engine but the released code; FineMoE is a fork of
# MoE-Infinity.
OWN_EXECUTIONS = {
    "tide": "tide-as-coded",
    "tide-as-coded": "tide-as-coded",
    "fiddler": "fiddler",
    "mixtral-offloading": "mixtral-offloading",
    "moe-infinity": "moe-infinity",
    "moe-infinity-paper": "moe-infinity",
    "finemoe": "moe-infinity",
    "ktransformers": "ktransformers",
    "ktransformers-dynamic": "ktransformers",
    "llama-cpp": "llama-cpp",
    "freetoken-offload": "freetoken",
    "freetoken-hybrid": "freetoken",
    "freetoken-cpu": "freetoken",
}


class Contender(NamedTuple):
    """A policy and those of its parameters that are chosen for it.

    Parameters
    ----------
    name : what its row is called.
    policy : a name in `POLICIES`.
    params : (name, value) pairs; popularity "hindsight" is how long the host would take for all that an expert gets.
    family : contenders of one family differ in the refresh interval alone.
    execution : its system's own execution by name; None for the one that all share.
    """

    name: str
    policy: str
    params: tuple[tuple[str, Any], ...] = ()
    family: str | None = None
    execution: str | None = None


def contenders(
    intervals: Sequence[int],
    names: Sequence[str] | None = None,
    *,
    has_lookahead: bool = False,
    has_own_executions: bool = False,
) -> list[Contender]:
    """Everybody, or those policies that are named: one row each, and one for each interval of those that refresh.

    Those that go by a predictor get a row with one that is always right, and one with what an engine has: the recorded
    look-ahead of the routers if there is one, else the forward before. The best static placement in hindsight is always
    among them. With `has_own_executions` policies of other systems run as `OWN_EXECUTIONS` says. Raise InputError for
    an unknown name.
    """
    chosen = [name for name in POLICIES if name not in _NOT_RIVALS] if names is None else dict.fromkeys(names)
    found = [Contender(STATIC_IN_HINDSIGHT, "static", (("popularity", "hindsight"),))]
    for name in chosen:
        params = parameters_of(name)
        if "refresh_interval" in params:
            found += [
                Contender(f"{name}, tau={interval}", name, (("refresh_interval", interval),), family=name)
                for interval in intervals
            ]
        elif "predictor" in params:
            real = "look-ahead" if has_lookahead else "previous"
            found += [Contender(f"{name}, {how}", name, (("predictor", how),)) for how in ("oracle", real)]
        else:
            found.append(Contender(name, name))
    if not has_own_executions:
        return found
    return [one._replace(execution=OWN_EXECUTIONS.get(one.policy)) for one in found]
