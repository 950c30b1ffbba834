"""A plan in the words of other engines: the published TIDE code, llama.cpp, KTransformers, and lists of pinned experts.

None of them can do all that a plan may say. Each export states what it keeps and what it loses, and how many of the
plan's expert slots it fills; a plan that an engine cannot be told at all is refused.

Who is on the device is a part of static plans only. To pin experts for a plan that moves them, the export needs routing
to say who is popular. Layers of other engines count the dense ones too, so the plan's model must be known as well.

Letters: L MoE layers, E experts per layer.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from tidesim.errors import PlanError
from tidesim.moe import MoEConfig, load_moe_config
from tidesim.planner import Plan
from tidesim.policies import Shape, policy
from tidesim.residency import Placement
from tidesim.trace import Trace
from tidesim.workload import Workload

FORMATS = ("tide", "llama.cpp", "ktransformers", "pins")
# The end of the names of one layer's expert tensors, as `--n-cpu-moe` of llama.cpp finds them (common/common.h).
_EXPERT_TENSORS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A plan as another engine takes it.

    Parameters
    ----------
    format : one of `FORMATS`.
    text : what is typed, pasted or saved.
    values : the same for programs.
    slots, planned_slots : expert slots that the engine fills, and those of the plan, over all layers.
    kept, lost : what of the plan the engine does, and what it does not; a sentence each.
    """

    format: str
    text: str
    values: Mapping[str, object] = field(hash=False)
    slots: int
    planned_slots: int
    kept: tuple[str, ...]
    lost: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """All of it, ready for `json.dumps`."""
        return asdict(self)


# --- what a plan does not hold ---


def model_of(plan: Plan, name: str | None = None) -> MoEConfig:
    """The model that `plan` was made for, at its width of expert weights: the one called `name`, else by its own name.

    Raise ModelError if there is no such model, PlanError if it is not the plan's.
    """
    model = load_moe_config(plan.model.name if name is None else name)
    widths = (model.with_weight_bits(weight_bits) for weight_bits in (16, 8, 4))
    model = next((one for one in widths if one.expert_bytes == plan.model.expert_bytes), model)
    plan.check(model)
    return model


def routing_for(plan: Plan, trace: Trace) -> Workload:
    """The routing by which experts of `plan` are pinned: of the sequences it was made on, or of all of another trace.

    Raise PlanError if `trace` routes to another number of experts.
    """
    if trace.num_experts != plan.model.num_experts:
        raise PlanError(
            f"{trace.path} routes to {trace.num_experts} experts a layer and {plan.model.name} has "
            f"{plan.model.num_experts}; give a trace of a model with as many."
        )
    is_own = trace.fingerprint == plan.trace.fingerprint
    sequences = plan.trace.training if is_own else None
    return trace.workload("block" if plan.context == "block" else "full", sequences).tiled(plan.model.num_layers)


def pinned(plan: Plan, routing: Workload | None = None) -> Placement:
    """Who stays on the device for good: a static plan's own placement, else the most popular experts of `routing`.

    Each layer has as many as its budget. Raise PlanError if the plan is not static and there is no routing, or it is
    static and there is some.
    """
    if plan.placement is not None:
        if routing is not None:
            raise PlanError("the plan is static and names its experts itself; leave the trace out.")
        return plan.placement
    if routing is None:
        raise PlanError(
            f"policy {plan.policy!r} moves experts while it runs, so the plan does not say who is on the device; give "
            "--trace TRACE to pin the experts that are most popular in it."
        )
    _check_routing(plan, routing)
    popularity = routing.counts.sum(axis=0, dtype=np.int64)
    return policy("static", popularity=popularity).initial(Shape(plan.model.num_experts, plan.budget))


def _check_routing(plan: Plan, routing: Workload) -> None:
    shape, wanted = routing.counts.shape[1:], (plan.model.num_layers, plan.model.num_experts)
    if shape != wanted:
        raise PlanError(f"the routing has layers and experts {shape}, and the plan {wanted}; take `routing_for`.")


# --- the formats ---


def to_tide(plan: Plan) -> Export:
    """The arguments of the published TIDE code (github.com/ims-kdks/TIDE), which runs LLaDA2.0 and nothing else.

    Kept are one budget for all layers and one refresh interval, the nearest to the plan's; see `Plan.tide_code`.
    """
    budget, steps = plan.tide_code.max_gpu_experts_per_layer, plan.tide_code.jump_steps
    values = {"predictive_expert_offload": True, "max_gpu_experts_per_layer": budget, "jump_steps": steps}
    arguments = ", ".join(f"{name}={value}" for name, value in values.items())
    lost = []
    if len(set(plan.budget)) > 1:
        lost.append("Budgets that differ by layer: that code has one for all.")
    if len(set(plan.refresh_interval or ())) > 1:
        lost.append("Refresh intervals that differ by layer: that code has one for all.")
    if plan.refresh_steps is not None:
        lost.append("Refresh steps that are no multiples of an interval: that code knows nothing else.")
    if plan.policy != "tide-as-coded":
        lost.append(
            f"Policy {plan.policy!r}: that code refreshes by its own rule, on each block's first step at least."
        )
    if plan.placement is not None:
        lost.append("Which experts are on the device: that code starts with the first ids of each layer.")
    if plan.miss_rule != "host":
        lost.append("Missed experts are fetched in the plan; that code computes them on the host.")
    if plan.execution != "tide-as-coded":
        lost.append(
            f"Execution {plan.execution!r}: that code runs its own way, so the predicted throughput is not its."
        )
    lost.append("Memory: that code lowers the budget if less than it needs is free after a reserve of its own.")
    return Export(
        format="tide",
        text=f"model.enable_predictive_expert_offload({arguments})",
        values=values,
        slots=budget * len(plan.budget),
        planned_slots=sum(plan.budget),
        kept=(f"{plan.tide_code.derivation}.",),
        lost=tuple(lost),
    )


def to_llama_cpp(plan: Plan, model: MoEConfig, routing: Workload | None = None) -> Export:
    """The arguments of llama.cpp that put the experts of whole layers on the host.

    There the experts of a layer are one tensor for each of their matrices, which is on one side or the other. As many
    layers go to the device as the plan's slots hold whole. With `routing` they are those whose experts are touched most
    often, counted once a forward; without, those with the largest budgets. Of equals the later ones, so that the host
    has the first layers where it can, which is what `--n-cpu-moe` says.

    Raise PlanError if the plan was not made for `model`.
    """
    plan.check(model)
    E, planned_slots, first = model.num_experts, sum(plan.budget), model.num_dense_layers
    ranked, ranking = _ranked_layers(plan, routing)
    device = sorted(first + layer for layer in ranked[: planned_slots // E])
    host = sorted(first + layer for layer in ranked[planned_slots // E :])
    override = rf"blk\.({'|'.join(map(str, host))}){_EXPERT_TENSORS}=CPU"
    arguments = ["--n-gpu-layers", str(first + model.num_layers + 1)]
    if not device:
        arguments += ["--cpu-moe"]
    elif host and host[-1] < device[0]:
        arguments += ["--n-cpu-moe", str(host[-1] + 1)]
    elif host:
        arguments += ["--override-tensor", override]
    slots = len(device) * E
    return Export(
        format="llama.cpp",
        text=shlex.join(arguments),
        values={
            "arguments": arguments,
            "device_layers": device,
            "host_layers": host,
            "override_tensor": override if host else None,
        },
        slots=slots,
        planned_slots=planned_slots,
        kept=(f"The experts of {len(device)} of {model.num_layers} MoE layers are on the device, {ranking}.",),
        lost=(
            f"{planned_slots - slots} of {planned_slots} slots stay empty: a layer takes all its {E} or none.",
            *_moves_lost(plan),
            "Missed experts: a forward of 32 rows or more copies those it needs to the device, for that forward alone.",
            f"Bytes: an expert takes {plan.model.expert_bytes} in the plan, in a GGUF file what it is quantised to.",
        ),
    )


def _ranked_layers(plan: Plan, routing: Workload | None) -> tuple[list[int], str]:
    """The MoE layers, first those that gain most from being on the device, and by what that is told."""
    weights: Sequence[int] = plan.budget
    by = "those with the largest budgets"
    if routing is not None:
        _check_routing(plan, routing)
        weights = np.count_nonzero(routing.counts, axis=(0, 2)).tolist()
        by = "those whose experts the trace touches most often"
    return sorted(range(len(weights)), key=lambda layer: (weights[layer], layer), reverse=True), by


def to_ktransformers(
    plan: Plan, model: MoEConfig, routing: Workload | None = None, counts_file: str = "counts.pt"
) -> Export:
    """The arguments of KTransformers (kt-kernel in its SGLang fork), and the counts that make it choose these experts.

    Its strategy "frequency" puts the most often counted pairs of layer and expert on the device, over all layers. The
    counts here are 1 for each pair of the placement and 0 for all others, so it chooses exactly those. It reads them
    from `counts_file`, a PyTorch file: `engine.expert_counts.save_counts` writes it from `values["logical_count"]`.

    Raise PlanError as `pinned` does, if the plan was not made for `model`, or if `counts_file` is no .pt file.
    """
    plan.check(model)
    if not counts_file.endswith(".pt"):
        raise PlanError(f"{counts_file}: KTransformers reads counts from a .pt file and no other; name it so.")
    placement = pinned(plan, routing)
    counts = np.zeros((model.num_dense_layers + model.num_layers, model.num_experts), np.int64)
    for layer, experts in enumerate(placement.experts, start=model.num_dense_layers):
        counts[layer, list(experts)] = 1
    arguments = [
        *_ktransformers_slots(plan.budget, model.num_experts),
        *("--kt-expert-placement-strategy", "frequency", "--init-expert-location", counts_file),
    ]
    return Export(
        format="ktransformers",
        text=shlex.join(arguments),
        values={
            "arguments": arguments,
            "num_gpu_experts": list(plan.budget),
            "gpu_experts": {model.num_dense_layers + layer: ids for layer, ids in enumerate(placement.to_json())},
            "logical_count": [counts.tolist()],
        },
        slots=placement.num_experts,
        planned_slots=sum(plan.budget),
        kept=(_chosen(routing),),
        lost=(
            *_moves_lost(plan),
            "The host's weights, method and threads (--kt-weight-path, --kt-method, --kt-cpuinfer) are in no plan.",
        ),
    )


def _ktransformers_slots(budget: Sequence[int], num_experts: int) -> list[str]:
    """How many experts KTransformers is to have on the device: of each layer, or else a share of all."""
    if len(set(budget)) == 1:
        return ["--kt-num-gpu-experts", str(budget[0])]
    # The share of all pairs is cut to a whole number there: half a pair more is safe from rounding.
    return ["--kt-gpu-experts-ratio", f"{(sum(budget) + 0.5) / (len(budget) * num_experts):.9f}"]


def to_pins(plan: Plan, model: MoEConfig, routing: Workload | None = None) -> Export:
    """A list of the experts that stay on the device, a line for each MoE layer; layers count the dense ones too.

    Raise PlanError as `pinned` does, or if the plan was not made for `model`.
    """
    plan.check(model)
    placement = pinned(plan, routing)
    first = model.num_dense_layers
    header = ["# EXPERT_CACHE_PIN_LIST v1", f"n_layer {first + model.num_layers}", f"n_expert {model.num_experts}"]
    lines = [
        f"layer {layer}: {' '.join(map(str, ids))}".rstrip() for layer, ids in enumerate(placement.experts, start=first)
    ]
    return Export(
        format="pins",
        text="\n".join([*header, *lines]),
        values={
            "n_layer": first + model.num_layers,
            "n_expert": model.num_experts,
            "layers": {first + layer: ids for layer, ids in enumerate(placement.to_json())},
        },
        slots=placement.num_experts,
        planned_slots=sum(plan.budget),
        kept=(_chosen(routing),),
        lost=_moves_lost(plan),
    )


def _moves_lost(plan: Plan) -> tuple[str, ...]:
    """What a fixed choice of experts loses of the plan's policy."""
    if plan.policy == "static":
        return ()
    return (f"Policy {plan.policy!r}: the plan moves experts while it runs, and here they stay where they are.",)


def _chosen(routing: Workload | None) -> str:
    whose = "the plan's own" if routing is None else "the most popular of the trace"
    return f"Every layer's budget; the experts on the device are {whose}."
