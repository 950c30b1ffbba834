"""What a plan is to achieve, in the words of whoever asks, and what that means for a programme and for a run."""

from collections.abc import Callable
from dataclasses import dataclass

from tidesim.errors import PlanError
from tidesim.planner.integer_programme import Aim
from tidesim.planner.plan_fields import OBJECTIVES
from tidesim.planner.runs import Case, Outcome

# How one run is ranked against another: first whether it does what is asked, then by how much.
Rank = tuple[bool, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is wanted, and what is demanded besides.

    Parameters
    ----------
    name : one of `OBJECTIVES`.
    tok_per_s : the least throughput; what "memory" is about.
    block_s : seconds that no block may exceed, whatever is wanted.

    Raise PlanError if the name is unknown, a number is not > 0, or "memory" has no throughput to keep.
    """

    name: str = "throughput"
    tok_per_s: float | None = None
    block_s: float | None = None

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise PlanError(f"objective(={self.name!r}) must be one of {', '.join(OBJECTIVES)}.")
        for what, value in (("tok_per_s", self.tok_per_s), ("block_s", self.block_s)):
            if value is not None and not 0 < value < float("inf"):
                raise PlanError(f"{what}(={value}) must be > 0 and finite.")
        if (self.name == "memory") != (self.tok_per_s is not None):
            raise PlanError(
                "objective 'memory' is the least memory for a wanted throughput: it needs tok_per_s, and no other "
                "objective takes one."
            )

    def aim(self, generated_tokens: int) -> Aim:
        """What the integer programme is asked, on sequences with so many generated tokens."""
        most_block_ns = None if self.block_s is None else round(1e9 * self.block_s)
        if self.tok_per_s is not None:
            return Aim("slots", round(1e9 * generated_tokens / self.tok_per_s), most_block_ns)
        return Aim("slowest block" if self.name == "latency" else "time", None, most_block_ns)

    def rank(self, case: Case, outcome: Outcome) -> Rank:
        """A run's place: the smaller the better. Of equally good ones, the one with fewer experts on the device."""
        slots, result = float(sum(case.budget)), outcome.result
        slowest_s = outcome.slowest_block_ns / 1e9
        is_short = self.tok_per_s is not None and result.tok_per_s < self.tok_per_s
        is_late = self.block_s is not None and slowest_s > self.block_s
        if is_short or is_late:
            # What comes nearest to the demand.
            return True, slowest_s if is_late else result.makespan_s, result.makespan_s, slots
        if self.name == "memory":
            return False, slots, result.makespan_s, slots
        return False, slowest_s if self.name == "latency" else result.makespan_s, result.makespan_s, slots

    def why_unmet(self, case: Case, outcome: Outcome) -> str:
        """What of the demands a run misses, with what it does instead; empty if nothing."""
        missed = []
        if self.tok_per_s is not None and outcome.result.tok_per_s < self.tok_per_s:
            missed.append(f"{self.tok_per_s:g} tok/s are wanted, {outcome.result.tok_per_s:.4g} are reached")
        if self.block_s is not None and outcome.slowest_block_ns > 1e9 * self.block_s:
            missed.append(
                f"blocks in {self.block_s:g} s are wanted, the slowest takes {outcome.slowest_block_ns / 1e9:.4g} s"
            )
        return " and ".join(missed)


Ranking = Callable[[Case, Outcome], Rank]
