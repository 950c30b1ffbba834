"""How well predictions and measurements of a grid agree."""

import csv
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case, predicted and measured.

    Parameters
    ----------
    measured_tok_per_s : median of the repeats. spread : (largest - smallest) / median of them.
    error : predicted / measured - 1.
    steady_tok_per_s, steady_spread, steady_error : the same with each measurement brought to the speed that the machine
        had when it was calibrated, by what a yardstick said beside it; see `tidesim.engine.yardstick`.
    num_differences : decisions (one a forward and layer) in which engine and simulator disagree, over all repeats.
    measured_parts_s, predicted_parts_s : where the time goes; the measured ones of the repeat nearest to the median.
    """

    case: str
    policy: str
    budget: int | tuple[int, ...]
    refresh_interval: int | tuple[int, ...] | None
    predicted_tok_per_s: float
    measured_tok_per_s: float
    repeats_tok_per_s: tuple[float, ...]
    spread: float
    error: float
    steady_tok_per_s: float
    steady_spread: float
    steady_error: float
    hit_rate: float
    promotions: int
    num_differences: int
    measured_parts_s: dict[str, float]
    predicted_parts_s: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """All rows of a grid, and how well they agree."""

    rows: list[Row]
    machine: str
    model: str
    trace_origin: str
    profile: str
    num_forwards: int
    seed: int

    def agreement(self, is_steady: bool) -> dict[str, float]:
        """Median and largest absolute error, rank correlation (Kendall's tau), and the median spread of repeats.

        Two cases are told apart if they are further from each other than the mean of their spreads; of all pairs,
        `num_told_apart` are, and `ranked_alike` is the share of these that predictions rank as measurements do (1 if
        there are none). `is_steady` takes the measurements as brought to one speed of the machine.
        """
        prefix = "steady_" if is_steady else ""
        errors = [abs(getattr(row, f"{prefix}error")) for row in self.rows]
        measured = [row.steady_tok_per_s if is_steady else row.measured_tok_per_s for row in self.rows]
        predicted = [row.predicted_tok_per_s for row in self.rows]
        spreads = [getattr(row, f"{prefix}spread") for row in self.rows]
        are_alike = [
            (measured[i] - measured[j]) * (predicted[i] - predicted[j]) > 0
            for i, j in combinations(range(len(self.rows)), 2)
            if abs(measured[i] - measured[j]) > (spreads[i] * measured[i] + spreads[j] * measured[j]) / 2
        ]
        return {
            "median_error": float(np.median(errors)),
            "worst_error": max(errors),
            "kendall_tau": float(kendalltau(predicted, measured).statistic) if len(self.rows) > 1 else 1.0,
            "num_told_apart": len(are_alike),
            "ranked_alike": sum(are_alike) / len(are_alike) if are_alike else 1.0,
            "median_spread": float(np.median(spreads)),
        }

    @property
    def num_differences(self) -> int:
        """Decisions in which engine and simulator disagree."""
        return sum(row.num_differences for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, ready for JSON."""
        about = ("machine", "model", "trace_origin", "profile", "num_forwards", "seed", "num_differences")
        return {
            **{name: getattr(self, name) for name in about},
            **self.agreement(is_steady=False),
            "steady": self.agreement(is_steady=True),
            "num_cases": len(self.rows),
            "rows": [asdict(row) for row in self.rows],
        }

    def save_csv(self, path: Path) -> None:
        """One line a case; parts are columns."""
        records = []
        for row in self.rows:
            record = asdict(row)
            record["repeats_tok_per_s"] = " ".join(f"{value:.6g}" for value in row.repeats_tok_per_s)
            for side in ("measured", "predicted"):
                parts = record.pop(f"{side}_parts_s")
                record |= {f"{side}_{part}_s": seconds for part, seconds in parts.items()}
            records.append(record)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
