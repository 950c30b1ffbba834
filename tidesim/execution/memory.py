"""What a run needs in the device's memory, and which budgets fit it."""

from collections.abc import Sequence
from dataclasses import dataclass

from tidesim.errors import BudgetError
from tidesim.execution.presets import Execution
from tidesim.hardware import Hardware
from tidesim.moe import MoEConfig
from tidesim.residency import check_budgets, per_layer

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes on the device during a run.

    Parameters
    ----------
    experts : the slots of all layers, and scratch memory for experts that are forgotten after use; on a unified-memory
        machine every expert, as each is stored once (unless they live on a disk).
    non_experts : everything else that has weights.
    kv_cache : keys and values of the longest sequence, or of all sequences of a batch; 0 without a cache.
    transient : the larger of two peaks. Head: logits in bf16 and fp32 of every row that gets some, and fp32
        probabilities of a block. Experts: each routed row in and out and reordered in bf16, and weighted in fp32, as
        the published combine holds them at once.
    reserve : what is left for allocator and framework.
    """

    experts: int
    non_experts: int
    kv_cache: int
    transient: int
    reserve: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.experts + self.non_experts + self.kv_cache + self.transient + self.reserve


def device_memory(
    model: MoEConfig,
    hardware: Hardware,
    execution: Execution,
    budget: int | Sequence[int],
    max_tokens: int,
    reserve_bytes: int | None = None,
    scratch: int = 0,
    batch_size: int = 1,
) -> DeviceMemory:
    """Bytes that a run needs on the device, with `budget` slots a layer (or one number for each layer).

    `max_tokens` is the longest sequence: its prompt and what is generated; of `batch_size` sequences that run together
    it is that of all of them, see `Workload`. `scratch` experts fit into scratch memory.
    `reserve_bytes` is by default the larger of 1.5 GiB and a tenth of the device's memory, the rule of the released
    TIDE code.
    """
    if reserve_bytes is None:
        reserve_bytes = max(3 * GIB // 2, hardware.device.memory_bytes // 10)
    if execution.has_all_on_device(hardware):
        slots = model.num_layers * model.num_experts
    else:
        slots = sum(per_layer(budget, model.num_layers, "budget")) + scratch
    block_rows = batch_size * model.block_length
    head_rows = max_tokens if execution.logits == "all" else block_rows
    head = model.vocab_size * (head_rows * (2 + 4) + block_rows * 4)
    experts = max_tokens * model.top_k * model.hidden_size * (3 * 2 + 4)
    return DeviceMemory(
        experts=slots * model.expert_bytes,
        non_experts=model.non_expert_bytes,
        kv_cache=max_tokens * model.kv_bytes_per_token if execution.kv_cache else 0,
        transient=max(head, experts),
        reserve=reserve_bytes,
    )


def largest_budget(
    model: MoEConfig,
    hardware: Hardware,
    execution: Execution,
    max_tokens: int,
    reserve_bytes: int | None = None,
    scratch: int = 0,
    batch_size: int = 1,
) -> int:
    """The largest budget, the same in all layers, whose run fits the device. Raise BudgetError if not even 0 fits."""
    need = device_memory(model, hardware, execution, 0, max_tokens, reserve_bytes, scratch, batch_size)
    room = hardware.device.memory_bytes - need.total
    if room < 0:
        raise BudgetError(f"{_figures(model, hardware, need)}; not even a budget of 0 fits, a larger device is needed.")
    if execution.has_all_on_device(hardware):
        return model.num_experts
    return min(model.num_experts, room // (model.num_layers * model.expert_bytes))


def check_memory(
    model: MoEConfig,
    hardware: Hardware,
    execution: Execution,
    budget: int | Sequence[int],
    max_tokens: int,
    reserve_bytes: int | None = None,
    scratch: int = 0,
    batch_size: int = 1,
) -> DeviceMemory:
    """What `device_memory` says, if it fits.

    Raise BudgetError with every figure and the largest budget that fits, if a budget exceeds the number of experts,
    the device's memory is exceeded, or the experts of all layers exceed the host's memory (where that is their home).
    """
    check_budgets(per_layer(budget, model.num_layers, "budget"), model.num_experts)
    need = device_memory(model, hardware, execution, budget, max_tokens, reserve_bytes, scratch, batch_size)
    if need.total > hardware.device.memory_bytes:
        largest = largest_budget(model, hardware, execution, max_tokens, reserve_bytes, scratch, batch_size)
        raise BudgetError(
            f"{_figures(model, hardware, need)}; the largest budget that fits is {largest} experts a layer."
        )
    all_experts = model.experts_bytes(model.num_experts)
    if execution.home == "host" and not hardware.is_unified and all_experts > hardware.host.memory_bytes:
        raise BudgetError(
            f"the experts of {model.name} take {all_experts / GIB:.2f} GiB in all, and the host of {hardware.name} has "
            f"{hardware.host.memory_bytes / GIB:.2f} GiB; store them in fewer bits, or take a host with more memory."
        )
    return need


def _figures(model: MoEConfig, hardware: Hardware, need: DeviceMemory) -> str:
    parts = {
        "experts": need.experts,
        "other weights": need.non_experts,
        "KV cache": need.kv_cache,
        "transient peak": need.transient,
        "reserve": need.reserve,
    }
    listed = " + ".join(f"{name} {num_bytes / GIB:.2f}" for name, num_bytes in parts.items())
    return (
        f"{model.name} needs {listed} = {need.total / GIB:.2f} GiB on the device, "
        f"and {hardware.name} has {hardware.device.memory_bytes / GIB:.2f} GiB"
    )
