"""The machines that come with tidesim, beside their data sheets and each other."""

import re

import pytest
from profile_cases import DISCRETE, NAMES

from tidesim.hardware import FIGURE_KEYS, KINDS, load_hardware
from tidesim.shipped import shipped_folder

# Peaks of the data sheets: memory GB/s, dense bf16 TFLOP/s with fp32 accumulation, link GB/s one way.
PEAKS = {
    "rtx3090": (936, 71, 31.5),
    "rtx4060-laptop": (256, 28.3, 15.75),
    "rtx4090": (1008, 165.2, 31.5),
    "rtx5090": (1792, 209.5, 63),
    "rtx-pro-6000": (1792, 467.8, 63),
    "l4": (300, 121, 31.5),
    "a100-40gb": (1555, 312, 31.5),
    "a100-80gb": (2039, 312, 31.5),
    "h100-pcie": (2000, 756, 63),
    "h100-sxm": (3350, 989, 63),
    "h200": (4800, 989, 63),
}


def test_the_thirteen_machines_are_shipped() -> None:
    assert set(NAMES) == {*PEAKS, "jetson-agx-orin", "dgx-spark"}


@pytest.mark.parametrize("name", NAMES)
def test_shipped_profile_loads_under_its_own_name(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.name == name
    assert hardware == load_hardware(f"{name}.yaml")
    assert hardware == load_hardware(str(shipped_folder("hardware_profiles") / f"{name}.yaml"))
    assert hardware.is_unified == (hardware.links is None) == (name not in DISCRETE)


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_kind_and_source(name: str) -> None:
    hardware = load_hardware(name)
    expected = {key.path for key in FIGURE_KEYS if not (key.is_optional or (hardware.is_unified and key.is_copy))}
    assert set(hardware.sources) == expected
    for path, figure in hardware.sources.items():
        assert figure.kind in KINDS, path
        assert len(figure.source) > 5, path
        if figure.kind == "derived":
            assert re.search(r"\d", figure.source), f"{path} must state its arithmetic"


@pytest.mark.parametrize("name", NAMES)
def test_derived_products_in_sources_are_the_values(name: str) -> None:
    # Sources that open with a product, "0.92 x 1008 GB/s ...", must give the figure they stand with.
    for path, figure in load_hardware(name).sources.items():
        if match := re.match(r"(\d[\d.]*)(?: sockets)? x (\d[\d.]*)(?: x (\d[\d.]*))? [GTu]", figure.source):
            product = float(match[1]) * float(match[2]) * float(match[3] or 1)
            assert figure.value == pytest.approx(product, rel=0.005), path


@pytest.mark.parametrize("name", sorted(PEAKS))
def test_achievable_figures_stay_near_or_below_the_data_sheet(name: str) -> None:
    hardware = load_hardware(name)
    memory_gb_s, tflops, link_gb_s = PEAKS[name]
    assert hardware.links is not None
    assert 0.7 * memory_gb_s <= hardware.device.bytes_per_s / 1e9 <= 0.95 * memory_gb_s
    assert 0.7 * memory_gb_s <= hardware.device.experts_bytes_per_s / 1e9 <= 0.96 * memory_gb_s
    # GeForce clocks exceed the boost that their nominal peak is stated for.
    assert 0.5 * tflops <= hardware.device.flops_per_s / 1e12 <= 1.16 * tflops
    assert 0.15 * tflops <= hardware.device.grouped_flops_per_s / 1e12 <= 0.4 * tflops
    assert 0.75 * link_gb_s <= hardware.links.h2d_pinned.bytes_per_s / 1e9 <= 0.9 * link_gb_s
    assert 0.75 * link_gb_s <= hardware.links.d2h_pinned.bytes_per_s / 1e9 <= 0.91 * link_gb_s


@pytest.mark.parametrize("name", DISCRETE)
def test_pageable_copies_are_no_faster_than_pinned(name: str) -> None:
    links = load_hardware(name).links
    assert links is not None
    for num_bytes in (0, 4096, 6_291_456, 1 << 30):
        assert links.h2d_pinned.copy_s(num_bytes) <= links.h2d_pageable.copy_s(num_bytes)
        assert links.d2h_pinned.copy_s(num_bytes) <= links.d2h_pageable.copy_s(num_bytes)
        assert links.d2h_pageable.copy_s(num_bytes) <= links.d2h_fresh.copy_s(num_bytes)


@pytest.mark.parametrize("name", NAMES)
def test_device_outpaces_its_host_and_eager_ops_outlast_launches(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.host.bytes_per_s < hardware.device.bytes_per_s
    assert hardware.host.bf16_flops_per_s < hardware.device.flops_per_s
    assert hardware.device.kernel_launch_s < hardware.device.eager_op_s < hardware.host.call_overhead_s


def test_devices_rank_as_their_generations_do() -> None:
    ranking = ("rtx4060-laptop", "l4", "rtx3090", "rtx4090", "a100-40gb", "a100-80gb", "h100-pcie", "h100-sxm", "h200")
    rates = [load_hardware(name).device.bytes_per_s for name in ranking]
    assert rates[:1] + rates[2:] == sorted(rates[:1] + rates[2:])
    a100, h100 = load_hardware("a100-80gb").device, load_hardware("h100-sxm").device
    assert h100.flops_per_s > 2 * a100.flops_per_s
    assert h100.experts_bytes_per_s > a100.experts_bytes_per_s
    assert h100.gemm_overhead_s <= a100.gemm_overhead_s


def test_ice_lake_hosts_are_slower_in_bf16_than_in_fp32() -> None:
    for name in ("l4", "a100-40gb", "a100-80gb"):
        host = load_hardware(name).host
        assert 0.13 <= host.bf16_flops_per_s / host.fp32_flops_per_s <= 0.27


def test_units_are_converted_once() -> None:
    hardware = load_hardware("rtx4090")
    assert hardware.device.memory_bytes == 24 * 2**30
    assert isinstance(hardware.device.memory_bytes, int)
    assert hardware.device.bytes_per_s == 927e9
    assert hardware.device.flops_per_s == pytest.approx(167.9e12)
    assert hardware.device.eager_op_s == pytest.approx(7e-6)
    assert hardware.host.cores == 16
    assert hardware.host.bf16_flops_per_s == 2200e9
    assert hardware.nvme.latency_s == pytest.approx(100e-6)
    assert hardware.links is not None
    assert hardware.links.duplex_factor == 0.54
