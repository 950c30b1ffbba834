"""Calibration: fits that recover what they were given, and every measurement at sizes that take no time.

How fast anything is depends on the machine, so no test here asks for a time.
"""

import os
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from accelerator_stand_in import StandIn

from tidesim.engine.calibrate import (
    Measured,
    Settings,
    calibrate,
    check_step,
    dense,
    experts,
    fit_copies,
    host,
    storage,
)
from tidesim.engine.calibrate import accelerator as on_accelerator
from tidesim.engine.calibrate import measured as measured_module
from tidesim.engine.calibrate.engine_op import ResidentLayers, launches
from tidesim.engine.calibrate.measured import MIN_ROUNDS, OtherProcesses, sample
from tidesim.engine.cores import Cores
from tidesim.errors import ProfileError
from tidesim.hardware import CURVE_KEYS, FIGURE_KEYS, load_hardware
from tidesim.moe import MoEConfig

MODEL = MoEConfig(
    name="small",
    num_dense_layers=1,
    num_layers=2,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=64,
    num_experts=32,
    top_k=4,
    num_shared_experts=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=1000,
    block_length=8,
)
CACHE_BYTES = 2**19
SIZES = (2**12, 2**16, 2**18)
# On a drive that others use too, a short read may take as long as one some times its size, but not hundreds of times.
READ_SIZES = (2**12, 2**18, 2**20)


def is_sane(measured: Measured) -> bool:
    return measured.value > 0 and measured.spread >= 0 and measured.repeats >= MIN_ROUNDS and bool(measured.note)


@pytest.fixture
def torch_rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# --- samples and fits ---


@pytest.mark.parametrize(("latency_s", "bytes_per_s"), [(8e-6, 25e9), (0.0, 1e9), (2e-3, 3e8)])
def test_a_fit_recovers_latency_and_bandwidth(latency_s: float, bytes_per_s: float) -> None:
    sizes = [2**power for power in range(12, 27)]
    fit = fit_copies({size: [latency_s + size / bytes_per_s] * 3 for size in sizes}, "exact")
    assert fit.latency_s.value == pytest.approx(latency_s, rel=1e-6, abs=1e-12)
    assert fit.bytes_per_s.value == pytest.approx(bytes_per_s, rel=1e-6)
    assert fit.bytes_per_s.note == (
        "exact; fitted to 15 sizes from 4096 to 67108864 bytes, off by 0.0 % (median) and 0.0 % (largest)"
    )
    assert (fit.bytes_per_s.spread, fit.bytes_per_s.repeats) == (0.0, 3)


def test_small_copies_count_as_much_as_large_ones_in_a_fit() -> None:
    """Large copies that are a tenth too slow would drown a latency of microseconds if absolute errors counted."""
    sizes = [2**power for power in range(12, 27)]
    times = {size: [1e-5 + size / 1e10 * (1.1 if size > 2**22 else 1.0)] for size in sizes}
    assert fit_copies(times, "").latency_s.value == pytest.approx(1e-5, rel=0.05)


def test_a_fit_has_no_negative_latency() -> None:
    fit = fit_copies({1000: [0.5e-6], 2000: [2e-6]}, "")
    assert fit.latency_s.value == 0
    assert fit.bytes_per_s.value > 0


def test_copies_that_take_no_longer_when_larger_are_refused() -> None:
    with pytest.raises(ProfileError, match="copies of 2000 bytes took no longer than copies of 1000"):
        fit_copies({1000: [2e-3], 2000: [1e-3]}, "copies")


def test_a_value_is_the_median_and_its_spread_that_of_the_quartiles() -> None:
    measured = Measured.of([1.0, 2.0, 4.0, 5.0, 100.0], "things")
    assert (measured.value, measured.spread, measured.repeats) == (4.0, 0.75, 5)
    assert measured.source == "things; median of 5, quartiles 75.0 % apart"
    assert measured.per(8.0).value == 2.0


def test_conditions_alternate_and_the_first_round_is_thrown_away() -> None:
    order: list[str] = []
    numbers = count()

    def note(name: str) -> Callable[[], int]:
        return lambda: (order.append(name), next(numbers))[1]

    assert sample({"a": note("a"), "b": note("b")}, 3, 60.0) == {"a": [2, 4, 6], "b": [3, 5, 7]}
    assert order == ["a", "b"] * 4


def test_sampling_ends_when_its_time_is_up_but_not_before_three_rounds() -> None:
    assert len(sample({"a": lambda: 1.0}, 1000, 0.0)["a"]) == MIN_ROUNDS
    assert len(sample({"a": lambda: time.sleep(0.002)}, 1000, 0.05)["a"]) < 1000


# --- what the system tells ---


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_the_last_level_cache_is_the_one_of_the_highest_level(tmp_path: Path) -> None:
    assert host.cache_bytes(tmp_path) == host.UNKNOWN_CACHE_BYTES
    for index, (level, size) in enumerate([("1", "32K"), ("3", "96M"), ("2", "512K"), ("4", "odd")]):
        write(tmp_path, f"sys/devices/system/cpu/cpu0/cache/index{index}/level", level)
        write(tmp_path, f"sys/devices/system/cpu/cpu0/cache/index{index}/size", size + "\n")
    assert host.cache_bytes(tmp_path) == 96 * 2**20


@pytest.mark.parametrize(
    ("group", "file"),
    [
        ("", "sys/fs/cgroup/memory.max"),
        ("0::/a/b\n", "sys/fs/cgroup/a/b/memory.max"),
        ("4:memory:/c\n", "sys/fs/cgroup/memory/c/memory.limit_in_bytes"),
    ],
)
def test_memory_ends_where_the_control_group_says(tmp_path: Path, group: str, file: str) -> None:
    whole = host.memory_bytes(tmp_path)
    assert whole > 0
    write(tmp_path, "proc/self/cgroup", group)
    write(tmp_path, file, "max\n")
    assert host.memory_bytes(tmp_path) == whole
    write(tmp_path, file, "123456789\n")
    assert host.memory_bytes(tmp_path) == 123456789


def test_other_processes_are_those_that_the_system_counts_beside_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert OtherProcesses(tmp_path).cores() is None
    monkeypatch.setattr(measured_module, "perf_counter", count(0, 10).__next__)
    ticks = os.sysconf("SC_CLK_TCK")
    write(tmp_path, "proc/stat", "cpu  100 0 100 5 5 0 0 0 0 0\ncpu0 1\n")
    others = OtherProcesses(tmp_path)
    write(tmp_path, "proc/stat", f"cpu  {100 + 15 * ticks} 0 100 9999 9999 0 0 0 0 0\ncpu0 1\n")
    assert others.cores() == pytest.approx(1.5, abs=0.1)


@pytest.mark.parametrize(
    ("busy", "kept"),
    [
        ([0.0, 2.0, 0.1, 0.0], [0, 2, 3]),
        ([2.0, 0.0, 2.0, 0.0, 0.0], [1, 3, 4]),
        ([3.0, 1.0, 3.0, 2.0, 2.0, 3.0], [1, 3, 4]),
    ],
)
def test_rounds_beside_busy_processes_are_left_out(
    busy: list[float], kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = count()
    monkeypatch.setattr(measured_module, "perf_counter", clock.__next__)
    values, cores = count(-1), iter(busy)
    monkeypatch.setattr(OtherProcesses, "__init__", lambda self: None)
    monkeypatch.setattr(OtherProcesses, "cores", lambda self: next(cores))
    # The clock moves on by 1 each time it is asked: before the rounds, and before each that is not of the first three.
    assert sample({"a": lambda: next(values)}, 3, (len(busy) - 2.5) / 2)["a"] == kept


# --- copies within memory ---


def test_copies_go_round_all_of_the_memory(rng: np.random.Generator) -> None:
    copies = host.HostCopies(2**16, rng)
    places = [source.data_ptr() for source, _ in copies.pieces(2**12, 16)]
    assert sorted(places) == [copies.source.data_ptr() + 2**12 * number for number in range(16)]
    for source, target in copies.pieces(2**12, 16):
        target.copy_(source)
    assert torch.equal(copies.source, copies.target)
    with pytest.raises(ValueError, match="must be at most the 65536 bytes"):
        copies.pieces(2**17, 1)


def test_fresh_copies_hold_what_was_copied(rng: np.random.Generator) -> None:
    copies = host.HostCopies(2**16, rng)
    (target,) = host.copy_fresh([copies.source])
    assert torch.equal(target, copies.source)


def test_host_copies_are_fitted(rng: np.random.Generator) -> None:
    copies = host.HostCopies(2**20, rng)
    for copy_s in (copies.copy_s, copies.fresh_copy_s):
        fit = host.copy_sweep(copy_s, 100_000, "copies", sizes=SIZES, repeats=3, limit_s=0.1)
        assert is_sane(fit.bytes_per_s)
        assert fit.latency_s.value >= 0
    share = host.duplex_share(copies, 2**18, repeats=3, limit_s=0.1)
    assert 0 < share.value <= 1


# --- experts ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_experts_have_a_rate_at_all_numbers_of_rows(
    torch_rng: torch.Generator, dtype: torch.dtype, num_threads: int
) -> None:
    cold = experts.ColdExperts(MODEL, dtype, CACHE_BYTES, torch_rng)
    with Cores(num_threads) as cores:
        curve = experts.expert_curve(cold, cores, rows=(1, 4), repeats=3, limit_s=0.1)
        assert is_sane(experts.experts_call(MODEL, cores, repeats=3, limit_s=0.1))
    assert list(curve) == [1, 4]
    assert all(map(is_sane, curve.values()))


def test_experts_are_more_than_a_cache_holds_unless_the_model_has_no_more(torch_rng: torch.Generator) -> None:
    cold = experts.ColdExperts(MODEL, torch.bfloat16, CACHE_BYTES, torch_rng)
    assert cold.num_experts * MODEL.expert_bytes >= 4 * CACHE_BYTES
    small = experts.ColdExperts(MODEL, torch.bfloat16, 2**40, torch_rng)
    assert small.num_experts == MODEL.num_layers * MODEL.num_experts


def test_each_set_of_experts_is_other_ones(torch_rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    cold = experts.ColdExperts(MODEL, torch.bfloat16, CACHE_BYTES, torch_rng)
    used: list[list[int]] = []
    with Cores(1) as cores:
        monkeypatch.setattr(cores, "run_experts", lambda x, pairs, ids, at, *rest: used.append(at.gate.tolist()))
        work = cold.work(cores, 2)
        for _ in range(cold.num_experts // cold.per_call):
            work()
    assert len({address for addresses in used for address in addresses}) == cold.num_experts


def test_shares_compare_each_load_with_itself_alone() -> None:
    lock = threading.Lock()

    def exclusive() -> None:
        with lock:
            time.sleep(0.001)

    free = experts.Load("free", lambda: time.sleep(0.001))
    shares = experts.shares_beside(free, free, duration_s=0.02, repeats=3, limit_s=0.5)
    assert all(0 < share.value <= 1 for share in shares)
    locked = experts.Load("locked", exclusive)
    first, second = experts.shares_beside(locked, locked, duration_s=0.05, repeats=3, limit_s=0.5)
    # Taking turns, the two together are half as fast; who gets how much is up to the lock.
    assert min(first.value, second.value) < 0.8


def test_a_load_that_outlasts_its_time_counts_once() -> None:
    calls: list[int] = []
    load = experts.Load("long", lambda: (calls.append(1), time.sleep(0.02))[1])
    assert load.repeat(threading.Barrier(1), 0.001) >= 0.02
    assert len(calls) == 1


def test_paced_copies_last_as_long_as_on_the_link(rng: np.random.Generator) -> None:
    copies = host.HostCopies(2**18, rng)
    load = experts.copying(copies, 2**16, copy_gb_s=0.01)
    assert load.repeat(threading.Barrier(1), 0.02) >= 2**16 / 1e7


@pytest.mark.usefixtures("quick")
def test_contention_has_the_six_shares_of_a_profile() -> None:
    load = experts.Load("load", lambda: time.sleep(0.001))
    shares = experts.contention(load, load, load, limit_s=0.1)
    assert {f"contention.{name}" for name in shares} == {
        key.path for key in FIGURE_KEYS if key.path.startswith("contention.")
    }


# --- dense parts ---


def test_dense_parts_have_rates(torch_rng: torch.Generator) -> None:
    with Cores(1) as cores:
        parts = dense.ColdNetwork(MODEL, cores, CACHE_BYTES, torch_rng)
        rates = dense.dense_rates(MODEL, parts, ops_per_layer=74, repeats=3, limit_s=0.1)
    for measured in (rates.bytes_per_s, rates.flops_per_s, rates.head_bytes_per_s, rates.head_flops_per_s):
        assert is_sane(measured)
    assert rates.op_s.value >= 0
    for fixed in (dense.tiny_op, host.worker_call):
        assert is_sane(fixed(repeats=3, limit_s=0.1))


def test_layer_maps_are_all_linear_maps_of_a_layer(torch_rng: torch.Generator) -> None:
    """All of a layer's matrices, so that bytes and operations are counted for what runs."""
    with Cores(1) as cores:
        parts = dense.ColdNetwork(MODEL, cores, CACHE_BYTES, torch_rng)
    matrices = [weight for weight in parts.network.layers[0].parameters() if weight.dim() == 2]
    norms = 2 * MODEL.hidden_size + 2 * MODEL.head_dim
    params = MODEL.attention_params + MODEL.shared_params + MODEL.router_params
    assert sum(weight.numel() for weight in matrices) == params - norms - MODEL.num_experts
    assert len(matrices) == 6


def test_the_head_is_cut_to_what_no_cache_holds(torch_rng: torch.Generator) -> None:
    with Cores(1) as cores:
        parts = dense.ColdNetwork(MODEL, cores, 2**14, torch_rng)
        assert parts.head_share == 128 / 1000
        assert parts.head_s(1) > 0


# --- drive ---


def test_a_drive_is_read_and_the_scratch_file_goes(tmp_path: Path, rng: np.random.Generator) -> None:
    with storage.scratch_file(tmp_path, 2**24, rng) as file:
        assert file.stat().st_size >= 2**21
        content = np.fromfile(file, np.uint8)
        fit = storage.drive_fit(file, 100_000, rng, sizes=READ_SIZES, depths=(1, 2), repeats=3, limit_s=0.2)
    assert is_sane(fit.bytes_per_s)
    assert fit.latency_s.value >= 0
    assert len(np.unique(content)) == 256
    assert not list(tmp_path.iterdir())


def test_pieces_of_a_scratch_file_differ(tmp_path: Path, rng: np.random.Generator, monkeypatch: Any) -> None:
    monkeypatch.setattr(storage, "_PIECE_BYTES", 2**12)
    with storage.scratch_file(tmp_path, 2**14, rng) as file:
        pieces = np.fromfile(file, np.uint8).reshape(4, -1)
    assert len(np.unique(pieces, axis=0)) == 4


def test_a_file_too_small_to_read_at_random_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    file = tmp_path / "few"
    file.write_bytes(b"x" * 10_000)
    with pytest.raises(ProfileError, match="has 10000 bytes, at least 2097152 are needed"):
        storage.drive_fit(file, 100_000, rng, sizes=SIZES)


def test_a_scratch_file_that_cannot_be_written_is_a_profile_error(tmp_path: Path, rng: np.random.Generator) -> None:
    with (
        pytest.raises(ProfileError, match=r"cannot be written \(No such file.*name another folder"),
        storage.scratch_file(tmp_path / "gone", 2**20, rng),
    ):
        pass


# --- the accelerator, with the CPU in its place ---


def test_device_links_are_fitted(rng: np.random.Generator) -> None:
    copies = on_accelerator.DeviceCopies(StandIn(), 2**20, rng)
    fits = on_accelerator.link_fits(copies, 100_000, SIZES, repeats=3, limit_s=0.3)
    for fit in (fits.h2d_pinned, fits.h2d_pageable, fits.d2h_pinned, fits.d2h_pageable, fits.d2h_fresh):
        assert is_sane(fit.bytes_per_s)
    assert 0 < fits.duplex.value <= 1
    assert copies.load(2**12, copy_gb_s=0.01).repeat(threading.Barrier(1), 0.001) >= 2**12 / 1e7


def test_device_kernels_have_rates(torch_rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_accelerator, "LARGE_ROWS", 8)
    monkeypatch.setattr(on_accelerator, "ROWS", (1, 2))
    cold = on_accelerator.DeviceExperts(MODEL, StandIn(), 2**10, torch_rng)
    rates = on_accelerator.kernel_rates(MODEL, cold, 2**14, repeats=3, limit_s=0.1)
    assert list(rates.curve) == [1, 2]
    for measured in (rates.bytes_per_s, rates.flops_per_s, rates.experts_bytes_per_s):
        assert is_sane(measured)
    assert min(rates.grouped_s.value, rates.gemm_s.value) >= 0
    cold.load(2).work()


def test_kernels_and_ops_are_what_the_engine_takes_over_their_numbers(torch_rng: torch.Generator) -> None:
    with Cores(1) as cores:
        layers = ResidentLayers(MODEL, StandIn(), cores, torch_rng)
        started_s = time.perf_counter()
        measured = launches(layers, repeats=3, limit_s=0.1)
        spent_s = time.perf_counter() - started_s
        layers.close()
    # Two of three samples are the median or longer, and each is of four forwards, or eight dense parts.
    assert 0 < measured.kernel_s.value * layers.execution.graph_kernels_per_layer * 2 * 8 < spent_s
    assert 0 <= measured.op_s.value * layers.execution.ops_per_layer * 2 * 4 < spent_s


def test_a_call_of_the_host_is_what_its_copies_do_not_take() -> None:
    whole = on_accelerator.host_call(StandIn(), 0.0, repeats=3, limit_s=0.1)
    assert is_sane(whole)
    assert on_accelerator.host_call(StandIn(), 1.0, repeats=3, limit_s=0.1).value == 0


def test_grouped_and_looped_experts_compute_the_same(torch_rng: torch.Generator) -> None:
    """The rows of the first expert, which both run on the same input."""
    cold = on_accelerator.DeviceExperts(MODEL, StandIn(), 2**10, torch_rng)
    grouped = cold.grouped(2, num_experts=1)()
    assert isinstance(grouped, torch.Tensor)
    gate, up = (cold._x[:2] @ cold._gate_up[0]).chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up) @ cold._down[0]
    torch.testing.assert_close(grouped, expected.float(), atol=1e-2, rtol=1e-2)


# --- the whole ---


def settings(folder: Path) -> Settings:
    return Settings(
        device_threads=1,
        host_threads=1,
        device_memory_bytes=2**30,
        drive_folder=folder,
        drive_bytes=2**24,
        copy_sizes=SIZES,
        read_sizes=READ_SIZES,
        budget_s=0.5,
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache so small that little memory is cold, and few rows."""
    monkeypatch.setattr(host, "cache_bytes", lambda: 2**16)
    monkeypatch.setattr(on_accelerator, "DEVICE_CACHE_BYTES", 2**16)
    monkeypatch.setattr(on_accelerator, "LARGE_ROWS", 64)
    monkeypatch.setattr(on_accelerator, "_NUM_CALLS", 20)
    monkeypatch.setattr(experts, "PHASE_S", 0.005)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("accelerator", [None, StandIn()], ids=["cores", "stand-in"])
def test_a_calibrated_profile_holds_every_figure_and_is_read_back(tmp_path: Path, accelerator: Any) -> None:
    seen: list[tuple[str, float]] = []
    threads = torch.get_num_threads()
    hardware = calibrate(
        MODEL,
        "here",
        settings(tmp_path),
        accelerator=accelerator,
        progress=lambda step, share: seen.append((step, share)),
    )
    assert set(hardware.sources) == {key.path for key in FIGURE_KEYS}
    # An accelerator's dense parts are taken as one roofline; the cores' own are measured by rows.
    measured = {key.path for key in CURVE_KEYS if accelerator is None or key.path.endswith("expert_curve")}
    assert set(hardware.curves) == measured
    assert {figure.kind for figure in (*hardware.sources.values(), *hardware.curves.values())} == {"calibrated"}
    assert hardware.device.memory_bytes == (2**30 if accelerator is None else 3 * 2**30)
    assert [seen[0], seen[-1]] == [("link", 0.0), ("done", 1.0)]
    assert torch.get_num_threads() == threads
    hardware.to_yaml(tmp_path / "here.yaml")
    assert load_hardware(str(tmp_path / "here.yaml")) == hardware
    assert [file.name for file in tmp_path.iterdir()] == ["here.yaml"]


@pytest.mark.usefixtures("quick")
def test_a_drive_file_that_is_there_is_read_in_place_of_a_new_one(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(2**24))
    given = Settings(**{**{name: getattr(settings(tmp_path), name) for name in Settings.__slots__}, "drive_file": file})
    hardware = calibrate(MODEL, "here", given)
    assert "of 0.0 GB" in hardware.sources["links.nvme.latency_us"].source
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("predicted_s", [0.76, 1.0, 1.24])
def test_a_step_within_a_quarter_of_the_prediction_is_accepted(predicted_s: float) -> None:
    check_step({"dense": predicted_s / 2, "device": predicted_s / 2}, {"dense": 0.75, "device": 0.25})


@pytest.mark.parametrize(("predicted_s", "off"), [(0.7, r"-30 %"), (1.3, r"\+30 %")])
def test_a_step_further_off_is_refused_with_both_times_by_part(predicted_s: float, off: str) -> None:
    said = rf"takes {predicted_s * 1e3:.1f} ms, measured are 1000\.0 ms: {off}, .*device 200\.0 and 250\.0\)\. End"
    with pytest.raises(ProfileError, match=said):
        check_step({"dense": predicted_s - 0.2, "device": 0.2}, {"dense": 0.75, "device": 0.25})
