"""A study: which cases there are, in which order."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Self

from tidesim.errors import InputError
from tidesim.hardware.reading import read_yaml
from tidesim.policies import parameters_of
from tidesim.study.case import Case
from tidesim.study.reading import Axes, read_axes


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A grid of cases, each there once. Made by `Study.read` or `Study.from_content`, which check everything in it.

    Parameters
    ----------
    cases : in the order of rows: traces, models, bits, machines, executions, policies, budgets, intervals, batch sizes;
        what stands last in a study's list changes last.
    figures : dotted paths of the profile's figures that the study changes anywhere.
    """

    cases: tuple[Case, ...]
    figures: tuple[str, ...]

    @classmethod
    def read(cls, path: str | Path, seed: int | None = None) -> Self:
        """The study in a YAML file; `seed` goes before that of the file.

        Traces, models and profiles are opened and checked. Raise InputError with every problem, a line each:
        `file: message @ $.path`.
        """
        content, duplicates = read_yaml(Path(path), InputError)
        return cls._of(read_axes(content, str(path), seed, duplicates))

    @classmethod
    def from_content(cls, content: object, where: str = "study", seed: int | None = None) -> Self:
        """The study that a nested mapping describes, as `read` does; `where` names it in messages."""
        return cls._of(read_axes(content, where, seed))

    @classmethod
    def _of(cls, axes: Axes) -> Self:
        figures = dict.fromkeys(path for machine in axes.machines for path, _ in machine.changes)
        return cls(cases=tuple({case.key: case for case in _cases(axes)}.values()), figures=tuple(figures))

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the keys of all cases, in order: of every setting and everything that was read."""
        return hashlib.sha256(" ".join(case.key for case in self.cases).encode()).hexdigest()

    def axes(self) -> dict[str, list[str]]:
        """What the study varies, or has just one of: every value of every setting, as text, in order."""
        found: dict[str, dict[str, None]] = {}
        for case in self.cases:
            for name, value in case.settings().items():
                found.setdefault(name, {})[str(value)] = None
        return {name: list(values) for name, values in found.items()}


def _cases(axes: Axes) -> Iterator[Case]:
    """All combinations; policies that never refresh have no interval."""
    networks = product(axes.traces, axes.models, axes.weight_bits)
    for (trace, own), chosen, weight_bits in networks:
        model = (own if chosen is None else chosen).with_weight_bits(weight_bits)
        for machine, execution, (policy, params) in product(axes.machines, axes.executions, axes.policies):
            intervals = axes.intervals if "refresh_interval" in parameters_of(policy) else (None,)
            for budget, interval, batch_size in product(axes.budgets, intervals, axes.batch_sizes):
                yield Case(
                    trace=trace,
                    model=model,
                    machine=machine,
                    execution=execution,
                    policy=policy,
                    params=params,
                    refresh_interval=interval,
                    budget=budget,
                    batch_size=batch_size,
                    rules=axes.rules,
                )
