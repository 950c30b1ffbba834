"""TIDE, as published and as coded, and the hysteresis of its Rust port. Misses run on the host."""

from collections.abc import Sequence

from tidesim.policies.composition import Composition, EverySteps, Guard, Refresh, first_ids
from tidesim.policies.interface import Policy
from tidesim.policies.pieces import Lowest, SetOrder, ThisForward, Total


def tide(refresh_interval: int | Sequence[int] = 1) -> Policy:
    """TIDE as published (arXiv 2605.20179v1, algorithm 1): hottest host expert for coldest device expert.

    A counter per layer and expert adds up the tokens routed to it. Every τ denoising steps, counted from each block's
    first step, the hottest expert on the host changes places with the coldest one on the device, and so on for
    as long as the one on the host is strictly hotter.

    What the paper leaves open is decided here: the counter covers every forward of the run (it is not cleared between
    blocks or sequences, and the refreshing forward's own routing is in it), and the first residents are ids 0..B-1, as
    in the released code. The published engine has no KV cache, hence no prefill and no commit forwards; here
    they are counted but never refresh. Ties: among equally hot host experts and among equally cold device
    experts the lower id goes first.

    Parameters
    ----------
    refresh_interval : τ >= 1, one number or one per layer.
    """
    hits = Total()
    hotter = Guard(is_strict=True)
    swaps = Refresh(EverySteps(refresh_interval), hits, Lowest(hits), hotter, is_pairwise=True)
    return Composition("tide", first_ids, refresh=swaps)


def tide_as_coded(refresh_interval: int | Sequence[int] = 1) -> Policy:
    """TIDE as its released code does it (github.com/ims-kdks/TIDE), which differs from the paper in most points.

    It refreshes on each denoising step whose number within its block is a multiple of τ, and on every step of a
    sequence's first decoded block. A refresh looks at this forward's counts alone: the targets are the (at most) B
    experts with most tokens, those without any left out. Absent targets are promoted, most tokens first. As many
    residents that are no targets are evicted: the first ones in the iteration order of a CPython set, so neither counts
    nor recency decide; see `pieces.SetOrder`.

    The first residents are ids 0..B-1. The released code has no KV cache, hence no prefill and no commit forwards, and
    counts every row of its window; here such forwards never refresh. Ties: PyTorch's top-k leaves the order of equal
    counts open; here the lower id comes first.

    Parameters
    ----------
    refresh_interval : τ >= 1 (`jump_steps` there), one number or one per layer.
    """
    trigger = EverySteps(refresh_interval, first_block=True)
    return Composition("tide-as-coded", first_ids, refresh=Refresh(trigger, ThisForward(), SetOrder()))
