"""The fields of a plan file, each described once, and the check of a file against them."""

import difflib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tidesim.errors import PlanError
from tidesim.planner.runs import REFRESHING
from tidesim.policies.foresight import Learnt
from tidesim.result import PARTS

FORMAT = "tidesim-plan"
VERSION = 1
OBJECTIVES = {
    "throughput": "most generated tokens per second over all sequences, hence least total time",
    "latency": "the slowest block of any sequence as fast as can be, and then least total time",
    "memory": "fewest experts on the device that still give a wanted throughput",
}
POLICY_NAMES = ("static", *REFRESHING, "lru", "gain")
# Larger than any count or size here can be, and small enough for any JSON reader.
_LARGEST = 2**53
Check = Callable[[object], str | None]


class PlanField(NamedTuple):
    """One field: its dotted path, what is wrong with a value (None: nothing), and what it means, with its unit.

    One that is optional may be left out, and is null then: files from before it was thought of have none.
    """

    path: str
    check: Check
    description: str
    is_optional: bool = False


# --- kinds of values ---


def _text(value: object) -> str | None:
    return None if isinstance(value, str) and value else "must be text"


def _digest(value: object) -> str | None:
    is_digest = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    return None if is_digest else "must be a SHA-256, 64 hex digits in lower case"


def _whole(low: int) -> Check:
    def check(value: object) -> str | None:
        is_whole = isinstance(value, int) and not isinstance(value, bool) and low <= value <= _LARGEST
        return None if is_whole else f"must be a whole number from {low} to 2^53"

    return check


def _number(low: float, high: float = math.inf) -> Check:
    def check(value: object) -> str | None:
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= min(high, _LARGEST):
            return None
        return f"must be a number >= {low:g}" + (f" and <= {high:g}" if high < math.inf else "")

    return check


def _name(allowed: Iterable[str]) -> Check:
    names = tuple(allowed)

    def check(value: object) -> str | None:
        return None if isinstance(value, str) and value in names else f"must be one of {', '.join(names)}"

    return check


def _list(check_item: Check) -> Check:
    def check(value: object) -> str | None:
        if not isinstance(value, list):
            return "must be a list"
        problems = ((index, check_item(item)) for index, item in enumerate(value))
        return next((f"item {index} {problem}" for index, problem in problems if problem), None)

    return check


def _ascending(what: str) -> Check:
    """Whole numbers >= 0, each once."""

    def check(value: object) -> str | None:
        problem = _list(_whole(0))(value)
        if problem or not isinstance(value, list):
            return problem
        is_rising = all(low < high for low, high in itertools.pairwise(value))
        return None if is_rising else f"must be ascending {what}, each once"

    return check


_ids = _ascending("ids")


def _tables(value: object) -> str | None:
    """The tables of `Learnt`, by name."""
    names = sorted(Learnt._fields)
    if not isinstance(value, dict) or sorted(value) != names:
        return f"must be an object with {', '.join(names)}"
    problems = ((name, _list(_list(_finite))(table)) for name, table in sorted(value.items()))
    return next((f"{name} {problem}" for name, problem in problems if problem), None)


def _finite(value: object) -> str | None:
    is_finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return None if is_finite else "must be a finite number"


def _or_null(check_value: Check) -> Check:
    def check(value: object) -> str | None:
        problem = None if value is None else check_value(value)
        return problem and f"{problem}, or null"

    return check


# --- the fields ---


def _prediction(section: str, which: str) -> tuple[PlanField, ...]:
    return (
        PlanField(f"{section}.tok_per_s", _number(0), f"generated tokens per second, {which}"),
        PlanField(f"{section}.makespan_s", _number(0), f"seconds, {which}"),
        PlanField(f"{section}.num_forwards", _whole(1), f"forwards, {which}"),
        PlanField(f"{section}.generated_tokens", _whole(0), f"tokens generated, {which}"),
        PlanField(f"{section}.hit_rate", _number(0, 1), f"share of routed pairs whose expert was resident, {which}"),
        *(PlanField(f"{section}.breakdown_s.{part}", _number(0), f"seconds: {text}") for part, text in PARTS.items()),
    )


FIELDS = (
    PlanField("format", _name([FORMAT]), "says that the file is a plan"),
    PlanField("version", _whole(1), f"of the format; this is {VERSION}"),
    PlanField("model.name", _text, "name of the model"),
    PlanField("model.num_layers", _whole(1), "MoE layers"),
    PlanField("model.num_experts", _whole(1), "experts of a layer"),
    PlanField("model.expert_bytes", _whole(1), "bytes of one expert"),
    PlanField("model.fingerprint", _digest, "of all sizes of the model"),
    PlanField("hardware.name", _text, "name of the machine's profile"),
    PlanField("hardware.device_memory_bytes", _whole(1), "bytes of device memory"),
    PlanField("hardware.fingerprint", _digest, "of all figures of the profile"),
    PlanField("trace.model", _text, "name of the model whose routing was recorded"),
    PlanField("trace.origin", _name(["recorded", "imported", "synthetic"]), "where the trace comes from"),
    PlanField("trace.fingerprint", _digest, "of the trace's routing"),
    PlanField("trace.training", _ids, "numbers of the sequences that the plan was made on"),
    PlanField("trace.profiled", _ids, "of them, those that popularity was counted on while choosing"),
    PlanField("trace.held_out", _ids, "numbers of the sequences that it was scored on"),
    PlanField("objective", _name(OBJECTIVES), "what the plan is best at"),
    PlanField("execution", _text, "how the engine runs a forward"),
    PlanField(
        "context", _name(["block", "full"]), "rows that a forward routes: its block (KV cache), or the prefix too"
    ),
    PlanField("policy", _name(POLICY_NAMES), "who decides which experts are resident"),
    PlanField("budget", _list(_whole(0)), "expert slots on the device, one number per MoE layer"),
    PlanField("refresh_interval", _or_null(_list(_whole(1))), "denoising steps between refreshes, per MoE layer"),
    PlanField(
        "refresh_steps",
        _or_null(_list(_ascending("steps"))),
        "in place of an interval: the denoising steps of a block that are refreshed, per MoE layer",
        is_optional=True,
    ),
    PlanField("learnt", _or_null(_tables), "what policy gain learnt: shares by MoE layer and expert, and weights"),
    PlanField("placement", _or_null(_list(_ids)), "ids of the experts that a static policy keeps, per MoE layer"),
    PlanField("miss_rule", _name(["host", "fetch", "split"]), "missed experts run on the host, are fetched, or both"),
    PlanField("max_tokens", _whole(1), "longest sequence, prompt and answer, that memory was set aside for"),
    PlanField("reserve_bytes", _whole(0), "bytes of device memory left alone"),
    *_prediction("predicted", "predicted on the training sequences that were not profiled"),
    *_prediction("held_out", "predicted on the held-out sequences"),
    PlanField("proof.solver", _text, "which solver"),
    PlanField("proof.status", _name(["optimal", "feasible", "uniform"]), "how far the solver got"),
    PlanField("proof.minimised", _name(["time", "slowest block", "slots"]), "what the solver minimised"),
    PlanField("proof.objective", _number(0), "the best choice in the policy's table: seconds, or slots"),
    PlanField("proof.bound", _number(0), "no choice in the policy's table comes to less"),
    PlanField("proof.gap", _number(0, 1), "(objective - bound) / objective"),
    PlanField("tide_code.max_gpu_experts_per_layer", _whole(0), "the budget in the released TIDE code's terms"),
    PlanField("tide_code.jump_steps", _whole(1), "the interval in the released TIDE code's terms"),
    PlanField("tide_code.derivation", _text, "how these two came about"),
    PlanField("seed", _whole(0), "of the split into training and held-out sequences"),
    PlanField("tool_version", _text, "of tidesim"),
)
_NULLABLE_SECTIONS = ("held_out",)


# --- reading ---


def read_json(path: Path) -> object:
    """What the file holds. Raise PlanError if it cannot be read, is no JSON, or names a key twice."""
    try:
        return json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_each_once, parse_constant=_refuse_constant
        )
    except OSError as error:
        raise PlanError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: is not a plan, which is JSON ({error}).") from None


def read_fields(content: object, where: str) -> dict[str, Any]:
    """`content`, once every field of `FIELDS` is there and fine, and no other.

    Raise PlanError with every problem, a line each: `where: message @ $.path`.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PlanError(f"{where}: is not a plan: format must be {FORMAT!r}; make one with `tidesim plan --out FILE`.")
    if content.get("version") != VERSION:
        found = repr(content.get("version"))
        raise PlanError(f"{where}: version(={found:.20}) must be {VERSION}, all that this tidesim knows; plan again.")
    problems = [f"{where}: {problem}" for problem in (*_field_problems(content), *_unknown(content, "$", ()))]
    if problems:
        raise PlanError("\n".join(problems))
    return content


def _field_problems(content: Mapping[str, Any]) -> Iterator[str]:
    reported: set[str] = set()
    for field in FIELDS:
        *sections, name = field.path.split(".")
        node: Any = content
        path = "$"
        for section in sections:
            path += f".{section}"
            node = node.get(section)
            if not isinstance(node, dict):
                break
        if isinstance(node, dict):
            is_there = name in node or field.is_optional
            problem = field.check(node.get(name)) if is_there else f"is missing: {field.description}"
            if problem:
                shown = f"(={node[name]!r:.40})" if name in node else ""
                yield f"{name}{shown} {problem} @ {path}.{name}"
        elif path not in reported and not (node is None and path[2:] in _NULLABLE_SECTIONS):
            reported.add(path)
            yield f"must be an object with its fields, not {node!r:.40} @ {path}"


def _unknown(node: Mapping[str, Any], path: str, sections: tuple[str, ...]) -> Iterator[str]:
    """A problem for each key that is no field and no section."""
    depth = len(sections)
    below = [field.path.split(".") for field in FIELDS if tuple(field.path.split(".")[:depth]) == sections]
    known = {parts[depth]: len(parts) > depth + 1 for parts in below if len(parts) > depth}
    for key, value in node.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            yield f"there is no field {key!r:.60}{hint} @ {path}"
        elif known[key] and isinstance(value, dict):
            yield from _unknown(value, f"{path}.{key}", (*sections, key))


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"stands twice: {', '.join(twice)}")
    return content


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")
