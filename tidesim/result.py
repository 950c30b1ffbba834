"""What a run was and what it came to: one record for simulated and for measured runs.

Every metric is defined here and nowhere else. Inside, times are whole nanoseconds, so the parts of a run add up to
its duration exactly; outside they are seconds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import NamedTuple

# Where the time of a run goes. They follow one another: at any moment exactly one of them is running.
PARTS = {
    "dense": "kernels outside the routed experts: embedding, attention, router, shared expert, lm_head",
    "device": "kernels of routed experts on the device",
    "launch": "launching kernels, as far as it outlasts them",
    "host_wait": "waiting for missed experts on the host, after the device's own part of the layer",
    "copy_wait": "waiting for copies of expert weights",
}
# What is busy or idle. The device counts while kernels run, the links while they copy expert weights.
RESOURCES = ("device", "host", "h2d", "d2h")
OUTSIDE = "outside"  # of the MoE layers: embedding, dense layers, lm_head


@cache  # looking it up takes milliseconds, and every result asks
def tool_version() -> str:
    """Version of the installed tidesim, "unknown" in a source checkout that was never installed."""
    try:
        return metadata.version("tidesim")
    except metadata.PackageNotFoundError:
        return "unknown"


_RARE = ("drop", "ahead")


class Decision(NamedTuple):
    """What was decided in one MoE layer of one forward; ids in the order moved.

    Where all layers share their slots, `evict` names expert e of layer l as l * E + e. `drop` are the experts that were
    fetched for this forward only. `ahead` has (layer, promote, evict) for each layer that was moved in besides.
    """

    forward: int
    layer: int
    promote: tuple[int, ...]
    evict: tuple[int, ...]
    hits: int
    misses: int
    drop: tuple[int, ...] = ()
    ahead: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def num_promotions(self) -> int:
        """Experts promoted, in this layer and in others."""
        return len(self.promote) + sum(len(promote) for _, promote, _ in self.ahead)

    @property
    def num_evictions(self) -> int:
        """Experts evicted, for this layer and for others."""
        return len(self.evict) + sum(len(evict) for _, _, evict in self.ahead)

    def to_json(self) -> str:
        """One JSON object on one line, the same from the simulator and from the engine.

        `drop` and `ahead` are left out where there is nothing in them, as with most policies.
        """
        return json.dumps({key: value for key, value in self._asdict().items() if value or key not in _RARE})


class Interval(NamedTuple):
    """Who ran when: `resource` did `name` from `start_ns` to `end_ns`. `layer` is None outside the MoE layers."""

    resource: str
    name: str
    start_ns: int
    end_ns: int
    forward: int
    layer: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One run.

    Parameters
    ----------
    policy, budget, refresh_interval, execution, context, hardware, model, trace_origin, seed : what was run, by name.
        `budget` and `refresh_interval` are one number or one per MoE layer; the latter is None for policies without.
    refresh_steps : the denoising steps of a block that were refreshed, for all MoE layers or for each, if they were
        listed one by one; else None.
    version : of tidesim.
    num_forwards : forwards of all kinds.
    generated_tokens : tokens of the answers, over all sequences.
    hits, misses : routed (token, expert) pairs whose expert was, or was not, resident when its layer ran.
    promotions, evictions : moves decided, whether or not their copies were done when the run ended.
    drops : experts that were copied in for one forward only and forgotten; they are no promotions.
    num_copies : copies of expert weights that these moves take, in either direction.
    h2d_bytes, d2h_bytes : bytes of those copies; rows of tokens are not counted.
    makespan_ns : from the start of the first forward to the end of the last, experts of the start already loaded.
    layer_parts_ns : for each MoE layer, and at the end for what is outside of them, the time of each of `PARTS`.
    busy_ns : for each of `RESOURCES`, how long it was busy within the makespan.
    batch_size : most sequences that ran together.
    is_measured : whether a network ran and was timed, or the run was simulated.

    Raise ValueError if the parts do not add up to the makespan, a resource was busy for longer than the run, or
    there was nothing to run.
    """

    policy: str
    budget: int | tuple[int, ...]
    refresh_interval: int | tuple[int, ...] | None
    execution: str
    context: str
    hardware: str
    model: str
    trace_origin: str
    seed: int | None
    num_forwards: int
    generated_tokens: int
    hits: int
    misses: int
    promotions: int
    evictions: int
    drops: int
    num_copies: int
    h2d_bytes: int
    d2h_bytes: int
    makespan_ns: int
    layer_parts_ns: tuple[tuple[int, ...], ...] = field(repr=False)
    busy_ns: Mapping[str, int] = field(hash=False)
    refresh_steps: tuple[int, ...] | tuple[tuple[int, ...], ...] | None = None
    batch_size: int = 1
    is_measured: bool = False
    version: str = field(default_factory=tool_version)

    def __post_init__(self) -> None:
        if self.makespan_ns <= 0 or self.hits + self.misses <= 0:
            raise ValueError(f"makespan_ns(={self.makespan_ns}) and hits + misses must be > 0: nothing was run.")
        total_ns = sum(map(sum, self.layer_parts_ns))
        if total_ns != self.makespan_ns:
            raise ValueError(f"the parts add up to {total_ns} ns, not to makespan_ns(={self.makespan_ns}).")
        for resource in RESOURCES:
            if not 0 <= self.busy_ns[resource] <= self.makespan_ns:
                raise ValueError(f"{resource} busy for {self.busy_ns[resource]} of {self.makespan_ns} ns.")

    @property
    def makespan_s(self) -> float:
        """Duration of the run in seconds."""
        return self.makespan_ns / 1e9

    @property
    def tok_per_s(self) -> float:
        """Throughput: generated tokens over the whole run's seconds."""
        return self.generated_tokens / self.makespan_s

    @property
    def hit_rate(self) -> float:
        """Hits over all routed pairs."""
        return self.hits / (self.hits + self.misses)

    @property
    def breakdown_s(self) -> dict[str, float]:
        """Seconds of each of `PARTS`; together they are the makespan."""
        return {
            part: sum(column) / 1e9 for part, column in zip(PARTS, zip(*self.layer_parts_ns, strict=True), strict=True)
        }

    @property
    def breakdown_by_layer_s(self) -> dict[str, dict[str, float]]:
        """The breakdown of each MoE layer, by its number, and of what is "outside" of them."""
        names = [*map(str, range(len(self.layer_parts_ns) - 1)), OUTSIDE]
        return {
            name: {part: part_ns / 1e9 for part, part_ns in zip(PARTS, row, strict=True)}
            for name, row in zip(names, self.layer_parts_ns, strict=True)
        }

    @property
    def busy_share(self) -> dict[str, float]:
        """Share of the makespan that each of `RESOURCES` was busy."""
        return {resource: self.busy_ns[resource] / self.makespan_ns for resource in RESOURCES}

    def to_dict(self) -> dict[str, object]:
        """Every setting and metric by name, ready for JSON or a row of a table."""
        metrics = ("tok_per_s", "makespan_s", "num_forwards", "generated_tokens", "hit_rate", "hits", "misses")
        moves = ("promotions", "evictions", "drops", "num_copies", "h2d_bytes", "d2h_bytes")
        times = ("breakdown_s", "breakdown_by_layer_s", "busy_share")
        what = ("policy", "budget", "refresh_interval", "refresh_steps", "execution", "context", "batch_size")
        origin = ("hardware", "model", "trace_origin", "is_measured", "seed", "version")
        return {key: getattr(self, key) for key in metrics + moves + times + what + origin}

    def to_json(self) -> str:
        """`to_dict` as one JSON object on one line."""
        return json.dumps(self.to_dict())


def one_or_each(values: Sequence[int]) -> int | tuple[int, ...]:
    """One number if all layers have the same, else one for each: how results report budgets."""
    return values[0] if len(set(values)) == 1 else tuple(values)
