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
never changes wholly, as the form for d assumes; R squared then says how little it describes the trace. What other
sequences would have given is in `tide_bands`, and whether what the programme rests on is so in `tide_assumptions`.

Letters: S sequences, A lags, L MoE layers, E experts per layer, B budget, T denoising steps, N samples.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from tidesim import replay
from tidesim.execution import Costs
from tidesim.planner.candidates import longest_block
from tidesim.planner.curves import fit_drift, fit_misses, missed_after, r_squared, replaced_after
from tidesim.planner.resampling import draw
from tidesim.planner.tide_assumptions import Assumption, assumptions_of
from tidesim.planner.tide_bands import Bands, bands_of
from tidesim.planner.tide_samples import Curves, Points, Samples
from tidesim.policies import Policy
from tidesim.workload import Workload

_NUM_RESAMPLES = 400


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
        return float(replaced_after(self.drift, lag))

    def missed(self, lag: float) -> float:
        """f(lag)."""
        return float(missed_after(self.misses, lag))


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
    bands : how sure all that is; None if nothing drifts, or for a single sequence, which shows no spread.
    assumptions : what the programme rests on, and whether it is so; none if nothing drifts.
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
    bands: Bands | None
    assumptions: tuple[Assumption, ...]

    def to_dict(self) -> dict[str, object]:
        """Every field by name."""
        return asdict(self)


def tide_programme(
    workload: Workload,
    costs: Costs,
    policy: Policy,
    budget: int,
    *,
    num_resamples: int = _NUM_RESAMPLES,
    seed: int = 0,
) -> TideProgramme:
    """Fit and solve TIDE's programme for `policy`, refreshing at every step, with `budget` experts in each layer.

    `num_resamples` other traces are drawn with `seed` for the bands. Raise ValueError if `budget` < 1, as there is no
    set to refresh then.
    """
    if budget < 1:
        raise ValueError(f"budget(={budget}) must be >= 1.")
    num_steps = longest_block(workload)
    samples = measure(workload, costs, policy, budget, max(0, num_steps - 1))
    points = samples.all_layers(np.ones((1, samples.num_sequences)))
    copy_s, num_slots = (costs.promote_ns + costs.evict_ns) / 1e9, budget * workload.num_layers
    lags = lags_of(points)
    curves = Curves.of(points)
    copy_costs, host_costs = (term[0] for term in curves.costs_s(copy_s, num_slots, num_steps))
    times = draw(samples.num_sequences, num_resamples, seed) if lags and samples.num_sequences > 1 else None
    bands = None
    if times is not None:
        resampled = Curves.of(samples.all_layers(times))
        chosen = resampled.best(copy_s, num_slots, num_steps).tolist()
        bands = bands_of(points, curves, resampled, chosen, copy_costs + host_costs, samples.num_sequences)
    return TideProgramme(
        policy=policy.name,
        budget=budget,
        interval=best_interval(copy_costs.tolist(), host_costs.tolist()),
        num_steps=num_steps,
        copy_s=copy_s,
        host_s=float(points.host_s[0]),
        lags=lags,
        fit=fit_lags(lags),
        copy_costs_s=tuple(copy_costs.tolist()),
        host_costs_s=tuple(host_costs.tolist()),
        bands=bands,
        assumptions=assumptions_of(samples, times, points, curves, copy_s, num_steps) if lags else (),
    )


def best_interval(copy_costs: Sequence[float], host_costs: Sequence[float]) -> int:
    """The tau = 1, 2, .. with the least sum of both costs, the smallest of equals."""
    return int(np.argmin(np.add(copy_costs, host_costs))) + 1


# --- what the trace says ---


def measure(workload: Workload, costs: Costs, policy: Policy, budget: int, num_lags: int) -> Samples:
    """How the wanted set drifts, and what an old one misses, by sequence, lag and layer.

    The wanted set of a step is who is resident after it under `policy`; no clock is needed to know that.
    """
    drift = replay.drift_of(workload, policy, (budget,) * workload.num_layers, costs, num_lags)
    return Samples(drift.num_pairs, drift.replaced, drift.missed, drift.late_ns, budget)


def lags_of(points: Points) -> tuple[Lag, ...]:
    """The lags of the first sample that occur in a block."""
    columns = zip(*(column[0].tolist() for column in points[:3]), strict=True)
    return tuple(
        Lag(lag=lag, num_pairs=round(num_pairs), replaced=replaced, missed=missed)
        for lag, (num_pairs, replaced, missed) in enumerate(columns, start=1)
        if num_pairs
    )


def fit_lags(lags: Sequence[Lag]) -> Fit:
    """Fit d and f. Without any lag, as when every block takes one step, nothing drifts and nothing is missed."""
    if not lags:
        return Fit(drift=0.0, drift_r_squared=1.0, misses=(0.0, 0.0, 1.0), misses_r_squared=1.0)
    names = ("lag", "num_pairs", "replaced", "missed")
    lag, weight, replaced, missed = (np.array([getattr(point, name) for point in lags], np.float64) for name in names)
    drift = float(fit_drift(lag, replaced[None], weight[None])[0])
    misses = fit_misses(lag, missed[None], weight[None])[0]
    start, growth, exponent = misses.tolist()
    return Fit(
        drift=drift,
        drift_r_squared=r_squared(replaced, replaced_after(drift, lag), weight),
        misses=(start, growth, exponent),
        misses_r_squared=r_squared(missed, missed_after(misses, lag), weight),
    )
