"""Answers from rows: the best, the front of memory and speed, and what a figure matters."""

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidesim.errors import InputError
from tidesim.study import best, pareto, sensitivity, summary
from tidesim.study.columns import FIGURE, frame

LINK, CORES = "links.h2d_pinned.bandwidth_gb_s", "host.cores"
GIB = 2**30


def rows(*cells: tuple) -> pd.DataFrame:
    """(machine, budget, device memory in GiB, tok/s or None), a row each."""
    columns = ("machine", "budget_asked", "budget", "device_memory_bytes", "tok_per_s", "status")
    listed = [
        (
            name,
            str(budget),
            budget,
            None if speed is None else memory * GIB,
            speed,
            "infeasible" if speed is None else "ok",
        )
        for name, budget, memory, speed in cells
    ]
    same = {"trace": "t", "trace_origin": "recorded", "model": "m", "weight_bits": 16, "policy": "lru", "seed": 3}
    more = {"execution": "overlapped", "params": "{}", "batch_size": 1, "version": "1"}
    return frame([dict(zip(columns, cell, strict=True)) | same | more for cell in listed], ())


def told(table: pd.DataFrame) -> list[tuple]:
    return [*zip(table["machine"], table["budget"], strict=True)]


SOME = rows(
    ("slow", 1, 1, 5.0),
    ("slow", 2, 2, 7.0),
    ("slow", 3, 3, 7.0),
    ("slow", 4, 3, 6.0),
    ("big", 1, 1, 9.0),
    ("big", 2, 1, 9.0),
    ("big", 3, 2, 8.0),
    ("big", 4, 4, 9.5),
    ("small", 9, 9, None),
)


def test_the_best_is_the_fastest_and_of_equals_the_first() -> None:
    assert told(best(SOME)) == [("slow", 2), ("big", 4)]
    assert told(best(SOME, "budget")) == [("big", 1), ("big", 2), ("big", 3), ("big", 4)]
    assert told(best(SOME, ["machine", "weight_bits"])) == told(best(SOME))
    assert [*best(SOME).columns] == [*SOME.columns]
    assert best(SOME).dtypes.equals(SOME.dtypes)
    assert len(best(SOME[-1:])) == 0


def test_the_front_has_who_is_as_fast_with_less_memory_than_all_others() -> None:
    assert told(pareto(SOME)) == [("big", 1), ("big", 2), ("big", 4)]
    assert told(pareto(SOME, "machine")) == [("slow", 1), ("slow", 2), ("big", 1), ("big", 2), ("big", 4)]
    assert len(pareto(SOME[-1:])) == len(pareto(SOME[-1:], by="machine")) == 0


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=25))
@settings(max_examples=60, deadline=None)
def test_no_row_of_the_front_is_dominated_and_every_other_is(points: list[tuple[int, int]]) -> None:
    table = rows(*(("one", number, memory, float(speed)) for number, (memory, speed) in enumerate(points)))

    def is_dominated(point: tuple[int, int]) -> bool:
        return any(memory <= point[0] and speed >= point[1] and (memory, speed) != point for memory, speed in points)

    front = {*pareto(table)["budget"]}
    assert front == {number for number, point in enumerate(points) if not is_dominated(point)}
    memory = [*pareto(table)["device_memory_bytes"]]
    assert memory == sorted(memory)


def varied() -> pd.DataFrame:
    """Two figures of a machine, and two budgets; throughput goes with the root of the link and not with the cores."""
    cells = []
    for link, cores, budget in [(8, 4, 1), (2, 4, 1), (8, 8, 1), (2, 8, 1), (32, 4, 1), (8, 4, 2), (2, 4, 2)]:
        speed = budget * link**0.5
        own = {FIGURE + LINK: float(link), FIGURE + CORES: float(cores), "tok_per_s": speed, "budget": budget}
        machine = {"machine": f"m, {link}, {cores}", "machine_fingerprint": f"{link} {cores}", "changes": f"{link}"}
        cells.append(own | machine | {"budget_asked": str(budget), "status": "ok", "policy": "lru"})
    cells.append(cells[0] | {FIGURE + LINK: 64.0, "tok_per_s": None, "status": "infeasible"})
    cells.append(cells[0] | {FIGURE + LINK: None, "tok_per_s": 1.0})
    return frame(cells, (LINK, CORES))


def test_sensitivity_goes_from_a_value_to_the_next_with_all_else_equal() -> None:
    found = sensitivity(varied(), LINK)
    steps = found[[FIGURE + CORES, "budget_asked", "from_value", "to_value", "from_tok_per_s", "to_tok_per_s"]]
    assert [tuple(row) for row in steps.itertuples(index=False)] == [
        (4, "1", 2, 8, 2**0.5, 8**0.5),
        (4, "1", 8, 32, 8**0.5, 32**0.5),
        (8, "1", 2, 8, 2**0.5, 8**0.5),
        (4, "2", 2, 8, 2 * 2**0.5, 2 * 8**0.5),
    ]
    assert [*found["elasticity"]] == pytest.approx([0.5] * 4)
    assert [*found["change"]] == pytest.approx([1.0] * 4)
    assert [*found["field"]] == [LINK] * 4


def test_sensitivity_covers_all_varied_figures_by_default() -> None:
    found = sensitivity(varied())
    assert [*found["field"]] == [LINK] * 4 + [CORES] * 2
    cores = found[found["field"] == CORES]
    assert [*cores["elasticity"]] == [*cores["change"]] == [0, 0]


def test_sensitivity_to_a_setting_that_is_a_number() -> None:
    found = sensitivity(varied(), "budget")
    assert [tuple(row) for row in found[["from_value", "to_value", "change", "elasticity"]].to_numpy()] == [
        pytest.approx((1, 2, 1.0, 1.0)),
        pytest.approx((1, 2, 1.0, 1.0)),
    ]


def test_there_is_no_elasticity_at_zero() -> None:
    table = varied()[:2].assign(**{FIGURE + LINK: [0.0, 5.0]})
    (step,) = sensitivity(table, LINK).to_dict("records")
    assert pd.isna(step["elasticity"])
    assert step["change"] == pytest.approx(-0.5)


def test_unknown_columns_and_fields_are_refused() -> None:
    for question in (best, pareto):
        with pytest.raises(InputError, match="no column 'machines'; did you mean 'machine'"):
            question(SOME, "machines")
    with pytest.raises(InputError, match=f"do not vary 'links.h2d_pinned'; did you mean '{LINK}'"):
        sensitivity(varied(), "links.h2d_pinned")
    with pytest.raises(InputError, match="do not vary 'policy'"):
        sensitivity(varied(), "policy")


def test_a_summary_keeps_apart_what_cannot_be_compared() -> None:
    other = SOME.assign(weight_bits=4, tok_per_s=SOME["tok_per_s"] * 2)
    said = summary(pd.concat([SOME, other], ignore_index=True), "there")
    assert (said["num_rows"], said["infeasible"], said["failed"], said["failure"]) == (18, 2, 0, None)
    assert [(row["machine"], row["weight_bits"], row["tok_per_s"]) for row in said["best"]] == [
        ("slow", 16, 7.0),
        ("big", 16, 9.5),
        ("slow", 4, 14.0),
        ("big", 4, 19.0),
    ]
    assert said["varied"] == ["weight_bits"]
    assert (said["csv"], said["seed"], said["traces"]) == ("there/results.csv", 3, {"t": "recorded"})
    assert said["best"][0]["refresh_interval"] is None


def test_nothing_ran_is_a_summary_too() -> None:
    said = summary(SOME[-1:].reset_index(drop=True), "there")
    assert (said["best"], said["pareto"], said["infeasible"]) == ([], [], 1)
