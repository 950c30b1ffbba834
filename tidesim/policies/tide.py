"""TIDE, as published and as coded, and the hysteresis of its Rust port. Misses run on the host."""

from collections.abc import Sequence

from tidesim.policies.composition import Composition, Guard, OnSchedule, Refresh, first_ids
from tidesim.policies.interface import Policy
from tidesim.policies.pieces import Arrival, ThisForward, Total
from tidesim.policies.rules import AnySteps, Rule, Schedule
from tidesim.policies.victims import Lowest, SetOrder


def tide(refresh_interval: int | Sequence[int] | None = None, *, refresh_steps: AnySteps | None = None) -> Policy:
    """TIDE as published (arXiv 2605.20179v1, algorithm 1): hottest host expert for coldest device expert.

    A counter per layer and expert adds up the tokens routed to it. Every τ denoising steps, counted from each block's
    first step, the hottest expert on the host changes places with the coldest one on the device, and so on for
    as long as the one on the host is strictly hotter.

    What the paper leaves open is decided here: the counter covers every forward of the run (it is not cleared between
    blocks or sequences, and the refreshing forward's own routing is in it), a sequence's first block is refreshed like
    all others, and the first residents are ids 0..B-1, as in the released code. The published engine has no KV cache,
    hence no prefill and no commit forwards; here they are counted but never refresh. Ties: among equally hot host
    experts and among equally cold device experts the lower id goes first.

    Parameters
    ----------
    refresh_interval : τ >= 1, one number or one per layer; 1 if nothing is said.
    refresh_steps : in place of an interval, the steps of a block to refresh at; see `rules.Schedule`.
    """
    hits = Total()
    hotter = Guard(is_strict=True)
    schedule = Schedule.of(refresh_interval, refresh_steps)
    swaps = Refresh(OnSchedule(schedule), hits, Lowest(hits), hotter, is_pairwise=True)
    return Composition("tide", first_ids, refresh=swaps, rule=Rule("hottest-for-coldest", schedule))


def tide_as_coded(
    refresh_interval: int | Sequence[int] | None = None, *, refresh_steps: AnySteps | None = None
) -> Policy:
    """TIDE as its released code does it (github.com/ims-kdks/TIDE), which differs from the paper in most points.

    It refreshes on each denoising step whose number within its block is a multiple of τ, and on every step of a
    sequence's first decoded block. A refresh looks at this forward's counts alone: the targets are the (at most) B
    experts with most tokens, those without any left out. Absent targets are promoted, most tokens first. As many
    residents that are no targets are evicted: the first ones in the iteration order of a CPython set, so neither counts
    nor recency decide; see `victims.SetOrder`.

    The first residents are ids 0..B-1. The released code has no KV cache, hence no prefill and no commit forwards, and
    counts every row of its window; here such forwards never refresh. Ties: PyTorch's top-k leaves the order of equal
    counts open; here the lower id comes first.

    Parameters
    ----------
    refresh_interval : τ >= 1 (`jump_steps` there), one number or one per layer; 1 if nothing is said.
    refresh_steps : in place of an interval, the steps of a block to refresh at; see `rules.Schedule`.
    """
    schedule = Schedule.of(refresh_interval, refresh_steps, first_block=True)
    refresh = Refresh(OnSchedule(schedule), ThisForward(), SetOrder())
    return Composition("tide-as-coded", first_ids, refresh=refresh, rule=Rule("top-counts", schedule))


def rlx(
    refresh_interval: int | Sequence[int] | None = None,
    margin: float = 0.0,
    min_dwell: int = 0,
    *,
    refresh_steps: AnySteps | None = None,
) -> Policy:
    """TIDE's port to Rust (rlx-runtime 0.2.16, `ExpertPool`), as coded: small gains and newcomers are left alone.

    It refreshes when `tide_as_coded` does, and wants the same experts: those with most tokens of this forward. Absent
    ones come in hottest first. Each takes the slot of the next resident that is not wanted: fewest tokens first, then
    who has been there longest, then the lower id. A resident younger than `min_dwell` refreshes is passed over for this
    refresh. The first challenger that is not hot enough for its victim, or finds none, ends the refresh.

    Without margin and dwell (the default there too) the original evicts in the order of a Rust hash set, which is
    another one in each process; here the order is the same as with them. It does nothing where all experts have slots,
    and neither does this. As in `tide_as_coded`, prefill and commit forwards never refresh, and the first residents are
    ids 0..B-1, there from refresh 0 on. Refreshes are counted through all sequences of a run. Ties among wanted
    experts: the lower id first.

    Parameters
    ----------
    refresh_interval : τ >= 1 (`jump_steps` there), one number or one per layer; 1 if nothing is said.
    margin : a challenger must have (1 + margin) times its victim's tokens at least. Raise InputError if it is negative.
    min_dwell : refreshes that a resident must have been there for, that of its eviction counted. Raise InputError
        likewise.
    refresh_steps : in place of an interval, the steps of a block to refresh at; see `rules.Schedule`.
    """
    counts = ThisForward()
    trigger = OnSchedule(Schedule.of(refresh_interval, refresh_steps, first_block=True))
    guard = Guard(margin=margin, min_dwell=min_dwell)
    return Composition("rlx", first_ids, refresh=Refresh(trigger, counts, Lowest(counts, Arrival()), guard))
