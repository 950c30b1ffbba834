"""The integer programme of a plan by another exact method."""

from collections.abc import Sequence

import numpy as np

from tidesim.planner.integer_programme import Option

_NEVER_NS = 2**62


def least_ns(table: Sequence[Sequence[Option]], slots: int) -> int | None:
    """The least total time of one option a layer within `slots`, by the textbook's dynamic programme over slots.

    None if no choice fits.
    """
    best_ns = np.zeros(slots + 1, np.int64)  # by slots that are left for the layers so far
    for options in table:
        with_layer = np.full(slots + 1, _NEVER_NS, np.int64)
        for option in options:
            if option.budget <= slots:
                then_ns = best_ns[: slots + 1 - option.budget] + option.time_ns
                with_layer[option.budget :] = np.minimum(with_layer[option.budget :], then_ns)
        best_ns = np.minimum(with_layer, _NEVER_NS)
    return None if best_ns[slots] >= _NEVER_NS else int(best_ns[slots])
