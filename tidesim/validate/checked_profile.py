"""From a machine to a profile that has stood its test: measure, then predict a real denoising step and run it."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from tidesim.engine.calibrate import Settings, calibrate, check_step
from tidesim.engine.choice import by_hand
from tidesim.engine.device_calls import DeviceCalls
from tidesim.engine.live import DeviceSettings, dummy_model
from tidesim.engine.session import Session
from tidesim.execution import EXECUTIONS
from tidesim.hardware import Hardware
from tidesim.moe import load_moe_config, read_hf_config
from tidesim.policies import policy
from tidesim.result import RunResult
from tidesim.synthesize import synthesize
from tidesim.trace import Trace
from tidesim.validate.measuring import predict

CHECK_FORWARDS = 12
CHECK_LAYERS = 2


def calibrated_profile(
    shape: Path,
    device: DeviceSettings,
    settings: Settings,
    *,
    name: str,
    seed: int,
    progress: Callable[[str, float], None] | None = None,
) -> tuple[Hardware, float]:
    """The profile of this machine at the sizes of a model, and the error of its prediction of real steps.

    Parameters
    ----------
    shape : model folder, of which only config.json is used.
    device : what the profile is of. An emulated device that is paced gets the links of its pace.

    Raise ProfileError if the machine cannot be measured, or the prediction is off by more than a quarter.
    """
    model = load_moe_config(str(shape))
    link = device.pace.weights
    if link is not None:
        settings = replace(settings, copy_gb_s=link.bytes_per_s / 1e9)
    calls = DeviceCalls() if device.kind == "accelerator" else None
    rng = np.random.default_rng(seed)
    profile = calibrate(model, name, settings, accelerator=calls, progress=progress, rng=rng)
    profile = paced(profile, device)
    return profile, step_error(shape, device, profile, seed)


def paced(profile: Hardware, device: DeviceSettings) -> Hardware:
    """`profile` with the links that the emulated device is paced to; a link cannot be faster than memory copies."""
    pace = device.pace
    for name, link in (("h2d_pinned", pace.weights), ("d2h_pinned", pace.rows_out)):
        if link is None:
            continue
        fastest = profile.sources[f"links.{name}.bandwidth_gb_s"].value
        profile = profile.replace_figure(f"links.{name}.bandwidth_gb_s", min(fastest, link.bytes_per_s / 1e9))
        profile = profile.replace_figure(f"links.{name}.latency_us", link.latency_s * 1e6)
    return profile


def step_error(shape: Path, device: DeviceSettings, profile: Hardware, seed: int) -> float:
    """Predicted over measured seconds of real steps - 1: two layers of the shape, half of their experts resident.

    Raise ProfileError if that is more than a quarter.
    """
    model = load_moe_config(str(shape))
    num_layers = min(CHECK_LAYERS, model.num_layers)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "routing.h5"
        synthesize(read_hf_config(shape), file, model_name=model.name, num_sequences=1, seed=seed)
        with (
            Trace.open(file) as trace,
            dummy_model(shape, device, num_layers, seed) as live,
        ):
            made = policy("tide-as-coded", refresh_interval=2)
            choice = by_hand(made, model.num_experts // 2, EXECUTIONS["overlapped"], live)
            session = Session(live, choice, machine=device.description, seed=seed)
            workload = session.forced_workload(trace, [0], CHECK_FORWARDS)
            session.replay(trace, [0], CHECK_FORWARDS)
            measured = session.replay(trace, [0], CHECK_FORWARDS).result
            predicted, _ = predict(live, workload, profile, choice)
    check_step(_step_s(predicted), _step_s(measured))
    return predicted.makespan_s / measured.makespan_s - 1


def _step_s(run: RunResult) -> dict[str, float]:
    """Seconds of each part of a forward, on average."""
    return {part: seconds / run.num_forwards for part, seconds in run.breakdown_s.items()}
