"""The plan as a value and as a file: JSON that an engine loads, checked field by field.

`plan_fields.FIELDS` describes every field of the file once; reading and checking are driven from it. A plan says what
to do (policy, budgets, intervals, placement), for which model and machine, and what came out when it was simulated.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from tidesim.errors import PlanError
from tidesim.execution import GIB
from tidesim.hardware import Hardware
from tidesim.moe import MoEConfig
from tidesim.planner.integer_programme import SolverReport
from tidesim.planner.plan_fields import FORMAT, OBJECTIVES, VERSION, read_fields, read_json
from tidesim.planner.runs import REFRESHING
from tidesim.policies import MissAction, Policy, policy
from tidesim.policies.foresight import NUM_FEATURES, NUM_SITUATIONS, Learnt
from tidesim.residency import Placement
from tidesim.result import RunResult


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """Which model a plan is for. `fingerprint` covers every size, `expert_bytes` also says how wide the weights are."""

    name: str
    num_layers: int
    num_experts: int
    expert_bytes: int
    fingerprint: str

    @classmethod
    def of(cls, model: MoEConfig) -> Self:
        """The sizes of `model`. Its name is not part of the fingerprint: a folder may be called anything."""
        return cls(
            name=model.name,
            num_layers=model.num_layers,
            num_experts=model.num_experts,
            expert_bytes=model.expert_bytes,
            fingerprint=hashlib.sha256(json.dumps(model.sizes(), sort_keys=True).encode()).hexdigest(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Which machine a plan is for."""

    name: str
    device_memory_bytes: int
    fingerprint: str

    @classmethod
    def of(cls, hardware: Hardware) -> Self:
        """What identifies `hardware`."""
        return cls(
            name=hardware.name, device_memory_bytes=hardware.device.memory_bytes, fingerprint=hardware.fingerprint
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Which trace a plan was made from, and how its sequences were split; the words are those of `Split`."""

    model: str
    origin: str
    fingerprint: str
    training: tuple[int, ...]
    profiled: tuple[int, ...]
    held_out: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What simulating the plan on some sequences came to; the words are those of `RunResult`."""

    tok_per_s: float
    makespan_s: float
    num_forwards: int
    generated_tokens: int
    hit_rate: float
    breakdown_s: Mapping[str, float] = field(hash=False)

    @classmethod
    def of(cls, result: RunResult) -> Self:
        """The part of a result that a plan keeps."""
        return cls(
            tok_per_s=result.tok_per_s,
            makespan_s=result.makespan_s,
            num_forwards=result.num_forwards,
            generated_tokens=result.generated_tokens,
            hit_rate=result.hit_rate,
            breakdown_s=result.breakdown_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """How good the programme's choice is among those in the table of its policy; the words are those of `SolverReport`.

    Times are sums over the table's sequences. Whole runs may have led from this choice to another one.
    """

    solver: str
    status: str
    minimised: str
    objective: float
    bound: float
    gap: float

    @classmethod
    def of(cls, report: SolverReport) -> Self:
        """The part of a solver's report that a plan keeps."""
        return cls(
            solver=report.solver,
            status=report.status,
            minimised=report.minimised,
            objective=report.objective,
            bound=report.bound,
            gap=report.gap,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TideCode:
    """The nearest thing to a plan that the released TIDE code can be told: two numbers, and how they came about."""

    max_gpu_experts_per_layer: int
    jump_steps: int
    derivation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do with a model's experts on a machine. See `plan_fields.FIELDS` for what each field means.

    Raise PlanError with everything that contradicts itself.
    """

    model: ModelSizes
    hardware: Machine
    trace: Routing
    objective: str
    execution: str
    context: str
    policy: str
    budget: tuple[int, ...]
    refresh_interval: tuple[int, ...] | None
    refresh_steps: tuple[tuple[int, ...], ...] | None = None
    placement: Placement | None
    learnt: Learnt | None
    miss_rule: MissAction
    max_tokens: int
    reserve_bytes: int
    predicted: Prediction
    held_out: Prediction | None
    proof: Proof
    tide_code: TideCode
    seed: int
    tool_version: str

    def __post_init__(self) -> None:
        problems = _contradictions(self)
        if problems:
            raise PlanError("\n".join(f"plan: {problem}" for problem in problems))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan. Raise PlanError with every problem, a line each: `file: message @ $.path`."""
        values = read_fields(read_json(Path(path)), str(path))
        try:
            return cls.from_values(values)
        except PlanError as error:
            raise PlanError(str(error).replace("plan:", f"{path}:")) from None

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """The plan with these fields, as nested mappings of the right types. Raise PlanError as the class does."""
        placement, held_out = values["placement"], values["held_out"]
        steps, learnt = values.get("refresh_steps"), values["learnt"]
        return cls(
            model=ModelSizes(**values["model"]),
            hardware=Machine(**values["hardware"]),
            trace=Routing(**{key: _frozen(value) for key, value in values["trace"].items()}),
            objective=values["objective"],
            execution=values["execution"],
            context=values["context"],
            policy=values["policy"],
            budget=tuple(values["budget"]),
            refresh_interval=_frozen(values["refresh_interval"]),
            refresh_steps=None if steps is None else tuple(map(tuple, steps)),
            placement=None if placement is None else Placement.from_json(placement),
            learnt=None if learnt is None else _learnt(learnt),
            miss_rule=values["miss_rule"],
            max_tokens=values["max_tokens"],
            reserve_bytes=values["reserve_bytes"],
            predicted=Prediction(**values["predicted"]),
            held_out=None if held_out is None else Prediction(**held_out),
            proof=Proof(**values["proof"]),
            tide_code=TideCode(**values["tide_code"]),
            seed=values["seed"],
            tool_version=values["tool_version"],
        )

    def to_dict(self) -> dict[str, object]:
        """The content of the file."""
        content = {"format": FORMAT, "version": VERSION} | asdict(self)
        return content | {
            "placement": None if self.placement is None else self.placement.to_json(),
            "learnt": None if self.learnt is None else self.learnt._asdict(),
        }

    def save(self, path: str | Path) -> None:
        """Write the plan; the same plan gives the same file. Raise PlanError if it cannot be written."""
        lines = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in self.to_dict().items()]
        try:
            Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        except OSError as error:
            raise PlanError(f"{path}: cannot be written ({error.strerror}).") from None

    def make_policy(self) -> Policy:
        """A new policy object that does what the plan says, for a simulator or an engine."""
        if self.refresh_steps is not None:
            return policy(self.policy, refresh_steps=self.refresh_steps)
        if self.learnt is not None:
            return policy(self.policy, corpus=self.learnt)
        popularity = np.zeros((self.model.num_layers, self.model.num_experts), np.int64)
        if self.placement is not None:
            for layer, experts in enumerate(self.placement.experts):
                popularity[layer, list(experts)] = 1
        if self.policy == "static":
            return policy(self.policy, popularity=popularity)
        params = {} if self.refresh_interval is None else {"refresh_interval": self.refresh_interval}
        return policy(self.policy, **params)

    def check(self, model: MoEConfig, hardware: Hardware | None = None) -> None:
        """Raise PlanError, with the reason, if the plan was made for other sizes of model or of device memory."""
        mine, theirs = self.model, ModelSizes.of(model)
        for name in ("num_layers", "num_experts", "expert_bytes", "fingerprint"):
            if getattr(mine, name) != getattr(theirs, name):
                what = f"{name} is {getattr(mine, name)} in the plan and {getattr(theirs, name)} in {theirs.name}"
                what = "sizes outside the experts differ" if name == "fingerprint" else what
                raise PlanError(f"the plan was made for {mine.name}, not for {theirs.name}: {what}; plan again for it.")
        if hardware is not None and hardware.device.memory_bytes != self.hardware.device_memory_bytes:
            planned, there = self.hardware.device_memory_bytes / GIB, hardware.device.memory_bytes / GIB
            raise PlanError(
                f"the plan was made for the {planned:.2f} GiB of device memory of {self.hardware.name}, "
                f"and {hardware.name} has {there:.2f} GiB; plan again for it."
            )


def _learnt(tables: Mapping[str, Any]) -> Learnt:
    return Learnt(**{name: tuple(map(tuple, table)) for name, table in tables.items()})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _contradictions(plan: Plan) -> list[str]:
    """What cannot be true of a plan whose fields are each fine."""
    num_layers, num_experts = plan.model.num_layers, plan.model.num_experts
    problems = []

    def refuse(is_wrong: bool, message: str, path: str) -> None:
        if is_wrong:
            problems.append(f"{message} @ $.{path}")

    wrong_length = f"must have one number for each of the {num_layers} layers"
    refuse(len(plan.budget) != num_layers, wrong_length, "budget")
    refuse(max(plan.budget, default=0) > num_experts, f"must be at most num_experts(={num_experts})", "budget")
    refuse(plan.objective not in OBJECTIVES, f"must be one of {', '.join(OBJECTIVES)}", "objective")
    if plan.policy in REFRESHING and plan.refresh_steps is not None:
        wrong_steps = f"must have one list for each of the {num_layers} layers"
        refuse(len(plan.refresh_steps) != num_layers, wrong_steps, "refresh_steps")
        refuse(plan.refresh_interval is not None, "must be null beside refresh_steps", "refresh_interval")
    elif plan.policy in REFRESHING:
        refuse(len(plan.refresh_interval or ()) != num_layers, wrong_length, "refresh_interval")
        refuse(min(plan.refresh_interval or (1,)) < 1, "must be >= 1", "refresh_interval")
    else:
        never = f"must be null, {plan.policy!r} never refreshes"
        refuse(plan.refresh_interval is not None, never, "refresh_interval")
        refuse(plan.refresh_steps is not None, never, "refresh_steps")
    if plan.policy == "static":
        placement = plan.placement.experts if plan.placement is not None else ()
        fits = tuple(map(len, placement)) == plan.budget
        refuse(not fits, "must name as many experts in each layer as its budget", "placement")
        highest = max((ids[-1] for ids in placement if ids), default=0)
        refuse(highest >= num_experts, f"must hold ids below num_experts(={num_experts})", "placement")
    else:
        refuse(plan.placement is not None, f"must be null, {plan.policy!r} starts by its own rule", "placement")
    refuse(bool(set(plan.trace.training) & set(plan.trace.held_out)), "must not share a sequence", "trace")
    refuse((plan.held_out is None) != (not plan.trace.held_out), "must be there with held-out sequences", "held_out")
    if plan.policy == "gain":
        refuse(plan.learnt is None, "must say what policy 'gain' learnt", "learnt")
        shapes = {len(table) for table in (plan.learnt or ((), ()))[:2]}
        widths = {len(row) for table in (plan.learnt or ((), ()))[:2] for row in table}
        is_shaped = shapes == {num_layers} and widths == {num_experts}
        refuse(not is_shaped, "must have a share for each expert of each layer", "learnt")
        weights = plan.learnt.weights if plan.learnt is not None else ()
        is_weighed = len(weights) == NUM_SITUATIONS and {len(row) for row in weights} == {NUM_FEATURES}
        refuse(not is_weighed, f"must have {NUM_SITUATIONS} rows of {NUM_FEATURES} weights", "learnt.weights")
    else:
        refuse(plan.learnt is not None, f"must be null, {plan.policy!r} learns nothing", "learnt")
    miss_rule = {"lru": "fetch", "gain": "split"}.get(plan.policy, "host")
    refuse(plan.miss_rule != miss_rule, f"must be {miss_rule!r} for policy {plan.policy!r}", "miss_rule")
    return problems
