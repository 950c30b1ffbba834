"""From the text of a study to the parts of its grid, with every problem named at once."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter
from itertools import product
from math import prod
from typing import Any, Literal, TypeGuard, TypeVar, get_args, get_origin

from tidesim.errors import InputError, nearest_name
from tidesim.execution import GIB, Execution, execution
from tidesim.hardware import Hardware, load_hardware
from tidesim.hardware.keys import show
from tidesim.moe import MoEConfig, load_moe_config
from tidesim.planner import split_sequences
from tidesim.policies import parameters_of
from tidesim.policies.knowledge import PREDICTORS
from tidesim.study.case import LARGEST, Machine, Rules, Scalar, TraceSource
from tidesim.trace import Trace

# Key of a study -> what it holds. The first three must be there.
KEYS = {
    "traces": "routing traces: paths, or names of shipped ones",
    "machines": "profiles: paths, or shipped names; or {profile: ..., figures: {dotted path: [values]}}",
    "policies": "policies by name; or {name: ..., and its parameters}",
    "models": "models whose sizes are used: folders, or shipped names; each trace's own if left out",
    "weight_bits": "bits a weight of the routed experts: 16, 8, 4",
    "executions": "presets of how the software runs",
    "budgets": f"experts a layer on the device: whole numbers, or {LARGEST!r} for what fits",
    "intervals": "denoising steps between refreshes, for policies that refresh",
    "batch_sizes": "sequences decoded side by side",
    "held_out_share": "share of the sequences to run; policies may learn from the others before",
    "seed": "of the draw of the sequences",
    "reserve_gib": "device memory to leave free, in GiB; by default 1.5 or a tenth, whichever is more",
    "ignore_memory": "true: do not ask whether the device can hold it",
}
REQUIRED = ("traces", "machines", "policies")
DEFAULTS: Mapping[str, Sequence[object]] = {
    "weight_bits": [16],
    "executions": ["overlapped"],
    "budgets": [LARGEST],
    "intervals": [1, 2, 4, 8, 16, 32],
    "batch_sizes": [1],
}
MAX_CASES = 1_000_000
MAX_MACHINES = 10_000
# What a policy learns comes from the sequences that are not run, and intervals are an axis of their own.
_NOT_PARAMS = {
    "corpus": "is learnt from the sequences that are not run; set held_out_share",
    "popularity": "is learnt from the sequences that are not run; set held_out_share",
    "refresh_interval": "stands under intervals, for all policies that refresh",
}
_TIMES = re.compile(r"x(\d+(?:\.\d+)?)")

Value = TypeVar("Value")
PolicyChoice = tuple[str, tuple[tuple[str, Scalar], ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """The axes of a grid, checked; see `KEYS`. A model is None for the trace's own, a budget for what fits."""

    traces: Sequence[tuple[TraceSource, MoEConfig]]
    machines: Sequence[Machine]
    policies: Sequence[PolicyChoice]
    models: Sequence[MoEConfig | None]
    weight_bits: Sequence[int]
    executions: Sequence[Execution]
    budgets: Sequence[int | None]
    intervals: Sequence[int]
    batch_sizes: Sequence[int]
    rules: Rules


def read_axes(content: object, where: str, seed: int | None = None, problems: Sequence[str] = ()) -> Axes:
    """The axes that `content`, the mapping of a study, describes; `seed` goes before its own.

    Raise InputError with `problems` and all others found, a line each: `where: message @ $.path`.
    """
    if not isinstance(content, Mapping):
        raise InputError(f"{where}: must be a mapping with the keys of a study, not {show(content)} @ $")
    reader = _Reader(content, list(problems))
    reader.keys()
    rules = reader.rules(seed)
    axes = Axes(
        traces=reader.each("traces", lambda item, path: reader.trace(item, path, rules)),
        machines=[machine for found in reader.each("machines", reader.machines) for machine in found],
        policies=reader.each("policies", reader.policy),
        models=reader.each("models", reader.model) if "models" in content else [None],
        weight_bits=reader.each("weight_bits", reader.weight_bits),
        executions=reader.each("executions", reader.execution),
        budgets=reader.each("budgets", reader.budget),
        intervals=reader.each("intervals", lambda item, path: reader.whole(item, path, 1)),
        batch_sizes=reader.each("batch_sizes", reader.batch_size),
        rules=rules,
    )
    reader.distinct_machines(axes.machines)
    reader.size(axes)
    if reader.problems:
        raise InputError("\n".join(f"{where}: {problem}" for problem in reader.problems))
    return axes


class _ItemError(Exception):
    """An item cannot be used; the problem is reported already."""


@dataclass(slots=True)
class _Reader:
    """Walks the content of one study and gathers every problem with its path."""

    content: Mapping[object, object]
    problems: list[str] = field(default_factory=list)

    def wrong(self, message: str, path: str) -> _ItemError:
        """Report a problem; gives what to raise where the item cannot be used."""
        self.problems.append(f"{'; '.join(message.splitlines())} @ {path}")
        return _ItemError()

    def keys(self) -> None:
        """Report unknown keys, and required ones that are missing."""
        for name in self.content:
            if name not in KEYS:
                self.wrong(f"unknown key {_short(name)!r}; {nearest_name(_short(name), KEYS)}", f"$.{_short(name)}")
        for name in REQUIRED:
            if name not in self.content:
                self.wrong(f"required key missing: {KEYS[name]}", f"$.{name}")

    def each(self, name: str, read: Callable[[object, str], Value]) -> list[Value]:
        """What `read` makes of each item of the list `name`, as far as they can be used."""
        if name not in self.content and name in REQUIRED:
            return []
        listed = self.content[name] if name in self.content else DEFAULTS[name]
        return self.items(listed, f"$.{name}", KEYS[name], read)

    def items(self, listed: object, path: str, meaning: str, read: Callable[[object, str], Value]) -> list[Value]:
        """What `read` makes of each item of a list, as far as they can be used."""
        if not isinstance(listed, list | tuple) or not listed:
            found = "an empty one" if isinstance(listed, list | tuple) else show(listed)
            self.wrong(f"must be a list ({meaning}), not {found}", path)
            return []
        made = []
        for index, item in enumerate(listed):
            try:
                made.append(read(item, f"{path}[{index}]"))
            except _ItemError:
                continue
            except InputError as error:
                self.wrong(str(error), f"{path}[{index}]")
        return made

    # --- items of the axes ---

    def text(self, value: object, path: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(f"must be text and not empty, not {show(value)}", path)
        return value

    def whole(self, value: object, path: str, least: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise self.wrong(f"must be a whole number from {least} to 2147483647, not {show(value)}", path)
        return value

    def trace(self, value: object, path: str, rules: Rules) -> tuple[TraceSource, MoEConfig]:
        name = self.text(value, path)
        with Trace.open(name) as opened:
            split = split_sequences(len(opened.sequences), rules.held_out_share, rules.seed)
            source = TraceSource(
                name=name,
                file=opened.path.resolve(),
                fingerprint=opened.fingerprint,
                origin=opened.origin,
                model_name=opened.model_name,
                sequences=split.held_out or split.training,
                corpus=split.training,
            )
            return source, opened.config

    def machines(self, value: object, path: str) -> list[Machine]:
        """The machines of one entry: a profile as it is, or one for each combination of figures."""
        if not isinstance(value, Mapping):
            name = self.text(value, path)
            return [Machine(profile=name, changes=(), hardware=load_hardware(name))]
        self.known(value, ("profile", "figures"), path)
        if "profile" not in value:
            raise self.wrong("required key missing: the profile, a path or a shipped name", f"{path}.profile")
        name = self.text(value["profile"], f"{path}.profile")
        machine, figures = load_hardware(name), value.get("figures", {})
        if not isinstance(figures, Mapping):
            raise self.wrong(f"must be a mapping {{dotted path: [values]}}, not {show(figures)}", f"{path}.figures")
        axes = [self.figure(machine, key, listed, f"{path}.figures") for key, listed in figures.items()]
        num_machines = prod(map(len, axes))
        if num_machines > MAX_MACHINES:
            raise self.wrong(f"makes {num_machines} machines; at most {MAX_MACHINES} are allowed, so split it", path)
        return [_changed(name, machine, changes) for changes in product(*axes)]

    def known(self, node: Mapping[Any, object], names: Sequence[str], path: str) -> None:
        for name in node:
            if name not in names:
                way_out = nearest_name(_short(name), names)
                self.wrong(f"unknown key {_short(name)!r}; {way_out}", f"{path}.{_short(name)}")

    def figure(self, machine: Hardware, key: object, listed: object, path: str) -> list[tuple[str, float]]:
        """The values of one figure of `machine`, each with its dotted path."""
        here = f"{path}.{_short(key)}"
        if not isinstance(key, str) or key not in machine.sources:
            self.wrong(
                f"{machine.name} has no figure {_short(key)!r}; {nearest_name(_short(key), machine.sources)}", here
            )
            return []
        own = machine.sources[key].value

        def value(item: object, at: str) -> tuple[str, float]:
            times = _TIMES.fullmatch(item) if isinstance(item, str) else None
            number = float(times[1]) * own if times else item
            if not _is_number(number):
                raise self.wrong(f"must be a number, or text such as x2 for twice its own, not {show(item)}", at)
            machine.replace_figure(key, number)
            return key, number

        return self.items(listed, here, "values of this figure", value)

    def policy(self, value: object, path: str) -> PolicyChoice:
        if not isinstance(value, Mapping):
            name = self.text(value, path)
            parameters_of(name)
            return name, ()
        if "name" not in value:
            raise self.wrong("required key missing: the name of the policy", f"{path}.name")
        name = self.text(value["name"], f"{path}.name")
        accepted = parameters_of(name)
        params = {key: item for key, item in value.items() if key != "name"}
        before = len(self.problems)
        for key, item in params.items():
            here = f"{path}.{_short(key)}"
            if key in _NOT_PARAMS and key in accepted:
                self.wrong(f"{key} {_NOT_PARAMS[str(key)]}", here)
            elif key not in accepted or key in _NOT_PARAMS:
                names = [param for param in accepted if param not in _NOT_PARAMS]
                way_out = nearest_name(_short(key), names) if names else "it takes none."
                self.wrong(f"policy {name!r} takes no parameter {_short(key)!r}; {way_out}", here)
            elif problem := _param_problem(accepted[str(key)], item):
                self.wrong(f"{problem}, not {show(item)}", here)
        if len(self.problems) > before:
            raise _ItemError
        return name, tuple(sorted((str(key), item) for key, item in params.items()))

    def model(self, value: object, path: str) -> MoEConfig:
        return load_moe_config(self.text(value, path))

    def weight_bits(self, value: object, path: str) -> int:
        if not isinstance(value, int) or value not in (16, 8, 4):
            raise self.wrong(f"must be 16, 8 or 4, not {show(value)}", path)
        return value

    def execution(self, value: object, path: str) -> Execution:
        return execution(self.text(value, path))

    def budget(self, value: object, path: str) -> int | None:
        if value == LARGEST:
            return None
        if isinstance(value, str):
            raise self.wrong(f"must be a whole number of experts a layer, or {LARGEST!r}, not {show(value)}", path)
        return self.whole(value, path, 0)

    def batch_size(self, value: object, path: str) -> int:
        return self.whole(value, path, 1)

    # --- what holds for all cases ---

    def rules(self, seed: int | None) -> Rules:
        share = self.number("held_out_share", 0.25, "must be a share >= 0 and < 1", lambda value: 0 <= value < 1)
        drawn = self.one("seed", 0, lambda value, path: self.whole(value, path, 0))
        reserve = self.number("reserve_gib", None, "must be a number of GiB >= 0", lambda value: 0 <= value < 1e6)
        ignores = self.content.get("ignore_memory", False)
        if not isinstance(ignores, bool):
            self.wrong(f"must be true or false, not {show(ignores)}", "$.ignore_memory")
        return Rules(
            held_out_share=0.25 if share is None else share,
            seed=drawn if seed is None else seed,
            reserve_bytes=None if reserve is None else round(reserve * GIB),
            is_memory_checked=ignores is not True,
        )

    def one(self, name: str, default: Value, read: Callable[[object, str], Value]) -> Value:
        if name not in self.content:
            return default
        try:
            return read(self.content[name], f"$.{name}")
        except _ItemError:
            return default

    def number(self, name: str, default: float | None, rule: str, is_allowed: Callable[[float], bool]) -> float | None:
        def read(value: object, path: str) -> float:
            if not _is_number(value) or not is_allowed(value):
                raise self.wrong(f"{rule}, not {show(value)}", path)
            return float(value)

        return self.one(name, default, read)

    # --- the grid as a whole ---

    def distinct_machines(self, machines: Sequence[Machine]) -> None:
        """Report two machines that would go by one name: tables could not tell them apart."""
        seen: dict[str, Machine] = {}
        for machine in machines:
            other = seen.setdefault(machine.label, machine)
            if other.hardware.fingerprint != machine.hardware.fingerprint:
                names = f"{other.profile!r} and {machine.profile!r}"
                self.wrong(
                    f"{names} are different machines called {machine.label!r}; rename one, or change it by more",
                    "$.machines",
                )

    def size(self, axes: Axes) -> None:
        others = (axes.traces, axes.models, axes.weight_bits, axes.machines, axes.executions, axes.policies)
        num_cases = prod(map(len, (*others, axes.budgets, axes.intervals, axes.batch_sizes)))
        if num_cases > MAX_CASES:
            self.wrong(f"the grid has up to {num_cases} cases; at most {MAX_CASES} are run, so split it", "$")


def _changed(profile: str, machine: Hardware, changes: Sequence[tuple[str, float]]) -> Machine:
    """`machine` with those figures changed that differ from its own."""
    differing = tuple((path, value) for path, value in changes if value != machine.sources[path].value)
    for path, value in differing:
        machine = machine.replace_figure(path, value)
    return Machine(profile=profile, changes=differing, hardware=machine)


def _param_problem(param: Parameter, value: object) -> str | None:
    """What is wrong with `value` for a parameter of a policy, by its annotation; its range the policy knows."""
    if param.name == "predictor":
        return None if value in PREDICTORS else f"must be one of {', '.join(PREDICTORS)}"
    allowed = list(_allowed(param.annotation))
    is_whole = isinstance(value, int) and _is_number(value)
    fits = {bool: isinstance(value, bool), int: is_whole, float: _is_number(value), None: value is None}
    if any(fits[item] if item in fits else isinstance(value, str) and value == item for item in allowed):
        return None
    names = {bool: "true or false", int: "a whole number", float: "a number", None: "nothing"}
    return f"must be {' or '.join(names.get(item, str(item)) for item in allowed)}"


def _allowed(annotation: Any) -> Iterator[Any]:
    """The types and literal values of an annotation."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_args(annotation):
        for part in get_args(annotation):
            yield from _allowed(part)
    else:
        yield None if annotation is type(None) else annotation


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is one that can be worked with; NaN fails the comparison too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _short(name: object) -> str:
    """A key as messages show it."""
    text = name if isinstance(name, str) else show(name)
    return text if len(text) <= 60 else f"{text[:60]}..."
