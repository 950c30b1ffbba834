"""The runs of a validation: every case measured several times, and simulated on the very routing that was run.

Measurements go in rounds over all cases, in another order each round, so that a machine that drifts spreads over all of
them alike. Where the device is made of cores, their speed is measured before and after each run, and the prediction is
also made for that speed. The engine's decisions are compared with the simulator's one by one.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

from tidesim.engine.choice import Choice
from tidesim.engine.generate import Sampler
from tidesim.engine.live import LiveModel
from tidesim.engine.session import Session
from tidesim.engine.tokenizer import Prompt
from tidesim.engine.yardstick import Speed, Yardstick
from tidesim.errors import InputError
from tidesim.execution import Execution
from tidesim.hardware import Hardware
from tidesim.result import Decision, RunResult
from tidesim.simulator import simulate
from tidesim.trace import Trace
from tidesim.validate.agreement import Row, Validation
from tidesim.validate.grid import Case
from tidesim.workers import Progress
from tidesim.workload import Workload


class Source(Protocol):
    """The forwards that every case of a validation runs."""

    workload: Workload

    def run(self, session: Session) -> RunResult:
        """Run them all in `session`."""


class ForcedSource:
    """The first forwards of a trace, with their recorded choice of experts."""

    def __init__(self, session: Session, trace: Trace, sequences: Sequence[int], num_forwards: int | None) -> None:
        self._trace, self._sequences, self._num_forwards = trace, sequences, num_forwards
        self.workload = session.forced_workload(trace, sequences, num_forwards)

    def run(self, session: Session) -> RunResult:
        """See `Source`."""
        return session.replay(self._trace, self._sequences, self._num_forwards).result


class PromptSource:
    """Prompts that a model answers. Text does not depend on placement, so all cases route alike: as recorded first."""

    def __init__(
        self, session: Session, folder: Path, prompts: Sequence[Prompt], sampler: Sampler, recording: Path
    ) -> None:
        self._folder, self._prompts, self._sampler = folder, prompts, sampler
        session.answer(folder, prompts, sampler, record=recording, overwrite=True)
        with Trace.open(recording) as trace:
            self.workload = trace.workload(session.choice.execution.context)

    def run(self, session: Session) -> RunResult:
        """See `Source`."""
        return session.answer(self._folder, self._prompts, self._sampler).result


class Log:
    """Measurements on disk as they come, one JSON object a line, so that a run that was stopped goes on from there.

    `setting` says what they are measurements of. Raise InputError if the file holds those of another one.
    """

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self._path = path
        self._runs: dict[tuple[str, int], dict[str, Any]] = {}
        if not path.is_file():
            self._write(setting)
            return
        try:
            first, *records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self._runs = {(record["case"], record["repeat"]): record for record in records}
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: is no log of measurements; remove it or name another folder.") from None
        if first != setting:
            raise InputError(f"{path}: holds measurements of another setting; name another folder or remove it.")

    def __contains__(self, pair: tuple[Case, int]) -> bool:
        return (pair[0].label, pair[1]) in self._runs

    def __getitem__(self, pair: tuple[Case, int]) -> dict[str, Any]:
        return self._runs[pair[0].label, pair[1]]

    def add(self, case: Case, repeat: int, result: RunResult, num_differences: int, speed: Speed | None) -> None:
        """Keep one measurement, and how fast the machine was beside it."""
        record = {
            "case": case.label,
            "repeat": repeat,
            "tok_per_s": result.tok_per_s,
            "parts_s": result.breakdown_s,
            "num_differences": num_differences,
            "speed": speed,
        }
        self._runs[case.label, repeat] = record
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def validate(
    live: LiveModel,
    source: Source,
    cases: Sequence[Case],
    execution: Execution,
    hardware: Hardware,
    log_file: Path,
    *,
    machine: str,
    repeats: int,
    seed: int,
    progress: Progress | None = None,
) -> Validation:
    """Measure and simulate every case; what `log_file` holds already is not measured again.

    Parameters
    ----------
    execution : how the engine is asked to run.
    hardware : the profile that predictions are made with, and that policies decide by that go by predicted times.
    machine : what results call the machine.

    Raise InputError if there is nothing to measure, or `log_file` holds measurements of another setting.
    """
    if not cases or repeats < 1:
        raise InputError(f"repeats(={repeats}) must be >= 1 and there must be a case to measure, not {len(cases)}.")
    workload = source.workload
    choices = {case.label: case.choice(live, execution, workload, hardware) for case in cases}
    if {choice.execution.context for choice in choices.values()} != {workload.context}:
        raise InputError("the plan runs in the other context than the grid; give --execution as the plan has it.")
    simulated = {label: predict(live, workload, hardware, choice) for label, choice in choices.items()}
    setting = {
        "machine": machine,
        "model": live.sizes.name,
        "routing": workload.fingerprint,
        "seed": seed,
        "num_forwards": workload.num_forwards,
        "execution": choices[cases[0].label].execution.name,
    }
    if not all(choice.policy.is_routing_only for choice in choices.values()):
        setting["decided_by"] = hardware.fingerprint  # with another profile they run otherwise
    log = Log(log_file, setting)

    def measure(case: Case, decisions: Callable[[Decision], None] | None = None) -> RunResult:
        return source.run(Session(live, choices[case.label], machine=machine, seed=seed, decisions=decisions))

    rounds = [
        (cases[number], repeat)
        for repeat in range(repeats)
        for number in np.random.default_rng([seed, repeat]).permutation(len(cases))
    ]
    missing = [pair for pair in rounds if pair not in log]
    yardstick = None if live.cores is None else Yardstick(live.sizes, live.cores, seed)
    if missing:
        measure(missing[0][0])  # the first run meets cold memory; it is thrown away
    before = None if yardstick is None else yardstick.measure()
    for done, (case, repeat) in enumerate(missing, start=1 + len(rounds) - len(missing)):
        decisions: list[Decision] = []
        result = measure(case, decisions.append)
        differences = _num_differences(decisions, simulated[case.label][1])
        if yardstick is None or before is None:
            speed = None
        else:
            after = yardstick.measure()
            speed, before = Speed.between(before, after), after
        log.add(case, repeat, result, differences, speed)
        if progress is not None:
            progress(done, len(rounds))

    def at_speed(case: Case, run: dict[str, Any]) -> float:
        """Throughput predicted for the speed that the machine had beside this run."""
        if yardstick is None or run["speed"] is None:
            return simulated[case.label][0].tok_per_s
        profile = yardstick.adjusted(hardware, Speed(*run["speed"]))
        return predict(live, workload, profile, choices[case.label])[0].tok_per_s

    rows = []
    for case in cases:
        runs = [log[case, repeat] for repeat in range(repeats)]
        rows.append(_row(case, simulated[case.label][0], runs, [at_speed(case, run) for run in runs]))
    return Validation(
        rows=rows,
        machine=machine,
        model=simulated[cases[0].label][0].model,
        trace_origin=workload.origin,
        profile=hardware.name,
        num_forwards=workload.num_forwards,
        seed=seed,
    )


def predict(
    live: LiveModel, workload: Workload, hardware: Hardware, choice: Choice
) -> tuple[RunResult, list[Decision]]:
    """What the simulator says of a choice on this routing if the machine is as `hardware` says, and what it decides.

    A policy that decides by predicted times takes them from the choice's own profile, if it has one, as the engine
    does. Raise InputError if sequences run together, as no engine of ours can be measured at that.
    """
    if workload.batch_size > 1:
        raise InputError(
            f"batch_size(={workload.batch_size}) must be 1 for a run that is measured: the live engine runs one "
            "sequence after the other; simulate batches with `tidesim simulate --batch`."
        )
    decisions: list[Decision] = []
    result = simulate(
        workload,
        live.sizes,
        hardware,
        choice.policy,
        budget=choice.budgets,
        execution=choice.execution,
        decisions=decisions.append,
        is_memory_checked=False,
        expected=choice.hardware,
    )
    return result, decisions


def _num_differences(ours: Sequence[Decision], theirs: Sequence[Decision]) -> int:
    unequal = sum(one != other for one, other in zip(ours, theirs, strict=False))
    return unequal + abs(len(ours) - len(theirs))


def _row(case: Case, predicted: RunResult, runs: Sequence[dict[str, Any]], at_speed: Sequence[float]) -> Row:
    rates = [run["tok_per_s"] for run in runs]
    # What each run would have come to at the speed that the profile was calibrated at.
    steady = [rate * predicted.tok_per_s / now for rate, now in zip(rates, at_speed, strict=True)]
    typical = min(runs, key=lambda run: abs(run["tok_per_s"] - median(rates)))
    return Row(
        case=case.label,
        policy=case.policy,
        budget=case.budget,
        refresh_interval=case.refresh_interval,
        predicted_tok_per_s=predicted.tok_per_s,
        measured_tok_per_s=median(rates),
        repeats_tok_per_s=tuple(rates),
        spread=(max(rates) - min(rates)) / median(rates),
        error=predicted.tok_per_s / median(rates) - 1,
        steady_tok_per_s=median(steady),
        steady_spread=(max(steady) - min(steady)) / median(steady),
        steady_error=predicted.tok_per_s / median(steady) - 1,
        hit_rate=predicted.hit_rate,
        promotions=predicted.promotions,
        num_differences=sum(run["num_differences"] for run in runs),
        measured_parts_s=typical["parts_s"],
        predicted_parts_s=predicted.breakdown_s,
    )
