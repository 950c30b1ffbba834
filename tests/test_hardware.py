"""A machine: how long its copies take, what-if, the way to a file and back, and its identity."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profile_cases import (
    NAMES,
    parsed,
    put,
    shipped_content,
)

from tidesim.errors import ProfileError
from tidesim.hardware import Hardware, Link, load_hardware

# --- copies ---------------------------------------------------------------------------------------------------------


def test_copy_takes_latency_plus_bytes_over_bandwidth() -> None:
    # One expert of LLaDA2.0-mini, 3 x 2048 x 512 x 2 = 6 291 456 bytes, at 25 GB/s: 251.65824 us, and 10 us before.
    link = Link(bytes_per_s=25e9, latency_s=10e-6)
    assert link.copy_s(6_291_456) == pytest.approx(261.65824e-6, rel=1e-12)
    assert link.copy_s(0) == 10e-6


def test_copy_refuses_negative_bytes() -> None:
    with pytest.raises(ValueError, match=r"num_bytes\(=-1\) must be >= 0"):
        Link(bytes_per_s=25e9, latency_s=0.0).copy_s(-1)


# --- what-if, round trip, identity -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_through_yaml_gives_an_equal_machine(name: str, tmp_path: Path) -> None:
    hardware = load_hardware(name)
    hardware.to_yaml(tmp_path / "again.yaml")
    again = load_hardware(str(tmp_path / "again.yaml"))
    assert again == hardware
    assert again.fingerprint == hardware.fingerprint


def test_writing_where_nothing_can_be_written_is_a_profile_error(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"absent.mine\.yaml: cannot be written"):
        load_hardware("rtx4090").to_yaml(tmp_path / "absent" / "mine.yaml")


@given(value=st.floats(min_value=0.01, max_value=2000))
def test_replaced_figure_changes_that_figure_alone(value: float) -> None:
    hardware = Hardware.from_content(parsed("rtx4090"), "rtx4090")
    changed = hardware.replace_figure("links.h2d_pinned.bandwidth_gb_s", value)
    assert changed.links is not None
    assert hardware.links is not None
    assert changed.links.h2d_pinned.bytes_per_s == value * 1e9
    assert changed.links.h2d_pinned.latency_s == hardware.links.h2d_pinned.latency_s
    assert (changed.device, changed.host, changed.nvme) == (hardware.device, hardware.host, hardware.nvme)
    assert {path for path in hardware.sources if changed.sources[path] != hardware.sources[path]} == {
        "links.h2d_pinned.bandwidth_gb_s"
    }
    assert changed.sources["links.h2d_pinned.bandwidth_gb_s"].kind == "guess"
    assert "23.9" in changed.sources["links.h2d_pinned.bandwidth_gb_s"].source


def test_replacing_an_unknown_figure_names_the_nearest() -> None:
    with pytest.raises(
        ProfileError, match=r"rtx4090: .*'links.h2d_pined.bandwidth'.*links\.h2d_pinned\.bandwidth_gb_s"
    ):
        load_hardware("rtx4090").replace_figure("links.h2d_pined.bandwidth", 50)


def test_replacing_a_link_of_a_unified_machine_is_refused() -> None:
    with pytest.raises(ProfileError, match="dgx-spark: there is no figure"):
        load_hardware("dgx-spark").replace_figure("links.h2d_pinned.bandwidth_gb_s", 50)


def test_replacing_by_an_absurd_value_is_refused() -> None:
    with pytest.raises(
        ProfileError, match=r"must be from 0\.25 to 2048 \(GiB\), not 0 @ \$\.device\.memory_gib\.value"
    ):
        load_hardware("rtx4090").replace_figure("device.memory_gib", 0)


def test_numpy_figures_can_be_written(tmp_path: Path) -> None:
    for value in (np.int64(48), np.float64(48), np.float32(48)):
        changed = Hardware.from_content(put(shipped_content(), "device.memory_gib.value", value), "mine.yaml")
        changed.to_yaml(tmp_path / "big.yaml")
        assert load_hardware(str(tmp_path / "big.yaml")) == changed
        assert changed.device.memory_bytes == 48 * 2**30


def test_fingerprint_follows_values_not_words() -> None:
    hardware, content = load_hardware("rtx4090"), shipped_content()
    reordered = dict(reversed(content.items()))
    reworded = put(put(content, "name", "mine"), "device.memory_gib.source", "counted")
    for same in (reordered, reworded, put(content, "device.memory_gib.value", 24.0)):
        assert Hardware.from_content(same, "mine.yaml").fingerprint == hardware.fingerprint
    assert hardware.replace_figure("host.cores", 17).fingerprint != hardware.fingerprint
    assert len({load_hardware(name).fingerprint for name in NAMES}) == len(NAMES)


def test_machines_can_be_sent_to_other_processes_and_kept_in_sets() -> None:
    hardware = load_hardware("l4")
    assert pickle.loads(pickle.dumps(hardware)) == hardware
    assert len({hardware, load_hardware("l4")}) == 1
