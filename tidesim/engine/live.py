"""A model on a device, ready to run under one plan after another: its weights are read once and stay.

Devices: "accelerator" is whatever `torch.accelerator` reports; "emulated" is for machines without one, "cpu" the same
without a paced link; "disk" keeps experts in the safetensors files and a budget of them in memory; "auto" is the
accelerator where there is one, else "cpu".
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch

from tidesim.engine.accelerator import AcceleratorBackend
from tidesim.engine.backend import Backend, check_execution
from tidesim.engine.checkpoint import Checkpoint, load_without_experts, random_without_experts
from tidesim.engine.cores import Cores
from tidesim.engine.cpu_network import on_cores
from tidesim.engine.device_calls import DeviceCalls
from tidesim.engine.device_network import MOST_ROOMS, DeviceNetwork, room_bytes
from tidesim.engine.disk import DiskBackend
from tidesim.engine.drive import Drive
from tidesim.engine.emulated import EmulatedBackend, Pace
from tidesim.engine.host_weights import HostWeights, MappedWeights, check_host_memory
from tidesim.engine.model import LLaDA2, NetworkConfig
from tidesim.engine.offload import Offload
from tidesim.errors import InputError, ModelError, nearest_name
from tidesim.execution import EXECUTIONS, Costs, DeviceMemory, Execution
from tidesim.moe import MoEConfig, load_moe_config, read_hf_config
from tidesim.policies import Policy
from tidesim.result import Decision

DEVICES = ("auto", "cpu", "emulated", "accelerator", "disk")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettings:
    """On what a model runs.

    Parameters
    ----------
    device : one of `DEVICES`.
    device_threads, host_threads : cores of an emulated device, and threads that compute missed experts on any machine;
        by default the machine's cores are halved between them where the device is emulated.
    pace : how fast an emulated device, its link and its host may be.

    Raise InputError for an unknown device, one that is not there, or numbers below 1.
    """

    device: str = "auto"
    device_threads: int = field(default_factory=lambda: max(1, (os.cpu_count() or 1) // 2))
    host_threads: int = field(default_factory=lambda: max(1, (os.cpu_count() or 1) // 2))
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise InputError(f"no device {self.device!r}; {nearest_name(self.device, DEVICES)}")
        for name in ("device_threads", "host_threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}(={getattr(self, name)}) must be >= 1.")
        if self.device == "accelerator" and not torch.accelerator.is_available():
            raise InputError("PyTorch sees no accelerator here; use --device cpu, emulated or disk.")
        if self.device != "emulated" and self.pace != Pace():
            raise InputError(f"only the emulated device can be paced, not {self.device!r}; use --device emulated.")

    @property
    def kind(self) -> str:
        """The device with "auto" resolved."""
        if self.device != "auto":
            return self.device
        return "accelerator" if torch.accelerator.is_available() else "cpu"

    @property
    def description(self) -> str:
        """What results call the machine."""
        if self.kind == "accelerator":
            return f"{torch.accelerator.current_accelerator()}, {self.host_threads} host threads"
        host = "" if self.kind == "disk" else f", {self.host_threads} host"
        return f"{self.kind}, threads: {self.device_threads} device{host}"


# How the engine runs a forward on each kind of device.
_EXECUTION_OF = {"accelerator": "engine", "emulated": "emulated", "cpu": "emulated", "disk": "disk"}


def engine_execution(kind: str, planned: Execution, kv_cache: bool) -> Execution:
    """How the engine runs on a device of `kind`, with what is open to choice taken from `planned`.

    Raise InputError with every setting of `planned` that the engine cannot follow, or if it is for experts on a disk
    and the device is another.
    """
    check_execution(planned)
    if planned.home == "disk" and kind != "disk":
        raise InputError(
            f"execution {planned.name!r} has its experts on a disk; run it with --device disk, not {kind}."
        )
    own = EXECUTIONS[_EXECUTION_OF[kind]]
    host = own.host if kind == "disk" else planned.host
    changed = replace(own, kv_cache=kv_cache, copies=planned.copies, host=host)
    differs = [
        f"{name}={getattr(changed, name)}"
        for name in ("kv_cache", "copies", "host")
        if getattr(changed, name) != getattr(own, name)
    ]
    return replace(changed, name=" ".join([own.name, *differs]))


class Closable(Protocol):
    """Something that holds threads or files."""

    def close(self) -> None:
        """Give them back."""


class _OneTorchThread:
    """PyTorch's own operations on one thread until closed: beside the compiled kernels they are small, and the idle
    threads of its pool would spin on the cores that host and link run on."""

    def __init__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)

    def close(self) -> None:
        """As many threads as before."""
        torch.set_num_threads(self._before)


class LiveModel:
    """A network on a device, and what it takes to run it under a plan; use it in a `with` statement.

    Made by `open_model` and `dummy_model`. `expert_bytes` is what one expert takes as it is stored; `owned` is closed
    at the end, `memory_bytes` is the device's memory if it has one of its own, `cores` are
    those that the device is made of if it is.
    """

    def __init__(
        self,
        network: LLaDA2,
        sizes: MoEConfig,
        kind: str,
        expert_bytes: int,
        make_backend: Callable[[bool], Backend],
        owned: Sequence[Closable],
        memory_bytes: int | None = None,
        cores: Cores | None = None,
    ) -> None:
        self.network, self.sizes, self.kind, self.expert_bytes = network, sizes, kind, expert_bytes
        self.cores = cores
        self.memory_bytes = memory_bytes
        self._make_backend, self._owned = make_backend, owned

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for thing in self._owned:
            thing.close()

    def start(
        self,
        policy: Policy,
        budgets: Sequence[int],
        execution: Execution,
        decisions: Callable[[Decision], None] | None = None,
        is_detailed: bool = False,
        costs: Costs | None = None,
    ) -> Offload:
        """Fill the slots for a run under `policy`. Close the run when it is over: slots are not shared."""
        backend = self._make_backend(is_detailed)
        return Offload(self.network, backend, policy, budgets, execution, decisions, is_detailed, costs)

    def memory(self, budgets: Sequence[int], execution: Execution, max_tokens: int, scratch: int = 0) -> DeviceMemory:
        """Bytes that a run takes on the device at its peak, with sequences of `max_tokens` tokens.

        `scratch` experts fit into scratch memory besides the slots.

        Transient: the outputs of all routed pairs of the longest forward, which are kept, on an accelerator in float32;
        logits of a block as computed and as float32, with their probabilities; the activations of a layer, of which six
        are as wide as the hidden state and two as the widest map, or on an accelerator, if that is more, the gathered
        rows and hidden rows of a grouped product and the float32 outputs that are weighed. An accelerator also has
        rooms that forwards run in, and the activations of a layer once more for its graphs. They are added up: an
        allocator keeps what one of them gave back.
        """
        sizes, number = self.sizes, self.network.norm.weight.element_size()
        tensors = (*self.network.parameters(), *self.network.buffers())
        pairs = max_tokens * sizes.top_k
        head = sizes.block_length * sizes.vocab_size * (number % 4 + 4 + 4)
        widest = max(sizes.intermediate_size, (sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_dim)
        layer = max_tokens * (6 * sizes.hidden_size + 2 * widest) * number + max_tokens**2
        grouped = pairs * ((sizes.hidden_size + 3 * sizes.moe_intermediate_size) * number + 4 * sizes.hidden_size)
        transient = pairs * sizes.hidden_size * number + head + layer
        if self.kind == "accelerator":
            rooms = self._rooms_bytes(execution, max_tokens)
            transient = pairs * sizes.hidden_size * 4 + head + max(layer, grouped) + layer + rooms
        return DeviceMemory(
            experts=(sum(budgets) + scratch) * self.expert_bytes,
            non_experts=sum(tensor.nbytes for tensor in tensors),
            kv_cache=max_tokens * sizes.kv_bytes_per_token * number // 2 if execution.kv_cache else 0,
            transient=transient,
            reserve=0,
        )

    def _rooms_bytes(self, execution: Execution, max_tokens: int) -> int:
        """The rooms of an accelerator: those of blocks or, without a cache, of whole sequences; one of a prefill."""
        sizes, number = self.sizes, self.network.norm.weight.element_size()
        groups = sizes.num_heads // sizes.num_kv_heads
        num_rows = sizes.block_length if execution.kv_cache else max_tokens
        kept, passing = (
            room_bytes(sizes.hidden_size, groups, rows, max_tokens, number) for rows in (num_rows, max_tokens)
        )
        return MOST_ROOMS * kept + passing


def open_model(folder: Path, settings: DeviceSettings) -> LiveModel:
    """The model in `folder`: experts mapped from their files for device "cpu", left there for "disk", else staged.

    Raise ModelError for an unusable folder, BudgetError if the experts do not fit this machine's memory.
    """
    checkpoint, sizes = Checkpoint(folder), load_moe_config(str(folder))
    if settings.kind == "disk":
        return _on_drive(load_without_experts(checkpoint), sizes, folder, settings)
    if settings.kind == "cpu":
        network = load_without_experts(checkpoint)
        return _on_cores(network, sizes, MappedWeights(checkpoint, network.config), settings)
    check_host_memory(sizes.experts_bytes(sizes.num_experts), f"the experts of {sizes.name}")
    if settings.kind == "accelerator":
        calls = DeviceCalls()
        network = load_without_experts(checkpoint, device=calls.device)
        weights = HostWeights.staged(checkpoint, network.config, calls.pinned)
        return _on_accelerator(network, sizes, weights, settings, calls)
    network = load_without_experts(checkpoint)
    return _on_cores(network, sizes, HostWeights.staged(checkpoint, network.config), settings)


def dummy_model(shape: Path, settings: DeviceSettings, num_layers: int | None, seed: int) -> LiveModel:
    """A model of the shape of a config.json with random bf16 weights, and so many MoE layers; None: all of them.

    Its text means nothing; times and memory are those of the shape. Raise ModelError if there are not so many layers,
    InputError for device "disk", which reads files.
    """
    if settings.kind == "disk":
        raise InputError("dummy weights are in no file, and --device disk reads files; take another device.")
    config, sizes = NetworkConfig.from_hf(read_hf_config(shape)), load_moe_config(str(shape))
    if num_layers is not None and not 1 <= num_layers <= sizes.num_layers:
        raise ModelError(f"layers(={num_layers}) must be in 1..{sizes.num_layers}, the MoE layers of {sizes.name}.")
    num_layers = num_layers or sizes.num_layers
    config = replace(config, num_hidden_layers=config.first_k_dense_replace + num_layers)
    sizes = replace(sizes, num_layers=num_layers, name=f"{sizes.name}, {num_layers} layers of dummy weights")
    check_host_memory(sizes.experts_bytes(sizes.num_experts) + sizes.non_expert_bytes, sizes.name)
    rng = torch.Generator().manual_seed(seed)
    network = random_without_experts(config, torch.bfloat16, rng)
    if settings.kind == "accelerator":
        calls = DeviceCalls()
        weights = HostWeights.random(config, torch.bfloat16, rng, calls.pinned)
        return _on_accelerator(network.to(calls.device), sizes, weights, settings, calls)
    return _on_cores(network, sizes, HostWeights.random(config, torch.bfloat16, rng), settings)


def _on_cores(
    network: LLaDA2, sizes: MoEConfig, weights: HostWeights | MappedWeights, settings: DeviceSettings
) -> LiveModel:
    """Device and host are cores of this machine, and experts are in its memory."""
    device_cores, host_cores = Cores(settings.device_threads), Cores(settings.host_threads)
    one_thread = _OneTorchThread()
    on_cores(network, device_cores)

    def make_backend(is_detailed: bool) -> Backend:
        return EmulatedBackend(network.config, weights, device_cores, host_cores, settings.pace, is_detailed)

    return LiveModel(
        network,
        sizes,
        settings.kind,
        weights.expert_bytes,
        make_backend,
        (device_cores, host_cores, one_thread),
        cores=device_cores,
    )


def _on_drive(network: LLaDA2, sizes: MoEConfig, folder: Path, settings: DeviceSettings) -> LiveModel:
    """This machine's cores are the device, and experts stay in their files."""
    cores, one_thread = Cores(settings.device_threads), _OneTorchThread()
    on_cores(network, cores)
    drive = Drive(folder, network.config)

    def make_backend(is_detailed: bool) -> Backend:
        return DiskBackend(network.config, drive, cores, is_detailed)

    return LiveModel(
        network, sizes, settings.kind, drive.expert_bytes, make_backend, (cores, drive, one_thread), cores=cores
    )


def _on_accelerator(
    network: LLaDA2, sizes: MoEConfig, weights: HostWeights, settings: DeviceSettings, calls: DeviceCalls
) -> LiveModel:
    """The network on the device that `calls` reaches, and experts in pinned memory."""
    host_cores, one_thread = Cores(settings.host_threads), _OneTorchThread()
    network = DeviceNetwork(network, calls)

    def make_backend(is_detailed: bool) -> Backend:
        return AcceleratorBackend(network.config, weights, host_cores, calls, is_detailed)

    return LiveModel(
        network,
        sizes,
        settings.kind,
        weights.expert_bytes,
        make_backend,
        (host_cores, one_thread),
        calls.memory_bytes(),
    )
