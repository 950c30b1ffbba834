"""TIDE's own way of choosing its refresh interval (arXiv 2605.20179, its cost model), for comparison.

With B experts per layer on the device, a block of T denoising steps and a refresh every tau steps, the paper minimises

    C_io * B * T / tau * (1 - (1 - d)^tau)  +  C_cpu * T * B * f(tau)      over tau = 1 .. T - 1

C_io is the time to bring in one expert, C_cpu the time of one missed expert on the host, d the drift: the share of
the resident set that one step makes obsolete. f grows with the age of the set. The paper profiles them offline and
does not print the form of f. Here, all of it comes from a trace and a profile:

- The wanted set of a step is what the policy holds that refreshes at every step.
- d fits 1 - (1 - d)^tau to the share of the wanted set that has changed after tau steps of the same block.
- f(tau) fits a + b * tau^c, with a, b >= 0 and c in 0..2, to the missed experts per layer and step, over B, if the set
  is tau steps old. It is flat for b = 0, straight for c = 1 and levels off for c < 1.
- C_io and C_cpu come from `tidesim.execution.Costs`, C_cpu as the mean over the experts that a set one step old
  misses. Nothing here knows that copies and host may run beside the device.

Both fits are least squares, weighted by how many pairs of steps stand behind a point. A wanted set with a lasting core
never changes wholly, as the form for d assumes; R squared then says how little it describes the trace.

Letters: F forwards, L MoE layers, E experts per layer, B budget, T denoising steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from tidesim.execution import Costs
from tidesim.planner.candidates import longest_block
from tidesim.policies import Policy, Shape, forwards_of
from tidesim.residency import Residency
from tidesim.windows import spans
from tidesim.workload import ForwardKind, Workload

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    """What a set that is `lag` steps old looks like: shares of B, means over `num_pairs` pairs of steps and layers."""

    lag: int
    num_pairs: int
    replaced: float
    missed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The two fitted curves; R squared is 1 for a perfect fit, 0 for one as good as the mean, less for a worse one.

    `drift` is d; `misses` is (a, b, c) of f(tau) = a + b * tau^c.
    """

    drift: float
    drift_r_squared: float
    misses: tuple[float, float, float]
    misses_r_squared: float

    def replaced(self, lag: float) -> float:
        """1 - (1 - d)^lag."""
        return float(_replaced(self.drift, np.float64(lag)))

    def missed(self, lag: float) -> float:
        """f(lag)."""
        return float(_missed(self.misses, np.float64(lag)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TideProgramme:
    """The fit, and the interval with the least cost.

    Parameters
    ----------
    policy : whose wanted sets drift.
    budget : B.
    interval : the chosen tau; the smallest of equals.
    num_steps : T, the most denoising steps of any block: longer intervals would all mean the same.
    copy_s, host_s : C_io and C_cpu, in seconds per expert.
    lags : what was fitted.
    copy_costs_s, host_costs_s : the two terms for tau = 1, 2, .., of one block and all layers.
    """

    policy: str
    budget: int
    interval: int
    num_steps: int
    copy_s: float
    host_s: float
    lags: tuple[Lag, ...]
    fit: Fit
    copy_costs_s: tuple[float, ...]
    host_costs_s: tuple[float, ...]

    def to_dict(self) -> dict[str, object]:
        """Every field by name."""
        return asdict(self)


def tide_programme(workload: Workload, costs: Costs, policy: Policy, budget: int) -> TideProgramme:
    """Fit and solve TIDE's programme for `policy`, refreshing at every step, with `budget` experts in each layer.

    Raise ValueError if `budget` < 1, as there is no set to refresh then.
    """
    if budget < 1:
        raise ValueError(f"budget(={budget}) must be >= 1.")
    num_steps = longest_block(workload)
    wanted = wanted_sets(workload, policy, budget)
    lags = measure_lags(workload, wanted, budget, num_steps)
    fit = fit_lags(lags)
    copy_s = (costs.promote_ns + costs.evict_ns) / 1e9
    host_s = _host_s(workload, wanted, costs)
    intervals = range(1, max(2, num_steps))
    scale = budget * num_steps * workload.num_layers
    copy_costs = [copy_s * scale / interval * fit.replaced(interval) for interval in intervals]
    host_costs = [host_s * scale * fit.missed(interval) for interval in intervals]
    return TideProgramme(
        policy=policy.name,
        budget=budget,
        interval=best_interval(copy_costs, host_costs),
        num_steps=num_steps,
        copy_s=copy_s,
        host_s=host_s,
        lags=tuple(lags),
        fit=fit,
        copy_costs_s=tuple(copy_costs),
        host_costs_s=tuple(host_costs),
    )


def best_interval(copy_costs: Sequence[float], host_costs: Sequence[float]) -> int:
    """The tau = 1, 2, .. with the least sum of both costs, the smallest of equals."""
    return int(np.argmin(np.add(copy_costs, host_costs))) + 1


# --- what the trace says ---


def wanted_sets(workload: Workload, policy: Policy, budget: int) -> Bools:
    """Who is resident after each forward under `policy`, bool [F, L, E]. No clock is needed to know that."""
    budgets = (budget,) * workload.num_layers
    residency = Residency(workload.num_experts, budgets, policy.initial(Shape(workload.num_experts, budgets)))
    wanted = np.zeros(workload.counts.shape, np.bool_)
    for forward in forwards_of(workload):
        # Counts that are mapped from a file are narrower, and a policy may take them from each other.
        for layer, counts in enumerate(workload.counts[forward.index].astype(np.int32, copy=False)):
            policy.observe(forward, layer, counts, residency.everybody)
            residency.apply(layer, policy.refresh(forward, layer, counts, residency.everybody))
        wanted[forward.index] = residency.everybody
    return wanted


def measure_lags(workload: Workload, wanted: Bools, budget: int, num_steps: int) -> list[Lag]:
    """How the wanted set drifts, and what an old one misses, for each lag of 1 .. T - 1 that occurs in a block."""
    lags = []
    for lag in range(1, num_steps):
        old, new = _step_pairs(workload, lag)
        if not len(old):
            continue
        replaced = missed = 0
        for before, after in _windows(wanted, old, new):
            replaced += int(np.count_nonzero(wanted[after] & ~wanted[before]))
            missed += int(np.count_nonzero((workload.counts[after] > 0) & ~wanted[before]))
        slots = len(old) * workload.num_layers * budget
        lags.append(Lag(lag=lag, num_pairs=len(old), replaced=replaced / slots, missed=missed / slots))
    return lags


def _step_pairs(workload: Workload, lag: int) -> tuple[Ints, Ints]:
    """Forwards that are `lag` denoising steps apart in one block: the earlier ones, and the later ones."""
    denoise = np.flatnonzero(workload.kind == ForwardKind.DENOISE)
    old, new = denoise[:-lag], denoise[lag:]
    is_pair = (workload.sequence[old] == workload.sequence[new]) & (workload.block[old] == workload.block[new])
    return old[is_pair], new[is_pair]


def _host_s(workload: Workload, wanted: Bools, costs: Costs) -> float:
    """C_cpu: mean seconds on the host per missed expert, when the set is one step old; 0 if none is ever missed."""
    old, new = _step_pairs(workload, 1)
    num_missed = total_ns = 0
    for before, after in _windows(wanted, old, new):
        counts = np.where(wanted[before], 0, workload.counts[after])  # [pairs, L, E], rows of missed experts
        num_missed += int(np.count_nonzero(counts))
        pairs = counts.sum(axis=2, dtype=np.int64)
        rows = np.minimum(workload.tokens[after][:, None], pairs)
        total_ns += int(costs.host_expert_ns[counts].sum()) + int(costs.host_call_ns(rows, pairs).sum())
    return total_ns / num_missed / 1e9 if num_missed else 0.0


def _windows(wanted: Bools, old: Ints, new: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Pairs of forwards, so many at a time as do not take much memory."""
    for span in spans((len(old), *wanted.shape[1:])):
        yield old[span], new[span]


# --- the fits ---


def fit_lags(lags: Sequence[Lag]) -> Fit:
    """Fit d and f. Without any lag, as when every block takes one step, nothing drifts and nothing is missed."""
    if not lags:
        return Fit(drift=0.0, drift_r_squared=1.0, misses=(0.0, 0.0, 1.0), misses_r_squared=1.0)
    lag, weight = _column(lags, "lag"), np.sqrt(_column(lags, "num_pairs"))
    replaced, missed = _column(lags, "replaced"), _column(lags, "missed")

    def off_replaced(d: Floats) -> Floats:
        return weight * (_replaced(float(d[0]), lag) - replaced)

    def off_missed(abc: Floats) -> Floats:
        return weight * (_missed(abc, lag) - missed)

    drift = least_squares(off_replaced, x0=[min(0.9, float(replaced[0]))], bounds=([0.0], [1.0])).x[0]
    start = [float(missed[0]), max(0.0, float(missed[-1] - missed[0])) / lag[-1], 0.7]
    misses = least_squares(off_missed, x0=start, bounds=([0.0, 0.0, 0.0], [np.inf, np.inf, 2.0])).x
    return Fit(
        drift=float(drift),
        drift_r_squared=_r_squared(replaced, _replaced(drift, lag), weight),
        misses=(float(misses[0]), float(misses[1]), float(misses[2])),
        misses_r_squared=_r_squared(missed, _missed(misses, lag), weight),
    )


def _column(lags: Sequence[Lag], name: str) -> Floats:
    return np.array([getattr(lag, name) for lag in lags], np.float64)


def _replaced(drift: float, lag: Floats | np.float64) -> Floats:
    return np.asarray(1.0 - (1.0 - drift) ** lag)


def _missed(misses: Sequence[float] | Floats, lag: Floats | np.float64) -> Floats:
    start, growth, exponent = misses
    return np.asarray(start + growth * lag**exponent)


def _r_squared(measured: Floats, fitted: Floats, weight: Floats) -> float:
    """Share of the weighted variance that the fit explains."""
    mean = np.average(measured, weights=weight**2)
    total = float(np.sum((weight * (measured - mean)) ** 2))
    left = float(np.sum((weight * (measured - fitted)) ** 2))
    if total <= 1e-20 * float(np.sum(weight**2)):
        return 1.0 if left <= 1e-12 * float(np.sum(weight**2)) else 0.0
    return 1.0 - left / total
