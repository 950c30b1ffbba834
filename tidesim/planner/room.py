"""How many experts fit on a device, and what to change where not even the rest of the model does."""

from dataclasses import dataclass

from tidesim.execution import GIB, DeviceMemory, Execution, device_memory
from tidesim.hardware import Hardware
from tidesim.moe import MoEConfig
from tidesim.planner.integer_programme import InfeasibleError


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Device memory left for experts.

    Parameters
    ----------
    memory : what everything else takes, the reserve included.
    slots : experts that fit, over all MoE layers.
    """

    memory: DeviceMemory
    slots: int


def measure_room(
    model: MoEConfig,
    hardware: Hardware,
    execution: Execution,
    max_tokens: int,
    reserve_bytes: int | None = None,
    batch_size: int = 1,
) -> Room:
    """The room for experts while a sequence of `max_tokens` is decoded, or a batch of so many in all.

    With unified memory all experts are there anyway. Raise InfeasibleError, with every figure and the nearest request
    that works, if not even a budget of 0 fits.
    """
    all_slots = model.num_layers * model.num_experts
    memory = device_memory(model, hardware, execution, 0, max_tokens, reserve_bytes, batch_size=batch_size)
    left_bytes = hardware.device.memory_bytes - memory.total
    if left_bytes < 0:
        raise InfeasibleError(_no_room(model, hardware, execution, memory, max_tokens))
    slots = all_slots if execution.has_all_on_device(hardware) else min(all_slots, left_bytes // model.expert_bytes)
    return Room(memory=memory, slots=slots)


def _no_room(model: MoEConfig, hardware: Hardware, execution: Execution, memory: DeviceMemory, max_tokens: int) -> str:
    parts = {
        "other weights": memory.non_experts,
        "KV cache": memory.kv_cache,
        "transient peak": memory.transient,
        "reserve": memory.reserve,
    }
    if memory.experts:
        parts = {"all experts": memory.experts, **parts}
    listed = ", ".join(f"{name} {num_bytes / GIB:.2f}" for name, num_bytes in parts.items())
    return (
        f"not even a budget of 0 fits: {model.name} at {max_tokens} tokens needs {memory.total / GIB:.2f} GiB on the "
        f"device ({listed}), and {hardware.name} has {hardware.device.memory_bytes / GIB:.2f} GiB; "
        f"{_way_out(model, hardware, execution, memory, max_tokens)}."
    )


def _way_out(model: MoEConfig, hardware: Hardware, execution: Execution, memory: DeviceMemory, max_tokens: int) -> str:
    """The nearest request that works: a smaller reserve, else shorter sequences, else another device."""
    reserve_bytes = hardware.device.memory_bytes - (memory.total - memory.reserve)
    if reserve_bytes >= 0:
        return f"a reserve of at most {reserve_bytes} bytes ({reserve_bytes / GIB:.2f} GiB) would do"
    longest = _longest_that_fits(model, hardware, execution, memory.reserve, max_tokens)
    if longest >= model.block_length:
        return f"sequences of at most {longest} tokens would do"
    return f"a device with at least {memory.total / GIB:.2f} GiB would do"


def _longest_that_fits(
    model: MoEConfig, hardware: Hardware, execution: Execution, reserve_bytes: int, max_tokens: int
) -> int:
    """Most tokens of a sequence, below `max_tokens` which are too many; 0 if there is no room for any."""
    fits, too_many = 0, max_tokens
    while too_many - fits > 1:
        tokens = (fits + too_many) // 2
        need = device_memory(model, hardware, execution, 0, tokens, reserve_bytes)
        if need.total <= hardware.device.memory_bytes:
            fits = tokens
        else:
            too_many = tokens
    return fits
