"""The live engine: the same text wherever experts live, and the very decisions that the simulator makes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from accelerator_stand_in import StandIn
from engine_cases import SMALL, small_network
from erratic import Erratic

from tidesim.engine import live as live_module
from tidesim.engine.accelerator import grouped_product
from tidesim.engine.checkpoint import Checkpoint, expert_weights, save_network
from tidesim.engine.choice import by_hand
from tidesim.engine.emulated import Pace
from tidesim.engine.generate import Generation, Sampler, generate
from tidesim.engine.live import DeviceSettings, LiveModel, engine_execution, open_model
from tidesim.engine.model import Routing
from tidesim.engine.offload import Offload
from tidesim.errors import InputError
from tidesim.execution import EXECUTIONS, Execution
from tidesim.hardware import Link, load_hardware
from tidesim.policies import ForwardInfo, Policy, Shape, policy
from tidesim.policies.predictors import Previous
from tidesim.residency import Moves, Placement
from tidesim.result import Decision
from tidesim.trace import Trace, TraceWriter
from tidesim.validate.measuring import predict
from tidesim.workload import ForwardKind, Workload

B, MASK, END = 8, 2, 0
E, L = SMALL.num_experts, SMALL.num_hidden_layers - SMALL.first_k_dense_replace
HF_CONFIG = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__} | {"block_length": B}
POPULARITY = np.random.default_rng(0).integers(1, 100, (L, E))
RTX4090 = load_hardware("rtx4090")
SLOW_HOST = RTX4090.replace_figure("host.bf16_gflops", 0.2)  # two rows take about as long as copy and run
PROMPTS = [[11, 50, 70, 33, 90], list(range(20, 39))]

POLICIES: dict[str, Callable[[], Policy]] = {
    "all-host": lambda: policy("all-host"),
    "static": lambda: policy("static", popularity=POPULARITY),
    "lru": lambda: policy("lru"),
    "tide, every step": lambda: policy("tide", refresh_interval=1),
    "tide, every third": lambda: policy("tide", refresh_interval=3),
    "tide-as-coded, every second": lambda: policy("tide-as-coded", refresh_interval=2),
    "tide, listed steps": lambda: policy("tide", refresh_steps=((0, 2), (1, 2))),
    "tide-as-coded, by layer": lambda: policy("tide-as-coded", refresh_interval=(1, 4)),
    "pre-gated": lambda: policy("pre-gated", predictor=Previous()),
    "erratic": lambda: Erratic("layer", scratch=1),
    "erratic, all layers' slots": lambda: Erratic("network", scratch=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    save_network(small_network(seed=7), HF_CONFIG, folder, torch.bfloat16)
    return folder


@pytest.fixture(
    scope="module",
    params=["cpu", "emulated", "disk", "stand-in", pytest.param("accelerator", marks=pytest.mark.gpu)],
)
def live(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveModel]:
    """Unpaced; paced to a link so slow that copies are still under way when the next layers run; and so on.

    The stand-in computes in float32 throughout, so that rounding does not decide between near ties; on a real
    accelerator it may, and text is not compared there.
    """
    if request.param == "stand-in":
        exact = tmp_path_factory.mktemp("models") / "exact"
        save_network(small_network(seed=7), HF_CONFIG, exact, torch.float32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(live_module, "DeviceCalls", StandIn)
            patch.setattr(torch.accelerator, "is_available", lambda: True)
            opened = open_model(exact, DeviceSettings(device="accelerator"))
    else:
        paced = Pace(weights=Link(bytes_per_s=20e6, latency_s=1e-5)) if request.param == "emulated" else Pace()
        opened = open_model(folder, DeviceSettings(device=request.param, pace=paced))
    with opened:
        yield opened


def answers(
    live: LiveModel, offload: Offload | None = None, prompts: Sequence[list[int]] = PROMPTS, **settings: Any
) -> list[Generation]:
    sampler = Sampler(**{"block_length": B, "steps": B, "gen_length": 14, "threshold": 0.2, **settings})
    return [generate(live.network, prompt, sampler, mask_id=MASK, end_id=END, watcher=offload) for prompt in prompts]


def run(
    live: LiveModel, made: Policy, budget: int | Sequence[int], execution: Execution, **settings: Any
) -> tuple[list[Generation], list[Decision], Offload]:
    decisions: list[Decision] = []
    budgets = [budget] * L if isinstance(budget, int) else budget
    with live.start(made, budgets, execution, decisions.append) as offload:
        return answers(live, offload, kv_cache=execution.kv_cache, **settings), decisions, offload


@pytest.fixture(scope="module")
def expected(live: LiveModel) -> list[Generation]:
    """What the model says with every expert on the device."""
    return run(live, policy("all-device"), E, EXECUTIONS["overlapped"])[0]


def executions() -> list[Execution]:
    own = EXECUTIONS["overlapped"]
    changes: list[dict[str, Any]] = [{}, {"copies": "blocking"}, {"host": "serial"}, {"kv_cache": False}]
    return [replace(own, **change) for change in changes]


EXECUTION_IDS = ("background", "blocking", "serial", "uncached")


def all_runs() -> Iterator[Any]:
    """Policies and executions; those that do everything at random, and with that take long, under the first two."""
    for name, made in POLICIES.items():
        is_erratic = name in ("pre-gated", "erratic", "erratic, all layers' slots")
        for how, execution in list(zip(EXECUTION_IDS, executions(), strict=True))[: 2 if is_erratic else 4]:
            yield pytest.param(made, execution, id=f"{name}-{how}")


@pytest.mark.parametrize(("made", "execution"), list(all_runs()))
@pytest.mark.parametrize("budget", [2, (5, 30)], ids=str)
def test_text_never_depends_on_where_experts_live_and_decisions_are_the_simulators(
    live: LiveModel,
    expected: list[Generation],
    tmp_path: Path,
    made: Callable[[], Policy],
    budget: int | Sequence[int],
    execution: Execution,
) -> None:
    found, decisions, offload = run(live, made(), budget, execution)
    if live.network.norm.weight.device.type == "cpu":
        assert [one.tokens for one in found] == [one.tokens for one in expected]
    if live.kind != "accelerator":
        # Every routed weight is the same to the last bit: with a cache in all forwards, without in those that denoise,
        # for the block that is denoised.
        for one, other in zip(found, expected, strict=True):
            if execution.kv_cache:
                assert_same_routing(one.routings, other.routings)
            else:
                assert_same_routing(one.routings, denoising(other), num_rows=B)
    workload = recorded(found, tmp_path / "live.h5", execution)
    result, predicted = predict(live, workload, RTX4090, by_hand(made(), budget, execution, live))
    assert decisions == predicted
    assert (offload.hits, offload.misses) == (result.hits, result.misses)
    assert (offload.promotions, offload.evictions) == (result.promotions, result.evictions)


def recorded(found: Sequence[Generation], path: Path, execution: Execution) -> Workload:
    """What was run, as a simulator sees it."""
    with TraceWriter(
        path,
        config=HF_CONFIG,
        model_name="small",
        block_length=B,
        sampler={},
        seed=0,
        origin="recorded",
        kv_cache=execution.kv_cache,
    ) as writer:
        for one in found:
            writer.append(one.sequence_routing())
    with Trace.open(path) as trace:
        return trace.workload(execution.context)


# Those that decide by predicted times, made with a corpus.
BY_TIMES: dict[str, Callable[[Workload], Policy]] = {
    "gain": lambda corpus: policy("gain", corpus=corpus),
    "freetoken-hybrid": lambda corpus: policy("freetoken-hybrid"),
    "fiddler": lambda corpus: policy("fiddler", popularity=POPULARITY, mode="published"),
    "daop": lambda corpus: policy("daop", popularity=POPULARITY, mode="published"),
}


@pytest.mark.parametrize("live", ["cpu", "emulated"], indirect=True)
@pytest.mark.parametrize("execution", executions()[:2], ids=["background", "blocking"])
@pytest.mark.parametrize("make", BY_TIMES.values(), ids=BY_TIMES)
def test_policies_that_decide_by_predicted_times_decide_as_in_the_simulator(
    live: LiveModel,
    expected: list[Generation],
    tmp_path: Path,
    make: Callable[[Workload], Policy],
    execution: Execution,
) -> None:
    """The engine's tables of times reach further than the simulator's, whose longest forward is known."""
    corpus = recorded(expected[:1], tmp_path / "corpus.h5", execution)
    by_profile = []
    for number, profile in enumerate((RTX4090, SLOW_HOST)):
        choice = by_hand(make(corpus), (5, 20), execution, live, profile)
        decisions: list[Decision] = []
        with live.start(*choice[:3], decisions.append, costs=choice.costs(live, max_rows=100)) as offload:
            found = answers(live, offload)
        assert [one.tokens for one in found] == [one.tokens for one in expected]
        again = by_hand(make(corpus), (5, 20), execution, live, profile)
        workload = recorded(found, tmp_path / f"{number}.h5", execution)
        result, predicted = predict(live, workload, profile, again)
        assert decisions == predicted
        assert (offload.hits, offload.promotions, offload.drops) == (result.hits, result.promotions, result.drops)
        by_profile.append(decisions)
    assert by_profile[0] != by_profile[1]


def test_policies_that_decide_by_predicted_times_need_a_profile(live: LiveModel) -> None:
    def made() -> Policy:
        return policy("fiddler", popularity=POPULARITY, mode="published")

    with pytest.raises(InputError, match=r"'fiddler-as-published' decides by predicted times.*--hardware PROFILE"):
        by_hand(made(), 9, EXECUTIONS["overlapped"], live)
    choice = by_hand(made(), 9, EXECUTIONS["overlapped"], live, RTX4090)
    with (
        live.start(*choice[:3], costs=choice.costs(live, max_rows=B)) as offload,
        pytest.raises(InputError, match=r"tokens\(=16\) rows.*max_rows\(=8\)"),
    ):
        answers(live, offload, [PROMPTS[1]])


def test_slots_hold_the_experts_that_the_map_says(live: LiveModel, folder: Path) -> None:
    execution = EXECUTIONS["overlapped"]
    for made in (policy("lru"), policy("tide-as-coded", refresh_interval=1), Erratic(), Erratic("network")):
        with live.start(made, [11] * L, execution) as offload:
            answers(live, offload)
            for layer in range(L):
                slots = offload.slots.of[layer]
                resident = np.flatnonzero(slots >= 0)
                np.testing.assert_array_equal(resident, np.flatnonzero(offload.slots.residency.is_resident(layer)))
                assert len(set(slots[resident])) == len(resident)
                assert len(resident) <= 11 or made.scope == "network"
            slabs, places = offload.backend.slabs, list(offload.slots.places())
        # Closed, hence every copy is done.
        checkpoint = Checkpoint(folder)
        weights = [expert_weights(checkpoint, SMALL, SMALL.first_k_dense_replace + layer) for layer in range(L)]
        for layer, expert, slab, slot in places:
            stored = torch.cat([matrix.flatten() for matrix in weights[layer][expert]])
            assert torch.equal(slabs[slab][slot].to("cpu", stored.dtype), stored)


def test_text_does_not_depend_on_the_number_of_threads(folder: Path) -> None:
    expected: list[Generation] = []
    for device_threads, host_threads in ((1, 1), (2, 1), (1, 3), (3, 2)):
        settings = DeviceSettings(device="cpu", device_threads=device_threads, host_threads=host_threads)
        with open_model(folder, settings) as live:
            found, _, _ = run(live, policy("tide", refresh_interval=2), 9, EXECUTIONS["overlapped"])
        expected = expected or found
        for one, other in zip(found, expected, strict=True):
            assert one.tokens == other.tokens
            assert_same_routing(one.routings, other.routings)


def assert_same_routing(
    one: Sequence[Sequence[Routing]], other: Sequence[Sequence[Routing]], num_rows: int | None = None
) -> None:
    """Every choice and every weight of every forward, or of its last rows, to the last bit."""
    for layers, others in zip(one, other, strict=True):
        for a, b in zip(layers, others, strict=True):
            last = slice(None) if num_rows is None else slice(-num_rows, None)
            assert torch.equal(a.expert_ids[last], b.expert_ids[last])
            assert torch.equal(a.expert_weights[last], b.expert_weights[last])


def denoising(generation: Generation) -> list[list[Routing]]:
    """The routing of the forwards that denoise a block: without a cache there are no others."""
    pairs = zip(generation.routings, generation.forwards, strict=True)
    return [routings for routings, forward in pairs if forward.kind is ForwardKind.DENOISE]


class Restless(Policy):
    """Swaps four experts in every forward, whoever is used: hard on slots and copies. About as long as policies get."""

    name = "restless"

    def initial(self, shape: Shape) -> Placement:
        self.budgets = shape.budgets
        return Placement(tuple(tuple(range(budget // 2)) for budget in shape.budgets))

    def refresh(self, forward: ForwardInfo, layer: int, counts: np.ndarray, is_resident: np.ndarray) -> Moves:
        rng = np.random.default_rng([forward.index, layer])
        mine = is_resident[layer]
        there, away = rng.permutation(np.flatnonzero(mine)), rng.permutation(np.flatnonzero(~mine))
        num_out = min(4, len(there))
        num_in = min(4, len(away), self.budgets[layer] - len(there) + num_out)
        return Moves(tuple(away[:num_in].tolist()), tuple(there[:num_out].tolist()))


def test_a_users_own_policy_runs_and_changes_no_text(live: LiveModel, expected: list[Generation]) -> None:
    found, decisions, offload = run(live, Restless(), 12, EXECUTIONS["overlapped"])
    if live.network.norm.weight.device.type == "cpu":
        assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert offload.promotions == sum(len(decision.promote) for decision in decisions) > 100


def test_the_parts_of_a_run_add_up_and_the_link_carries_what_was_promoted(live: LiveModel) -> None:
    _, _, offload = run(live, policy("tide-as-coded", refresh_interval=1), 9, EXECUTIONS["overlapped"])
    assert sum(sum(parts.values()) for parts in offload.times.parts_ns.values()) == offload.times.makespan_ns
    if live.kind == "emulated":
        copy_ns = 1e9 * (1e-5 + live.sizes.expert_bytes / 20e6)
        assert offload.backend.busy_ns()["h2d"] >= 0.99 * (offload.promotions + 9 * L) * copy_ns
        # Those that filled the slots before the first forward are no part of the run.
        assert offload.busy_ns()["h2d"] <= offload.times.makespan_ns


def test_executions_that_the_engine_cannot_follow_are_refused(live: LiveModel) -> None:
    with pytest.raises(InputError, match=r"tide-as-coded.*logits.*kernels.*write_back"):
        live.start(policy("all-host"), [0] * L, EXECUTIONS["tide-as-coded"])


def test_settings_are_checked_at_the_door() -> None:
    with pytest.raises(InputError, match="did you mean 'emulated'"):
        DeviceSettings(device="emulate")
    with pytest.raises(InputError, match="host_threads"):
        DeviceSettings(device="cpu", host_threads=0)
    with pytest.raises(InputError, match="only the emulated device can be paced"):
        DeviceSettings(device="cpu", pace=Pace(host_factor=2))
    with pytest.raises(InputError, match=r"device_factor.*>= 1"):
        Pace(device_factor=0.5)


def test_the_engine_takes_from_a_plan_what_is_open_to_choice() -> None:
    assert engine_execution("emulated", EXECUTIONS["overlapped"], kv_cache=True).name == "emulated"
    changed = engine_execution("emulated", executions()[1], kv_cache=False)
    assert (changed.copies, changed.kv_cache, changed.host) == ("blocking", False, "parallel")
    assert changed.name == "emulated kv_cache=False copies=blocking"
    assert engine_execution("disk", executions()[0], kv_cache=True).name == "disk"
    with pytest.raises(InputError, match="--device disk, not cpu"):
        engine_execution("cpu", EXECUTIONS["disk"], kv_cache=True)
    with pytest.raises(InputError, match="overlapped, engine, emulated or disk"):
        engine_execution("cpu", EXECUTIONS["tide-as-coded"], kv_cache=False)


def test_a_grouped_product_is_that_of_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, matrices = torch.randn(9, 8, generator=generator), torch.randn(4, 8, 16, generator=generator)
    ends = torch.tensor([2, 2, 8, 9], dtype=torch.int32)
    group = torch.tensor([0, 0, 2, 2, 2, 2, 2, 2, 3])
    expected = torch.einsum("ni,nio->no", rows, matrices[group])
    torch.testing.assert_close(grouped_product(rows, matrices, ends), expected)
    monkeypatch.delattr(torch.nn.functional, "grouped_mm", raising=False)
    torch.testing.assert_close(grouped_product(rows, matrices, ends), expected)
