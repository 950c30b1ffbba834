"""Plans of a trace small enough to try everything, on a machine with room for just so many experts."""

from dataclasses import replace

import numpy as np
from hand_made import E, decode, writer
from toy import toy_execution, toy_hardware

from tidesim.execution import device_memory
from tidesim.planner import plan

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
