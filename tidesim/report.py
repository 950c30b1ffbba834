"""Pictures of runs: so far the timeline, in the event format that Perfetto and chrome://tracing open."""

import json
from collections.abc import Sequence
from pathlib import Path

from tidesim.result import RESOURCES, Interval, RunResult


def save_timeline(intervals: Sequence[Interval], result: RunResult, path: Path) -> None:
    """Write who ran when as a Trace Event file (Trace Event Format, JSON object form): one track a resource.

    Times in the file are microseconds, as the format asks; `result` is kept beside the events as metadata.
    """
    tracks = {resource: number for number, resource in enumerate(RESOURCES)}
    names = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": resource}}
        for resource, number in tracks.items()
    ]
    events = [
        {
            "ph": "X",
            "name": interval.name,
            "pid": 0,
            "tid": tracks[interval.resource],
            "ts": interval.start_ns / 1e3,
            "dur": (interval.end_ns - interval.start_ns) / 1e3,
            "args": {"forward": interval.forward, "layer": interval.layer},
        }
        for interval in intervals
    ]
    document = {"traceEvents": names + events, "displayTimeUnit": "ms", "metadata": result.to_dict()}
    path.write_text(json.dumps(document) + "\n", encoding="utf-8")
