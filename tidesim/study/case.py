"""One cell of a study: what is run on what, as values, and the names under which a row states them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tidesim.execution import Execution
from tidesim.hardware import Hardware
from tidesim.moe import MoEConfig
from tidesim.result import tool_version
from tidesim.workload import Context

Scalar = str | int | float | bool | None
LARGEST = "largest"  # the budget that fits, as a study writes it


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSource:
    """A trace of a study, checked when the study was read.

    Parameters
    ----------
    name : as the study has it. file : where that is.
    sequences, corpus : sequences that are run, and those that policies may learn from before.
    """

    name: str
    file: Path
    fingerprint: str
    origin: str
    model_name: str
    sequences: tuple[int, ...]
    corpus: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine of a study: a profile, some of its figures changed.

    Parameters
    ----------
    profile : as the study has it.
    changes : (dotted path, value in the unit of that key) of the figures that differ from the profile.
    hardware : the changed machine.
    """

    profile: str
    changes: tuple[tuple[str, float], ...]
    hardware: Hardware

    @property
    def label(self) -> str:
        """Its name, and what was changed: what rows and tables call it."""
        return ", ".join((self.hardware.name, *(f"{path}={value:g}" for path, value in self.changes)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What holds for all cases of a study.

    Parameters
    ----------
    held_out_share : of a trace's sequences, the share that is run; policies may learn from the others before. With 0
        all are run, and known before.
    seed : of the draw of the sequences.
    reserve_bytes, is_memory_checked : see `simulate`.
    """

    held_out_share: float = 0.25
    seed: int = 0
    reserve_bytes: int | None = None
    is_memory_checked: bool = True


class Routing(NamedTuple):
    """What cases must agree in to share one workload: counts are made once for all of them."""

    trace: TraceSource
    context: Context
    num_layers: int
    batch_size: int

    @property
    def key(self) -> str:
        """A name for it that is the same in every process."""
        stated = [self.trace.name, self.trace.fingerprint, self.trace.sequences, self.trace.corpus]
        return _digest([*stated, self.context, self.num_layers, self.batch_size])


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run of a study.

    Parameters
    ----------
    model : whose sizes are used.
    params : (name, value) pairs of the policy's own parameters, by name; the interval is none of them.
    refresh_interval : None for policies that never refresh.
    budget : slots of each layer; None for the largest budget that fits.
    key : SHA-256 (32 hex digits) of every setting and fingerprint: the same for the same case in every study.
    """

    trace: TraceSource
    model: MoEConfig
    machine: Machine
    execution: Execution
    policy: str
    params: tuple[tuple[str, Scalar], ...]
    refresh_interval: int | None
    budget: int | None
    batch_size: int
    rules: Rules
    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", _digest(self.settings()))

    @property
    def routing(self) -> Routing:
        """The workload that the case runs, and shares with others."""
        return Routing(self.trace, self.execution.context, self.model.num_layers, self.batch_size)

    def settings(self) -> dict[str, Scalar]:
        """Everything that decides what comes out, by the names of `columns.SETTINGS`."""
        trace, machine, rules = self.trace, self.machine, self.rules
        return {
            "trace": trace.name,
            "trace_fingerprint": trace.fingerprint,
            "trace_origin": trace.origin,
            "trace_model": trace.model_name,
            "sequences": _listed(trace.sequences),
            "corpus": _listed(trace.corpus),
            "model": self.model.name,
            "weight_bits": self.model.weight_bits,
            "model_fingerprint": model_fingerprint(self.model),
            "machine": machine.label,
            "profile": machine.profile,
            "changes": json.dumps(dict(machine.changes)),
            "machine_fingerprint": machine.hardware.fingerprint,
            "execution": self.execution.name,
            "context": self.execution.context,
            "policy": self.policy,
            "params": json.dumps(dict(self.params)),
            "refresh_interval": self.refresh_interval,
            "budget_asked": LARGEST if self.budget is None else str(self.budget),
            "batch_size": self.batch_size,
            "held_out_share": rules.held_out_share,
            "seed": rules.seed,
            "reserve_bytes": rules.reserve_bytes,
            "is_memory_checked": rules.is_memory_checked,
            "version": tool_version(),
        }


@cache
def model_fingerprint(model: MoEConfig) -> str:
    """SHA-256 (hex) of every size of the network, its name left out."""
    return hashlib.sha256(_canonical({**asdict(model), "name": None})).hexdigest()


def _digest(content: object) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()[:32]


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _listed(sequences: tuple[int, ...]) -> str:
    return " ".join(map(str, sequences))


def figure_of(machine: Machine, path: str) -> float | None:
    """The figure at a dotted path, in the unit of its key; None if the machine has none there."""
    sources: Mapping[str, object] = machine.hardware.sources
    return float(machine.hardware.sources[path].value) if path in sources else None
