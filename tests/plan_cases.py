"""Plans written by hand, and plans of a trace small enough to try everything, for a machine with just so much room."""

from dataclasses import replace

import numpy as np
from hand_made import E, decode, writer
from toy import toy_execution, toy_hardware

from tidesim.execution import device_memory
from tidesim.moe import MoEConfig
from tidesim.planner import Plan, plan
from tidesim.planner.plan_file import Machine, ModelSizes, Prediction, Proof, Routing, TideCode
from tidesim.result import PARTS

BLOCKING = toy_execution()
BACKGROUND = toy_execution(name="background", copies="background", host="parallel", is_pinned=True)
STEPS = [[3, 2], [4], [2, 3], [5], [4], [2, 2, 1]]


def write_trace(path):
    """Six sequences of one to three blocks, whose experts with low ids are the busier ones."""
    rng = np.random.default_rng(5)
    with writer(path, origin="synthetic") as out:
        for steps in STEPS:
            sequence = decode(rng, 6, steps)[0]
            first, second = np.moveaxis(sequence.expert_ids**2 // E, 2, 0)
            # The two experts of a token differ.
            out.append(replace(sequence, expert_ids=np.stack([first, (first + 1 + second) % E], axis=2)))
    return path


def machine(trace, slots, execution=BLOCKING):
    """A machine on which exactly so many experts fit beside the rest, with no reserve."""
    hardware = toy_hardware()
    max_tokens = trace.workload().max_tokens
    need = device_memory(trace.config, hardware, execution, 0, max_tokens, 0).total
    memory_bytes = need + slots * trace.config.expert_bytes
    return replace(hardware, device=replace(hardware.device, memory_bytes=memory_bytes))


def make(trace, slots=11, execution=BLOCKING, **changes):
    arguments = {"execution": execution, "reserve_bytes": 0, "workers": 1} | changes
    return plan(trace, trace.config, machine(trace, slots, execution), **arguments)


PREDICTION = Prediction(
    tok_per_s=1.0,
    makespan_s=1.0,
    num_forwards=1,
    generated_tokens=1,
    hit_rate=0.5,
    breakdown_s=dict.fromkeys(PARTS, 0.2),
)


def plan_for(model: MoEConfig, budget, **changes) -> Plan:
    """A plan that moves experts, with these budgets, unless told otherwise."""
    fields = {
        "model": ModelSizes.of(model),
        "hardware": Machine(name="paper", device_memory_bytes=2**30, fingerprint="a" * 64),
        "trace": Routing(
            model="toy", origin="synthetic", fingerprint="b" * 64, training=(0, 1), profiled=(0,), held_out=()
        ),
        "objective": "throughput",
        "execution": "overlapped",
        "context": "block",
        "policy": "tide",
        "budget": tuple(budget),
        "refresh_interval": (4,) * model.num_layers,
        "placement": None,
        "learnt": None,
        "miss_rule": "host",
        "max_tokens": 64,
        "reserve_bytes": 0,
        "predicted": PREDICTION,
        "held_out": None,
        "proof": Proof(solver="highs", status="optimal", minimised="time", objective=0.5, bound=0.5, gap=0.0),
        "tide_code": TideCode(max_gpu_experts_per_layer=2, jump_steps=4, derivation="by hand"),
        "seed": 0,
        "tool_version": "1.2.3",
    }
    return Plan(**fields | changes)
