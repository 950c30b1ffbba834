"""Placements that never change; every miss runs on the host."""

import numpy.typing as npt

from tidesim.errors import BudgetError
from tidesim.policies.composition import Composition, MostPopular, first_ids, nobody
from tidesim.policies.interface import Policy, Shape
from tidesim.residency import Placement


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

    return Composition("all-device", everybody)


def all_host() -> Policy:
    """No expert on the device, every miss on the host: the lower reference. It leaves its budget unused."""
    return Composition("all-host", nobody)


def static(popularity: npt.ArrayLike) -> Policy:
    """The most popular experts of each layer, for good; every miss on the host.

    The "Fiddler" baseline of the TIDE paper (arXiv 2605.20179) is of this kind. It is not Fiddler's own policy, which
    ranks (layer, expert) pairs of the whole network and may copy a missed expert. Ties: the lower id first.

    Parameters
    ----------
    popularity : [L, E], how often each expert was routed to, for instance a workload's `counts.sum(axis=0)`.
    """
    return Composition("static", MostPopular(popularity))
