"""How good a plan really is: on sequences that it was not made on, with what other sequences might have given.

A run is cut at the ends of its sequences; it is not run once for each of them. Residents and counters stay from one
sequence to the next, as they do in an engine that serves them one after another, and the times of the sequences add up
to the very run that is reported. What a sequence inherits from the one before it is taken for part of its own time.

Sequences are then drawn again, the same ones for all runs that are compared: a long answer is long for both, so what
remains is what one run does better. Up to `resampling.FEW` of them, resamples show hardly more than these few, and
intervals come from Student's t on the logarithm of the ratio of sums, linearised: wide, but over 4000 draws as in
`resampling` they cover 92 to 94 %, of 2 sequences too, where percentiles cover 50 %. One sequence has no interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, log

import numpy as np
import numpy.typing as npt

from tidesim.ceiling import Ceiling
from tidesim.planner.resampling import FEW, LEVEL, Interval, draw, intervals_of

Floats = npt.NDArray[np.float64]

NUM_RESAMPLES = 2_000


@dataclass(frozen=True, slots=True)
class Sample:
    """A run by its sequences: how long each took, in ns, and how many tokens it generated.

    Raise ValueError if there is no sequence, a time is not > 0, or there is no token at all.
    """

    times_ns: tuple[int, ...]
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.times_ns or len(self.times_ns) != len(self.tokens):
            raise ValueError(f"{len(self.times_ns)} times and {len(self.tokens)} counts of tokens: one of each is due.")
        if min(self.times_ns) <= 0 or min(self.tokens) < 0 or not sum(self.tokens):
            raise ValueError("times_ns must be > 0 and tokens >= 0, and there must be some.")

    @property
    def num_sequences(self) -> int:
        """Sequences of the run."""
        return len(self.tokens)

    @property
    def tok_per_s(self) -> float:
        """Tokens over the seconds of the whole run."""
        return sum(self.tokens) / (sum(self.times_ns) / 1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The throughput of a run, and where that of runs on other such sequences lies; None for one sequence."""

    tok_per_s: float
    interval: Interval | None
    num_sequences: int

    def to_dict(self) -> dict[str, object]:
        """Every field by name, and the sentence."""
        return asdict(self) | {"sentence": self.sentence}

    @property
    def sentence(self) -> str:
        """The score in words."""
        value = f"{self.tok_per_s:.2f} tok/s"
        if self.interval is None:
            return f"{value} on one sequence, so there is no interval"
        low, high = self.interval.low, self.interval.high
        return f"{value}, {_level(self.interval)} interval {low:.2f} to {high:.2f}{_over(self.num_sequences)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantage:
    """How much faster one run is than another on the same sequences.

    Parameters
    ----------
    over : the other one's name.
    gain : the ratio of the throughputs, less 1. interval : where it lies; None for one sequence.
    is_told_apart : whether the interval is on one side of 0; None without one.
    """

    over: str
    gain: float
    interval: Interval | None
    is_told_apart: bool | None
    num_sequences: int

    def to_dict(self) -> dict[str, object]:
        """Every field by name, and the sentence."""
        return asdict(self) | {"sentence": self.sentence}

    @property
    def sentence(self) -> str:
        """The advantage in words."""
        way = "faster" if self.gain >= 0 else "slower"
        by = f"{way} than {self.over} by {100 * abs(self.gain):.1f} %"
        if self.interval is None:
            return f"{by} on one sequence, so nobody knows if that is noise"
        low, high = 100 * self.interval.low, 100 * self.interval.high
        within = f"{_level(self.interval)} interval {low:+.1f} to {high:+.1f} %{_over(self.num_sequences)}"
        if self.is_told_apart:
            return f"{by}, {within}: not noise"
        return f"cannot be told apart from {self.over}: {100 * self.gain:+.1f} %, {within}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """What a plan loses to the best of its family, chosen in hindsight on the same sequences.

    Parameters
    ----------
    best : who that is, and `best_tok_per_s`. num_cases : in the family, the plan not counted.
    regret : 1 less the plan's throughput over the best one's; below 0 if the plan beats them all.
    """

    best: str
    best_tok_per_s: float
    num_cases: int
    regret: float

    def to_dict(self) -> dict[str, object]:
        """Every field by name, and the sentence."""
        return asdict(self) | {"sentence": self.sentence}

    @property
    def sentence(self) -> str:
        """The regret in words."""
        of = f"of {self.num_cases} choice{'s' * (self.num_cases != 1)} tried on the same sequences"
        if self.regret <= 0:
            return f"no regret: none {of} is faster (the best, {self.best}, {self.best_tok_per_s:.2f} tok/s)"
        return (
            f"{100 * self.regret:.1f} % slower than the best {of}, known only in hindsight: "
            f"{self.best}, {self.best_tok_per_s:.2f} tok/s"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far a run is from a bound that no policy beats.

    Parameters
    ----------
    ceiling_tok_per_s : the bound. distance : 1 less the run's throughput over it.
    is_settled, num_iterations : whether the bound was followed to its end, and how far; see `ceiling.Ceiling`.
    is_pooled : whether the bound is for slots that all layers share.
    """

    ceiling_tok_per_s: float
    distance: float
    is_settled: bool
    num_iterations: int
    is_pooled: bool

    def to_dict(self) -> dict[str, object]:
        """Every field by name, and the sentence."""
        return asdict(self) | {"sentence": self.sentence}

    @property
    def sentence(self) -> str:
        """The distance in words."""
        slots = "however slots are spread over the layers" if self.is_pooled else "with the same slots in each layer"
        cut = "" if self.is_settled else f"; stopped at its time limit after {self.num_iterations} iterations, so loose"
        value = f"{self.ceiling_tok_per_s:.2f} tok/s"
        return f"{100 * self.distance:.1f} % below the ceiling of {value}, which no policy beats {slots}{cut}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """All that is said of a plan on the same sequences; `regret` and `ceiling` are None where nobody asked."""

    score: Score
    advantages: tuple[Advantage, ...]
    regret: Regret | None
    ceiling: Distance | None

    def to_dict(self) -> dict[str, object]:
        """Every part by name, with its sentence."""
        return {
            "score": self.score.to_dict(),
            "advantages": [one.to_dict() for one in self.advantages],
            "regret": None if self.regret is None else self.regret.to_dict(),
            "ceiling": None if self.ceiling is None else self.ceiling.to_dict(),
        }


def judge(
    plan: Sample,
    rivals: Mapping[str, Sample],
    *,
    family: Mapping[str, Sample] | None = None,
    ceiling: Ceiling | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Judgement:
    """`plan` against each of `rivals`, the best of `family` in hindsight, and the `ceiling`.

    Raise ValueError if they did not all run the same sequences, or `family` is empty.
    """
    return Judgement(
        score=score(plan, num_resamples=num_resamples, seed=seed),
        advantages=tuple(
            advantage(plan, rival, name, num_resamples=num_resamples, seed=seed) for name, rival in rivals.items()
        ),
        regret=None if family is None else regret(plan, family),
        ceiling=None if ceiling is None else distance(plan, ceiling),
    )


def score(run: Sample, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Score:
    """The throughput of a run with its interval."""
    tokens, times_s = np.array(run.tokens, np.float64), np.array(run.times_ns, np.float64) / 1e9
    return Score(
        tok_per_s=run.tok_per_s,
        interval=ratio_interval(tokens, times_s, num_resamples, seed),
        num_sequences=run.num_sequences,
    )


def advantage(
    ours: Sample, theirs: Sample, over: str, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Advantage:
    """How much faster `ours` is than `theirs`, which is called `over`.

    Raise ValueError if they did not run the same sequences.
    """
    if ours.tokens != theirs.tokens:
        raise ValueError(f"{over} has tokens(={theirs.tokens}), not {ours.tokens}: runs of the same sequences are due.")
    # The same tokens, so the ratio of throughputs is that of times.
    us, them = np.array(ours.times_ns, np.float64), np.array(theirs.times_ns, np.float64)
    ratio = ratio_interval(them, us, num_resamples, seed)
    interval = None if ratio is None else Interval(ratio.low - 1, ratio.high - 1, ratio.level)
    return Advantage(
        over=over,
        gain=float(them.sum() / us.sum()) - 1,
        interval=interval,
        is_told_apart=None if interval is None else 0.0 not in interval,
        num_sequences=ours.num_sequences,
    )


def regret(plan: Sample, family: Mapping[str, Sample]) -> Regret:
    """What `plan` loses to the fastest of `family`, of equals the first. Raise ValueError if that is empty."""
    if not family:
        raise ValueError("there must be a case to compare with in hindsight.")
    best = max(family, key=lambda name: family[name].tok_per_s)
    return Regret(
        best=best,
        best_tok_per_s=family[best].tok_per_s,
        num_cases=len(family),
        regret=1 - plan.tok_per_s / family[best].tok_per_s,
    )


def distance(run: Sample, ceiling: Ceiling) -> Distance:
    """How far `run` is below `ceiling`, the bound for its own sequences, costs and budgets."""
    return Distance(
        ceiling_tok_per_s=ceiling.tok_per_s,
        distance=1 - run.tok_per_s / ceiling.tok_per_s,
        is_settled=ceiling.is_settled,
        num_iterations=ceiling.num_iterations,
        is_pooled=ceiling.is_pooled,
    )


# --- intervals of a ratio of sums ---


def ratio_interval(above: Floats, below: Floats, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Interval | None:
    """Where sum(above) / sum(below) lies, both [S] > 0 or with a sum > 0, over other sequences; None for one.

    It does not matter in which order the sequences are given.
    """
    num_sequences = len(above)
    if num_sequences < 2:
        return None
    if num_sequences <= FEW:
        return _by_students_t(above, below)
    order = np.lexsort((above, below))
    times = draw(num_sequences, num_resamples, seed)
    some = times @ above[order] > 0
    ratios = (times[some] @ above[order]) / (times[some] @ below[order])
    return intervals_of(ratios[:, None], num_sequences)[0]


def _by_students_t(above: Floats, below: Floats) -> Interval:
    """On the logarithm of the ratio, which each sequence moves by its share of the one sum less that of the other."""
    from scipy import special  # it takes a while to import

    num_sequences = len(above)
    moves = above / above.sum() - below / below.sum()
    spread = float(np.sqrt(num_sequences / (num_sequences - 1) * np.sum(np.sort(moves**2))))
    reach = float(special.stdtrit(num_sequences - 1, (1 + LEVEL) / 2)) * spread
    middle = log(above.sum() / below.sum())
    return Interval(exp(middle - reach), exp(middle + reach))


def _level(interval: Interval) -> str:
    return f"{100 * interval.level:.0f} %"


def _over(num_sequences: int) -> str:
    return f" (wide, as there are {num_sequences} sequences only)" if num_sequences <= FEW else ""


def sample_of(times_ns: Sequence[int], tokens: Sequence[int]) -> Sample:
    """A sample of any two sequences of numbers, such as those of `timing.timed_by_sequence` and of a trace."""
    return Sample(tuple(int(time_ns) for time_ns in times_ns), tuple(int(count) for count in tokens))
