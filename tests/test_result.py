import json
from dataclasses import FrozenInstanceError, replace

import pytest

from tidesim.result import PARTS, RESOURCES, Decision, RunResult, one_or_each

# One MoE layer and what is outside of it; parts are dense, device, launch, host_wait, copy_wait.
PLAIN = RunResult(
    policy="tide",
    budget=4,
    refresh_interval=2,
    execution="overlapped",
    context="block",
    hardware="rtx4090",
    model="toy",
    trace_origin="synthetic",
    seed=7,
    num_forwards=5,
    generated_tokens=6,
    hits=30,
    misses=10,
    promotions=3,
    drops=0,
    evictions=2,
    num_copies=3,
    h2d_bytes=72,
    d2h_bytes=0,
    makespan_ns=2_000_000_000,
    layer_parts_ns=((100_000_000, 200_000_000, 0, 300_000_000, 400_000_000), (900_000_000, 0, 100_000_000, 0, 0)),
    busy_ns={"device": 1_200_000_000, "host": 500_000_000, "h2d": 2_000_000_000, "d2h": 0},
    version="1.2.3",
)


def test_metrics_follow_from_counts_and_times():
    assert PLAIN.makespan_s == 2.0
    assert PLAIN.tok_per_s == 3.0
    assert PLAIN.hit_rate == 0.75
    assert PLAIN.breakdown_s == {"dense": 1.0, "device": 0.2, "launch": 0.1, "host_wait": 0.3, "copy_wait": 0.4}
    assert PLAIN.breakdown_by_layer_s["0"]["copy_wait"] == 0.4
    assert PLAIN.breakdown_by_layer_s["outside"]["launch"] == 0.1
    assert PLAIN.busy_share == {"device": 0.6, "host": 0.25, "h2d": 1.0, "d2h": 0.0}


def test_json_holds_every_setting_and_metric():
    content = json.loads(PLAIN.to_json())
    assert set(content) == {
        *("tok_per_s", "makespan_s", "num_forwards", "generated_tokens", "hit_rate", "hits", "misses", "promotions"),
        *(
            "evictions",
            "drops",
            "num_copies",
            "h2d_bytes",
            "d2h_bytes",
            "breakdown_s",
            "breakdown_by_layer_s",
            "busy_share",
        ),
        *(
            "policy",
            "budget",
            "refresh_interval",
            "refresh_steps",
            "execution",
            "context",
            "hardware",
            "model",
            "trace_origin",
            "seed",
        ),
        *("batch_size", "is_measured", "version"),
    }
    assert content["budget"] == 4
    assert list(content["breakdown_s"]) == list(PARTS)
    assert list(content["busy_share"]) == list(RESOURCES)
    assert json.loads(replace(PLAIN, budget=(1, 2)).to_json())["budget"] == [1, 2]


def test_parts_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match=r"add up to 2000000000 ns, not to makespan_ns\(=2000000001\)"):
        replace(PLAIN, makespan_ns=2_000_000_001)


def test_nobody_is_busy_for_longer_than_the_run():
    with pytest.raises(ValueError, match="d2h busy for 2000000001 of 2000000000 ns"):
        replace(PLAIN, busy_ns={**PLAIN.busy_ns, "d2h": 2_000_000_001})


def test_an_empty_run_is_no_run():
    with pytest.raises(ValueError, match="nothing was run"):
        replace(PLAIN, hits=0, misses=0)


def test_results_are_values():
    assert replace(PLAIN) == PLAIN
    with pytest.raises(FrozenInstanceError):
        PLAIN.hits = 3


def test_the_version_is_filled_in():
    assert RunResult(**{name: getattr(PLAIN, name) for name in RunResult.__slots__ if name != "version"}).version


def test_a_decision_is_one_line_and_says_what_is_rare_only_where_it_happened():
    plain = '{"forward": 3, "layer": 1, "promote": [5, 2], "evict": [0], "hits": 7, "misses": 1'
    assert Decision(3, 1, (5, 2), (0,), 7, 1).to_json() == plain + "}"
    more = Decision(3, 1, (5, 2), (0,), 7, 1, (6,), ((2, (4,), (1,)),))
    assert more.to_json() == plain + ', "drop": [6], "ahead": [[2, [4], [1]]]}'


def test_equal_budgets_are_reported_once():
    assert one_or_each((4, 4)) == 4
    assert one_or_each((4, 5)) == (4, 5)
