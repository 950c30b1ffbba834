"""How fast this machine is right now, against a profile of it.

What a shared machine reaches changes from minute to minute by more than a good prediction is off. So the same products
that a profile was calibrated with are timed beside each measured run, and the profile is set to what they say.
"""

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import NamedTuple, Self

import numpy as np
import torch

from tidesim.engine.calibrate import host
from tidesim.engine.calibrate.dense import ColdNetwork
from tidesim.engine.calibrate.experts import TYPICAL_ROWS, ColdExperts
from tidesim.engine.calibrate.measured import seconds
from tidesim.engine.cores import Cores
from tidesim.hardware import Hardware
from tidesim.hardware.machine import Curve
from tidesim.moe import MoEConfig

_REPEATS = 5


class Speed(NamedTuple):
    """FLOP/s of linear maps of a block of rows, and of experts of a few rows each, on cold weights."""

    dense: float
    experts: float

    @classmethod
    def between(cls, before: "Speed", after: "Speed") -> Self:
        """The mean of two."""
        return cls(*(float(np.mean(pair)) for pair in zip(before, after, strict=True)))


class Yardstick:
    """Times products on the cores of an emulated device, at the sizes of `model`."""

    def __init__(self, model: MoEConfig, cores: Cores, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        self._block = model.block_length
        self._params = model.attention_params + model.shared_params + model.router_params
        cache_bytes = host.cache_bytes()
        self._network = ColdNetwork(model, cores, cache_bytes, rng)
        experts = ColdExperts(model, torch.bfloat16, cache_bytes, rng)
        self._work, self._flops = experts.work(cores, TYPICAL_ROWS), experts.flops(TYPICAL_ROWS)

    def measure(self) -> Speed:
        """The speed at this moment; about half a second at the sizes of LLaDA2.0-mini."""
        with torch.inference_mode():
            dense_s = _typical(lambda: self._network.maps_s(self._block))
            experts_s = _typical(lambda: seconds(self._work))
        return Speed(2 * self._block * self._params / dense_s, self._flops / experts_s)

    def adjusted(self, profile: Hardware, speed: Speed) -> Hardware:
        """`profile` with its curves scaled so that they say what was measured just now; all else as it is.

        A profile without curves stays as it is: its figures are of no one moment.
        """
        device, machine_host = profile.device, profile.host
        if device.dense_curve is None or device.expert_curve is None or machine_host.expert_curve is None:
            return profile
        dense = speed.dense / _rate(device.dense_curve, self._block)
        experts = speed.experts / _rate(device.expert_curve, TYPICAL_ROWS)
        head = None if device.head_curve is None else _scaled(device.head_curve, dense)
        return replace(
            profile,
            device=replace(
                device,
                dense_curve=_scaled(device.dense_curve, dense),
                head_curve=head,
                expert_curve=_scaled(device.expert_curve, experts),
            ),
            host=replace(machine_host, expert_curve=_scaled(machine_host.expert_curve, experts)),
        )


def _typical(run: Callable[[], float]) -> float:
    run()
    return median(run() for _ in range(_REPEATS))


def _rate(curve: Curve, rows: int) -> float:
    """FLOP/s of the curve at so many rows."""
    return float(2 * rows / curve.product_s(np.array([rows]), 1)[0])


def _scaled(curve: Curve, factor: float) -> Curve:
    return Curve(curve.rows, tuple(rate * factor for rate in curve.flops_per_s))
