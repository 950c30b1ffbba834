"""Explanations as people read them."""

import pytest
from rich.console import Console

from tidesim.alternatives import Candidate
from tidesim.critical_path import CriticalPath, ResourceShare, Stretch, WorkShare
from tidesim.explained import critical_path_tables, near_optimal_table, shadow_price_table
from tidesim.what_if import ShadowPrice


@pytest.fixture
def lines():
    """The lines of a table, each with single spaces."""

    def read(table):
        console = Console(width=118, highlight=False)
        with console.capture() as captured:
            console.print(table)
        return [" ".join(line.split()) for line in captured.get().splitlines()]

    return read


def path_of(**changes):
    share = ResourceShare(resource="host", path_ns=1_200_000_000, share=0.8, bound_ns=600_000_000, slack_ns=900_000_000)
    stretch = Stretch(
        resource="h2d",
        path_ns=2_500_000,
        num_tasks=9,
        first_work="copies to the device",
        first_forward=1,
        first_layer=0,
        last_work="copies to the device",
        last_forward=1,
        last_layer=None,
    )
    work = WorkShare(resource="host", work="missed experts", path_ns=1_200_000_000, share=0.8, num_tasks=7)
    plain = {"num_forwards": 3, "all_forwards": 10, "num_sequences": 1, "num_tasks": 99, "is_contended": False}
    made = {"makespan_ns": 1_500_000_000, "resources": (share,), "works": (work,), "stretches": (stretch,)}
    return CriticalPath(**plain | made | changes).to_dict()


def test_a_critical_path_says_what_it_was_found_on_and_what_each_resource_would_save(lines):
    shown = lines(critical_path_tables(path_of()))
    assert "found on the first 3 of 10 forwards (1 sequence), which take 1.500 s; 99 tasks" in shown
    assert any(line.startswith("host 1,200.0 ms 80.0 % 600.0 ms 60.0 % missed experts on the host") for line in shown)
    assert "missed experts host 1,200.0 ms 80.0 % 7" in shown
    assert "forward 1, layer 0: copies to the device forward 1: copies to the device h2d 2.5 ms 9" in shown
    assert not any(line.startswith("note") for line in shown)


def test_a_path_of_everything_and_of_who_slow_each_other_says_so(lines):
    shown = lines(critical_path_tables(path_of(num_forwards=10, num_sequences=2, is_contended=True)))
    assert "found on all 10 forwards (2 sequences), which take 1.500 s; 99 tasks" in shown
    assert any(line.startswith("note device, host and copies slow each other") for line in shown)


def test_shadow_prices_are_told_with_their_gain(lines):
    price = ShadowPrice(
        name="1 GiB more device memory",
        figures=("device.memory_gib",),
        factor=25 / 24,
        num_slots=153,
        before_tok_per_s=20.0,
        after_tok_per_s=21.2,
        gain=0.06,
    )
    shown = lines(shadow_price_table([price.to_dict()]))
    assert shown[0] == "What more would give, against 20.00 tok/s on the machine as it is"
    assert "1 GiB more device memory (153 experts more) 21.20 +6.0 % device.memory_gib x 1.04" in shown


def test_what_is_nearly_as_fast_is_told_the_simplest_first(lines):
    static = Candidate(description="static", moving="never", budget=(4, 6), tok_per_s=49.0)
    shown = lines(near_optimal_table([static.to_dict()], best_tok_per_s=50.0))
    assert shown[0] == "Within 2 % of the fastest (50.00 tok/s), the simplest first"
    assert "static nobody moves uneven 0 10 49.00 2.0 %" in shown
