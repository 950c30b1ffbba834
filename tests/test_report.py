"""Pictures of runs."""

import json
from pathlib import Path

from tidesim.report import save_timeline
from tidesim.result import RESOURCES, Interval, RunResult


def test_a_timeline_keeps_every_interval_on_its_resources_track(tmp_path: Path) -> None:
    intervals = [Interval("device", "dense", 0, 1500, 0, None), Interval("h2d", "promote 7", 1500, 4000, 0, 2)]
    result = RunResult(
        policy="tide",
        budget=4,
        refresh_interval=2,
        execution="overlapped",
        context="block",
        hardware="toy",
        model="toy",
        trace_origin="synthetic",
        seed=0,
        num_forwards=1,
        generated_tokens=1,
        hits=1,
        misses=0,
        promotions=1,
        drops=0,
        evictions=0,
        num_copies=1,
        h2d_bytes=10,
        d2h_bytes=0,
        makespan_ns=4000,
        layer_parts_ns=((1500, 0, 0, 0, 2500),),
        busy_ns=dict.fromkeys(RESOURCES, 1500),
    )
    save_timeline(intervals, result, tmp_path / "t.json")
    document = json.loads((tmp_path / "t.json").read_text())
    tracks = {e["args"]["name"]: e["tid"] for e in document["traceEvents"] if e["ph"] == "M"}
    events = [e for e in document["traceEvents"] if e["ph"] == "X"]
    assert [(e["tid"], e["name"], e["ts"], e["dur"]) for e in events] == [
        (tracks["device"], "dense", 0.0, 1.5),
        (tracks["h2d"], "promote 7", 1.5, 2.5),
    ]
    assert events[1]["args"] == {"forward": 0, "layer": 2}
    assert document["metadata"]["trace_origin"] == "synthetic"
