"""Choices that are nearly as fast as the fastest, and of those the simplest.

A plan that is 1 % faster than one that moves no expert at all is seldom worth what it takes to run it. Simpler is, in
this order: to move nobody, then to refresh, then to fetch what is missed; the same budget and interval in all layers;
fewer parameters; fewer experts on the device; and of what is equally simple the faster.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from tidesim.policies import Policy

# How a policy moves experts, the simplest first.
Moving = Literal["never", "refresh", "fetch"]
MOVING: tuple[Moving, ...] = get_args(Moving)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A choice that was evaluated.

    Parameters
    ----------
    description : what people call it.
    moving : whether experts are "never" moved, at a "refresh" alone, or by a "fetch" when they are missed; `moving_of`.
    budget : slots of each layer.
    refresh_interval : of each layer; None for policies that never refresh. It counts as one parameter.
    params : the policy's other parameters, by name.
    tok_per_s : throughput.
    """

    description: str
    moving: Moving
    budget: tuple[int, ...]
    refresh_interval: tuple[int, ...] | None = None
    params: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tok_per_s: float

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have the same budget and the same interval, or refresh steps."""
        by_layer = (self.budget, self.refresh_interval or (), self.params.get("refresh_steps", ()))
        return all(len(set(values)) <= 1 for values in by_layer)

    @property
    def num_params(self) -> int:
        """Parameters of the policy, the interval among them."""
        return len(self.params) + (self.refresh_interval is not None)

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, ready for JSON."""
        stated = asdict(self) | {"budget": list(self.budget)}
        stated["refresh_interval"] = None if self.refresh_interval is None else list(self.refresh_interval)
        return stated | {"is_uniform": self.is_uniform, "num_params": self.num_params}


def moving_of(policy: Policy) -> Moving:
    """How `policy` moves experts. One that fetches some misses and leaves others to the host fetches."""
    if policy.miss_action != "host":
        return "fetch"
    is_refreshed = policy.refresh_interval is not None or policy.refresh_steps is not None
    return "refresh" if is_refreshed else "never"


def near_optimal(candidates: Iterable[Candidate], within: float = 0.02) -> list[Candidate]:
    """The candidates that are slower than the fastest by at most the share `within`, the simplest first.

    Equals stay in their order. Raise ValueError if there are none, or `within` is no share.
    """
    known = list(candidates)
    if not known:
        raise ValueError("there must be a candidate to choose from.")
    if not 0 <= within < 1:
        raise ValueError(f"within(={within}) must be >= 0 and < 1.")
    least = (1 - within) * max(candidate.tok_per_s for candidate in known)
    return sorted((candidate for candidate in known if candidate.tok_per_s >= least), key=_effort)


def simplest(candidates: Iterable[Candidate], within: float = 0.02) -> Candidate:
    """The simplest candidate that is slower than the fastest by at most the share `within`.

    Raise ValueError as `near_optimal` does.
    """
    return near_optimal(candidates, within)[0]


def _effort(candidate: Candidate) -> tuple[float, ...]:
    """What it takes to run this one, the weightiest first; ties go to the faster."""
    return (
        MOVING.index(candidate.moving),
        not candidate.is_uniform,
        candidate.num_params,
        sum(candidate.budget),
        -candidate.tok_per_s,
    )
