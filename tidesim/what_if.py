"""What more of something would give: the run of a policy on the same machine with one thing better.

Each question changes figures of the profile, by their dotted paths, and times the same workload under the same policy
again. What a policy decides by the routing it decides again as before; one that goes by predicted times is told the
changed machine. Whether the run fits the device is not asked.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from tidesim.errors import ProfileError
from tidesim.execution import GIB, Execution, device_memory
from tidesim.hardware import Hardware
from tidesim.moe import MoEConfig
from tidesim.paper_run import RunSettings
from tidesim.policies import Policy
from tidesim.residency import per_layer
from tidesim.timing import timed
from tidesim.workload import Workload

PolicyOf = Callable[[tuple[int, ...]], Policy]
Each = Callable[[Callable[[Any], float], Iterable[Any]], Iterable[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowPrice:
    """What one thing that is better would give.

    Parameters
    ----------
    name : what is better, in plain words.
    figures : dotted paths of what was changed in the profile.
    factor : all of it times that.
    num_slots : experts more that the device then holds, over all layers.
    before_tok_per_s, after_tok_per_s : throughput on the machine as it is, and on the changed one.
    gain : relative: 0.1 is a tenth more throughput.
    """

    name: str
    figures: tuple[str, ...]
    factor: float
    num_slots: int
    before_tok_per_s: float
    after_tok_per_s: float
    gain: float

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, ready for JSON."""
        return asdict(self) | {"figures": list(self.figures)}


class _Question(NamedTuple):
    name: str
    figures: tuple[str, ...]
    factor: float


def shadow_prices(
    workload: Workload,
    model: MoEConfig,
    hardware: Hardware,
    policy_of: PolicyOf,
    *,
    budget: int | Sequence[int],
    execution: Execution,
    seed: int | None = None,
    reserve_bytes: int | None = None,
    each: Each = map,
) -> tuple[ShadowPrice, ...]:
    """What more memory, a faster link, host or device, and quicker launches would give, the largest gain first.

    Parameters
    ----------
    policy_of : makes the policy for so many slots in each layer; every run gets its own.
    budget, execution, seed, reserve_bytes : see `simulate`.
    each : runs a function on many arguments, in order; one that uses threads gives the same sooner.

    Asked are: 1 GiB more device memory, with as many slots more as that gives (a default reserve takes its tenth of
    it), see `with_more_slots`; each direction of the link, and both, at twice the bandwidth, or the drive where experts
    live on a disk; memory bandwidth of the host, its rate, and memory bandwidth of the device, each half as much again;
    launches in half the time. Where curves were measured in place of bandwidth and rate, they are raised as a whole.
    What a machine does not have is left out, and so is what no machine has. Of equal gains, the one named first here.

    Raise InputError if workload, model and execution do not fit together.
    """
    budgets = per_layer(budget, model.num_layers, "budget")

    def tok_per_s(machine: Hardware, slots: tuple[int, ...]) -> float:
        settings = RunSettings(budget=slots, execution=execution, seed=seed, is_memory_checked=False)
        return timed(workload, model, machine, policy_of(slots), **settings).tok_per_s

    def slots_on(machine: Hardware) -> tuple[int, ...]:
        scratch = policy_of(budgets).scratch_experts(model.num_experts)
        most = (workload.max_tokens, reserve_bytes, scratch, workload.batch_size)
        before, after = (_room(model, each, execution, *most) for each in (hardware, machine))
        return with_more_slots(budgets, after - before, model.num_experts)

    questions = list(_asked(model, hardware, execution))
    cases = [(hardware, budgets)]
    for question, machine in questions:
        cases.append((machine, slots_on(machine) if question.figures == _MEMORY else budgets))
    before, *rates = each(lambda case: tok_per_s(*case), cases)
    prices = [
        ShadowPrice(
            name=question.name,
            figures=question.figures,
            factor=question.factor,
            num_slots=sum(slots) - sum(budgets),
            before_tok_per_s=before,
            after_tok_per_s=after,
            gain=after / before - 1,
        )
        for (question, _), (_, slots), after in zip(questions, cases[1:], rates, strict=True)
    ]
    return tuple(sorted(prices, key=lambda price: -price.gain))


def with_more_slots(budgets: Sequence[int], num_more: int, num_experts: int) -> tuple[int, ...]:
    """`budgets` with up to `num_more` slots more: one for each layer in turn, from the first on, until none are left.

    A layer that holds all its experts is passed over.
    """
    more = list(budgets)
    left = min(num_more, len(more) * num_experts - sum(more))
    while left > 0:
        for layer in range(len(more)):
            if left > 0 and more[layer] < num_experts:
                more[layer] += 1
                left -= 1
    return tuple(more)


# --- the questions ---

_MEMORY = ("device.memory_gib",)


def _asked(model: MoEConfig, hardware: Hardware, execution: Execution) -> Iterator[tuple[_Question, Hardware]]:
    """Each question that makes sense, with its machine."""
    for question in (
        *_about_memory(hardware, execution),
        *_about_links(hardware, execution),
        *_about_host(model, hardware),
        *_about_device(hardware, execution),
    ):
        try:
            changed = hardware.scaled(question.figures, question.factor)
        except ProfileError:  # no machine has so much
            continue
        yield question, changed


def _about_memory(hardware: Hardware, execution: Execution) -> Iterator[_Question]:
    if not execution.has_all_on_device(hardware):
        gib = hardware.device.memory_bytes / GIB
        yield _Question("1 GiB more device memory", _MEMORY, (gib + 1) / gib)


def _about_links(hardware: Hardware, execution: Execution) -> Iterator[_Question]:
    if execution.home == "disk":
        yield _Question("drive twice as fast", ("links.nvme.bandwidth_gb_s",), 2)
    elif hardware.links is not None:
        memory = ("pinned",) if execution.is_pinned else ("pageable", "fresh")
        h2d = (f"links.h2d_{memory[0]}.bandwidth_gb_s",)
        d2h = tuple(f"links.d2h_{name}.bandwidth_gb_s" for name in memory)
        yield _Question("copies to the device twice as fast", h2d, 2)
        yield _Question("copies to the host twice as fast", d2h, 2)
        yield _Question("copies twice as fast both ways, as over the next PCIe", h2d + d2h, 2)


def _about_host(model: MoEConfig, hardware: Hardware) -> Iterator[_Question]:
    # As in `Costs`: a curve is of 16-bit weights and holds in place of both figures.
    if model.weight_bits == 16 and hardware.host.expert_curve is not None:
        yield _Question("experts on the host 1.5 times as fast", ("host.expert_curve",), 1.5)
        return
    yield _Question("host memory 1.5 times as fast", ("host.memory_gb_s",), 1.5)
    yield _Question("host arithmetic 1.5 times as fast", ("host.bf16_gflops",), 1.5)


def _about_device(hardware: Hardware, execution: Execution) -> Iterator[_Question]:
    bandwidths = ("device.memory_gb_s", "device.experts_gb_s")
    curves = tuple(path for path in hardware.curves if path.startswith("device."))
    if curves:
        rates = ("device.bf16_tflops", "device.grouped_tflops")
        yield _Question("kernels on the device 1.5 times as fast", (*bandwidths, *rates, *curves), 1.5)
    else:
        yield _Question("device memory 1.5 times as fast", bandwidths, 1.5)
    op = "device.eager_op_us" if execution.launch == "eager" else "device.kernel_launch_us"
    # The fixed part of a grouped kernel is what launching its pieces takes.
    grouped = ("device.grouped_overhead_us",) if execution.kernels == "grouped" else ()
    yield _Question("launches in half the time", (op, *grouped), 0.5)


def _room(model: MoEConfig, hardware: Hardware, execution: Execution, *most: Any) -> int:
    """Experts that fit the device beside everything else, over all layers; below 0 if not even that fits.

    `most` is what `device_memory` asks for after the budget.
    """
    need = device_memory(model, hardware, execution, 0, *most)
    return (hardware.device.memory_bytes - need.total) // model.expert_bytes
