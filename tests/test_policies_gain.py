"""tidesim's own policy: what it decides is worked out by hand, and is the same when it is written at once.

Of the toy machine, in ns: a copy takes 310, a resident or fetched expert 100, a missed one of n rows 570 + 200 n.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from gain_cases import costs_of, info, sequences_of
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator_cases import cases, hardware, play
from toy import toy_workload

from tidesim.errors import InputError
from tidesim.execution import EXECUTIONS, Costs
from tidesim.hardware import Curve, load_hardware
from tidesim.moe import load_moe_config
from tidesim.policies import Ahead, Serving, Shape, gain, gain_kernel, policy
from tidesim.policies.gain import Gain
from tidesim.policies.interface import AHEAD, DROP, KEEP, NOBODY, forwards_of
from tidesim.policies.pieces import Score
from tidesim.residency import NO_MOVES, Moves, Residency
from tidesim.shipped import find_shipped
from tidesim.simulator.work import Routed
from tidesim.trace import Trace

# --- what is decided ---


class Told(Score):
    """Expects what it is told, whatever happens."""

    def __init__(self, worth: Sequence[float], at_start: Sequence[float]) -> None:
        self._worth, self.at_start = worth, np.array([at_start])
        self.rows = np.ones((1, len(worth)), np.int64)

    def begin(self, shape: Shape) -> None:
        super().begin(shape)
        self.table[:] = self._worth


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch):
    """Make a policy that thinks eight experts worth so much, and begins with experts 6 and 7 or others."""

    def make(worth: dict[int, float], start: Sequence[int] = (6, 7)) -> Gain:
        table = [worth.get(expert, 0.0) for expert in range(8)]
        at_start = [float(expert in start) for expert in range(8)]
        monkeypatch.setattr(gain, "Foresight", lambda _: Told(table, at_start))
        return Gain(toy_workload([[2] * 8]))

    return make


def asked(made: Gain, counts: Sequence[int], costs: Costs, *, residents: Sequence[int] = (6, 7)) -> Serving:
    """The answer to the first forward that it sees, with two slots."""
    made.initial(Shape(8, (2,), costs))
    rows, is_resident = np.array(counts, np.int32), np.zeros((1, 8), np.bool_)
    is_resident[0, list(residents)] = True
    made.observe(info(), 0, rows, is_resident)
    return made.serve(info(), 0, np.flatnonzero((rows > 0) & ~is_resident[0]).tolist(), rows, is_resident)


@pytest.mark.parametrize(
    ("copies", "host", "num_fetched"),
    [
        # Device, the link's 310 a copy and 100 for the last, beside the host's 770 for each of the others:
        # k = 3: max(1030, 2310), k = 4: max(1340, 1540) = 1540, k = 5: max(1650, 770) = 1650.
        ("background", "parallel", 4),
        # Copy and run one after another, 410 each: k = 3: max(1230, 2310), k = 4: max(1640, 1540) = 1640, k = 5: 2050.
        ("blocking", "parallel", 4),
        # One after the other: each fetched one saves 770 and takes 310, or 410.
        ("background", "serial", 6),
        ("blocking", "serial", 6),
    ],
)
def test_as_many_are_fetched_just_in_time_as_make_the_layer_shortest(told, copies, host, num_fetched: int) -> None:
    costs = costs_of(copies=copies, host=host)
    serving = asked(told({}), [1, 1, 1, 1, 1, 1, 0, 0], costs)
    # Worth nothing later, they go through scratch memory; of equal ones the lower ids.
    assert serving == Serving(drop=tuple(range(num_fetched)))


def test_those_that_take_the_host_longest_are_fetched_first(told) -> None:
    # One, three and two rows take the host 770, 1170 and 970. k = 1: max(410, 1740), k = 2: max(720, 770), k = 3: 1030.
    assert asked(told({}), [1, 3, 2, 0, 0, 0, 0, 0], costs_of()) == Serving(drop=(1, 2))


def test_on_a_tie_fewer_are_fetched(told) -> None:
    # One miss of one row: 410 if it is fetched, and by the host 100 + 50 + 20 + 200 = 370, or 40 more for its call.
    for call_overhead_s, drop in ((89e-9, ()), (90e-9, ()), (91e-9, (0,))):
        machine = hardware("host", bytes_per_s=0.24e9, call_overhead_s=call_overhead_s)
        costs = costs_of(machine, copies="blocking", host="serial")
        assert asked(told({}), [1, 0, 0, 0, 0, 0, 0, 0], costs).drop == drop


def test_where_a_copy_never_pays_nothing_moves(rng) -> None:
    # An expert of one row takes 370 on the host, and is worth at most 2.533 x 370 = 937 later: a copy of 1210 and its
    # run of 100 never pay. With blocking copies nothing else begins one. Each of its 91 parts takes 10 more.
    machine = hardware("host", bytes_per_s=0.24e9)
    tables = rng.permuted(np.tile([1, 1, 1, 1, 1, 1, 0, 0], (30, 1)), axis=1).tolist()
    made = Gain(sequences_of(tables))
    _, result = play(tables, made, machine=machine, copies="blocking", host="serial", copies_per_expert=91)
    assert (result.promotions, result.drops, result.num_copies) == (0, 0, 0)
    assert result.misses > 0


def test_who_is_worth_more_than_the_worst_resident_stays(told) -> None:
    # Both are fetched, in max(2 x 310 + 100, 0) = 720 rather than max(410, 770). Expert 0 beats 6 and takes its slot,
    # expert 1 would have to beat 7. What is worth most comes first.
    serving = asked(told({0: 1.0, 1: 0.25, 6: 0.5, 7: 2.0}), [1, 1, 0, 0, 0, 0, 0, 0], costs_of())
    assert serving == Serving(Moves((0,), (6,)), drop=(1,))
    serving = asked(told({0: 0.25, 1: 1.0, 6: 2.0, 7: 0.5}), [1, 1, 0, 0, 0, 0, 0, 0], costs_of())
    assert serving == Serving(Moves((1,), (7,)), drop=(0,))
    # Worth as much as the worst resident is not worth more.
    assert asked(told({0: 0.5, 6: 0.5, 7: 2.0}), [1, 0, 0, 0, 0, 0, 0, 0], costs_of()) == Serving(drop=(0,))


def test_what_stays_may_cost_time_now(told) -> None:
    # The host takes 370 and copy and run 410: nobody is fetched for this forward's sake. Later it saves 370 for each
    # use that its victim would not have had: 0.2 of them pay the 40, 0.1 do not.
    costs = costs_of(hardware("host", bytes_per_s=0.24e9), copies="blocking", host="serial")
    one = [1, 0, 0, 0, 0, 0, 0, 0]
    assert asked(told({0: 1.2, 6: 1.0, 7: 1.0}), one, costs) == Serving(Moves((0,), (6,)))
    assert asked(told({0: 1.1, 6: 1.0, 7: 1.0}), one, costs) == Serving()


def test_free_slots_are_used_first(told) -> None:
    for worth in (0.2, 2.0):
        made = told({0: 1.0, 1: 0.25, 7: worth})
        assert asked(made, [1, 0, 0, 0, 0, 0, 0, 0], costs_of(), residents=[7]) == Serving(Moves((0,), ()))
    assert asked(made, [1, 1, 0, 0, 0, 0, 0, 0], costs_of(), residents=[7]) == Serving(Moves((0,), ()), drop=(1,))
    made = told({0: 1.0, 1: 0.25, 7: 0.2})
    assert asked(made, [1, 1, 0, 0, 0, 0, 0, 0], costs_of(), residents=[7]) == Serving(Moves((0, 1), (7,)))
    assert ahead(made, [7]) == Moves((0,), ())
    assert ahead(told({7: 0.2}), [7]) == NO_MOVES


def ahead(made: Gain, residents: Sequence[int], **changes) -> Moves:
    """The moves ahead, of the one layer there is, in a forward without misses."""
    asked(made, [0] * 8, costs_of(**changes), residents=residents)
    is_resident = np.zeros((1, 8), np.bool_)
    is_resident[0, list(residents)] = True
    return moved(made.ahead(info(), 0, np.zeros(8, np.int32), is_resident))


def moved(answer: Sequence[Ahead]) -> Moves:
    """The moves of an answer that names at most one layer."""
    assert len(answer) <= 1
    return answer[0].moves if answer else NO_MOVES


def test_an_idle_link_brings_in_the_best_for_the_worst(told) -> None:
    made = told({2: 1.0, 3: 1.0, 4: 0.9, 6: 0.5, 7: 2.0})
    assert ahead(made, [6, 7]) == Moves((2,), (6,))
    # Only if it is worth so much more that the copy is not in the way.
    assert ahead(told({2: 1.04, 6: 1.0, 7: 2.0}), [6, 7]) == NO_MOVES
    assert ahead(told({2: 1.06, 6: 1.0, 7: 2.0}), [6, 7]) == Moves((2,), (6,))
    # With blocking copies no link is idle, with every expert there nobody is absent, and without a slot nobody stays.
    assert ahead(made, [6, 7], copies="blocking") == NO_MOVES
    assert ahead(made, range(8)) == NO_MOVES
    made.initial(Shape(8, (0,), costs_of()))
    assert moved(made.ahead(info(), 0, np.zeros(8, np.int32), np.zeros((1, 8), np.bool_))) == NO_MOVES


@pytest.mark.parametrize(
    ("rows", "expected"), [(0, [True, False, True, False, True]), (1, [True, True, False, True, False])]
)
def test_a_busy_link_brings_in_nobody(told, rows: int, expected: list[bool]) -> None:
    # A copy takes 2110, a forward 1000, and 200 more if both residents have rows. Routers are done at 1000, 2000, ...:
    # copies end at 3110 (later than the router at 3000), at 5220 (later than the one at 5000), ...; or routers at 1000,
    # 2200, 3400, ...: copies end at 3110, and at 5220 (later than the one at 4600), ...
    made = told({2: 1.0, 6: 0.5, 7: 2.0})
    made.initial(Shape(8, (2,), costs_of(copies_per_expert=181)))
    counts, is_resident = np.array([0] * 6 + [rows] * 2, np.int32), np.zeros((1, 8), np.bool_)
    is_resident[0, [6, 7]] = True
    answers = []
    for index in range(5):
        made.observe(info(index), 0, counts, is_resident)
        made.serve(info(index), 0, [], counts, is_resident)
        answers.append(bool(made.ahead(info(index), 0, counts, is_resident)))
    assert answers == expected


def test_without_predicted_times_it_cannot_decide() -> None:
    with pytest.raises(InputError, match="policy 'gain' decides by predicted times; give the machine's profile"):
        policy("gain", corpus=toy_workload([[2] * 8])).initial(Shape(8, (2,)))


def test_it_begins_with_those_that_blocks_begin_with() -> None:
    corpus = sequences_of([[0, 0, 2, 2], [4, 0, 0, 0], [4, 0, 0, 0]], [[0, 0, 0, 4], [4, 0, 0, 0]])
    model_costs = costs_of()
    assert Gain(corpus).initial(Shape(4, (1,), model_costs)).experts == ((3,),)
    assert Gain(corpus).initial(Shape(4, (3,), model_costs)).experts == ((0, 2, 3),)


def test_decisions_are_the_same_in_every_run_and_of_every_object(rng) -> None:
    tables = rng.permuted(np.tile([2, 1, 1, 1, 1, 0, 0, 0], (20, 1)), axis=1).tolist()
    corpus = sequences_of(tables[:10], tables[10:])
    once, again = Gain(corpus), Gain(corpus)
    runs = [play(tables, made, copies="background", host="parallel") for made in (once, once, again)]
    assert runs[0] == runs[1] == runs[2]
    assert runs[0][1].promotions > 0
    assert runs[0][1].drops > 0


def test_a_forward_runs_as_it_was_decided(told) -> None:
    # Residents 0, with a row, and 7. Of five misses k are fetched: device 100, then each at 310 k + 100, beside the
    # host's 770 for each of the rest: k = 3: 1540, k = 4: 1340, k = 5: 1650. Expert 2 is worth more than 7 and stays.
    # The link would be idle before the next router is done, and expert 1 is worth more than 0.
    made = told({0: 2.0, 1: 2.4, 2: 3.0, 7: 0.5}, start=(0, 7))
    timeline, result = play([[1, 0, 1, 1, 1, 1, 1, 0]], made, copies="background", host="parallel")
    assert timeline == [
        ("device", "entry", 0, 200),
        ("device", "dense", 200, 1200),
        ("device", "experts", 1200, 1300),
        ("h2d", "promote 2", 1200, 1510),
        ("host", "experts", 1200, 1970),
        ("device", "expert 2", 1510, 1610),
        ("h2d", "promote 3", 1510, 1820),
        ("device", "expert 3", 1820, 1920),
        ("h2d", "promote 4", 1820, 2130),
        ("device", "expert 4", 2130, 2230),
        ("h2d", "promote 5", 2130, 2440),
        ("device", "expert 5", 2440, 2540),
        ("h2d", "promote 1", 2440, 2750),
        ("device", "head", 2540, 3540),
    ]
    assert (result.hits, result.misses, result.promotions, result.evictions, result.drops) == (1, 5, 2, 2, 3)


# --- times on paper ---


@st.composite
def layers(draw: st.DrawFn):
    """What a layer of the toy network may cost, and who has rows and is resident."""
    choices = {
        "copies": st.sampled_from(["blocking", "background"]),
        "kernels": st.sampled_from(["loop", "grouped"]),
        "host": st.sampled_from(["serial", "parallel"]),
        "host_calls": st.sampled_from(["expert", "layer"]),
        "returns": st.sampled_from(["row", "pair"]),
        "is_async": st.booleans(),
    }
    changes = {key: draw(choice) for key, choice in choices.items()}
    curve = draw(st.sampled_from([None, Curve((1, 2, 8), (0.3e9, 0.4e9, 0.5e9))]))
    machine = hardware("device", eager_op_s=30e-9, grouped_overhead_s=70e-9, expert_curve=curve)
    counts = np.array(draw(st.lists(st.integers(0, 5), min_size=8, max_size=8)), np.int32)
    is_resident = np.array(draw(st.lists(st.booleans(), min_size=8, max_size=8)))
    order = draw(st.permutations(range(8)))
    missed = [expert for expert in order if counts[expert] and not is_resident[expert]]
    return costs_of(machine, **changes), counts, is_resident, missed


@settings(deadline=None)
@given(
    layers(),
    st.sampled_from([0, 310, 5]),
    st.sampled_from([0, 777]),
    st.lists(st.booleans(), max_size=8),
)
def test_a_layer_takes_what_its_parts_take_one_after_another_or_beside_each_other(
    layer, copy_ns, backlog_ns, held_up
) -> None:
    costs, counts, is_resident, missed = layer
    times, routed = gain_kernel.times_of(costs), Routed(counts[None], 5, costs)
    # The tables of a forward of 5 rows end at 10 pairs; here are more.
    pairs = np.arange(41)
    call_ns = costs.host_call_ns(np.minimum(5, pairs), pairs)
    residents_ns = gain_kernel.residents_ns(times, counts, is_resident)
    # Two experts more are victims: one without rows, and one that has some.
    totals, rows = np.zeros(len(missed) + 1, np.int64), np.array([*counts, 0, 1], np.int32)
    victims, num_free = np.array([8 + is_held_up for is_held_up in held_up], np.int64), 0
    times = times._replace(copy=copy_ns)
    order = np.array(missed, np.int64)
    gain_kernel.layer_ns(times, call_ns, residents_ns, backlog_ns, rows, order, num_free, victims, totals)
    expected = []
    for number in range(len(missed) + 1):
        parts = routed.split(0, is_resident, missed[number:])
        assert residents_ns == parts.kernel_ns + parts.launch_ns
        arrived_ns, device_ns = backlog_ns, residents_ns
        for expert, waits in zip(missed[:number], [*held_up, *[False] * 8], strict=False):
            arrived_ns = max(arrived_ns, residents_ns if waits else 0) + copy_ns
            start_ns = max(device_ns, arrived_ns) if costs.execution.copies == "background" else device_ns + copy_ns
            device_ns = start_ns + sum(routed.alone(0, expert))
        is_parallel = costs.execution.host == "parallel"
        expected.append(max(device_ns, parts.host_ns) if is_parallel else device_ns + parts.host_ns)
    assert totals.tolist() == expected


class Paper:
    """A paper clock, with the times of the toy machine: a dense part of 3 rows takes 1000, a copy 310."""

    def __init__(self, **changes) -> None:
        self.times, self._clock = gain_kernel.times_of(costs_of(**changes)), np.zeros(3, np.int64)

    @property
    def state(self) -> tuple[bool, int]:
        """Whether the link is idle before the next router is done, and what it still has to do."""
        return gain_kernel.has_idle_link(self.times, self._clock, 3), gain_kernel.backlog_ns(self._clock)

    def pass_dense(self) -> None:
        gain_kernel.pass_dense(self._clock, self.times.dense[3])

    def pass_layer(self, layer_ns: int, num_copies: int) -> None:
        gain_kernel.pass_layer(self.times, self._clock, layer_ns, num_copies)

    def pass_copy(self) -> None:
        gain_kernel.pass_copy(self.times, self._clock)


def test_the_paper_clock_knows_how_long_the_link_is_busy() -> None:
    paper = Paper()
    assert paper.state == (True, 0)
    paper.pass_layer(500, 3)  # three copies of 310 began with it
    assert paper.state == (True, 430)
    paper.pass_copy()
    assert paper.state == (True, 740)
    paper.pass_copy()  # it ends at 1550, and the next router is done at 1500
    assert paper.state == (False, 1050)
    paper.pass_dense()
    assert paper.state == (True, 50)
    paper.pass_layer(400, 0)
    paper.pass_copy()  # it began when the link was done, at 1550, while the layer ran
    assert paper.state == (True, 0)
    paper.pass_dense()
    paper.pass_copy()  # when the router was done, at 2900, not when the link was
    assert paper.state[1] == 310


def test_blocking_copies_leave_no_backlog_and_no_idle_link() -> None:
    paper = Paper(copies="blocking")
    paper.pass_layer(500, 3)
    assert paper.state == (False, 0)


def test_behind_the_last_layer_comes_the_first() -> None:
    made = Gain(toy_workload([[2] * 8] * 3))
    made.initial(Shape(8, (1, 1, 1), costs_of()))
    nobody, nothing = np.zeros((3, 8), np.bool_), np.zeros(8, np.int32)
    assert [made.ahead(info(), layer, nothing, nobody)[0].layer for layer in range(3)] == [1, 2, 0]


@pytest.mark.parametrize(
    ("changes", "copy_ns", "saving_ns"),
    [
        ({}, 310, 770 * 310 / 1080),
        ({"host": "serial"}, 310, 770),
        ({"copies": "blocking"}, 310, 770),
        # Out to fresh memory in 510, then in. Beside each other both directions keep half of their bandwidth.
        ({"copies": "blocking", "write_back": True}, 310 + 510, 770),
        ({"write_back": True}, 1010, 770 * 1010 / 1780),
    ],
)
def test_what_a_copy_takes_and_a_miss_less_saves(changes, copy_ns: float, saving_ns: float) -> None:
    times = gain_kernel.times_of(costs_of(**changes))
    assert (times.copy, times.saving[1]) == (copy_ns, pytest.approx(saving_ns))


# --- the same decisions, written at once ---


def asked_and_written(workload, made: Gain, shape: Shape, window: int):
    """The moves of every layer of every forward: one after another, and so many forwards at once."""
    residency, asked = Residency(shape.num_experts, shape.budgets, made.initial(shape)), []
    for forward in forwards_of(workload):
        for layer, counts in enumerate(workload.counts[forward.index]):
            everybody = residency.everybody
            made.observe(forward, layer, counts, everybody)
            missed = np.flatnonzero((counts > 0) & ~everybody[layer]).tolist()
            serving = made.serve(forward, layer, missed, counts, everybody)
            serving.check(layer, made.scratch)
            moves = [(KEEP, layer, *swap) for swap in residency.fetch(layer, serving.keep)]
            moves += [(DROP, layer, expert, None) for expert in serving.drop]
            for there, found in made.ahead(forward, layer, counts, everybody):
                moves += [(AHEAD, there, *swap) for swap in residency.apply(there, found)]
            asked.append([tuple(NOBODY if name is None else name for name in move) for move in moves])
    placement, written = made.initial(shape), []
    is_resident = Residency(shape.num_experts, shape.budgets, placement).everybody.copy()
    for start in range(0, workload.num_forwards, window):
        first, moves = made.write(workload, slice(start, start + window), is_resident)
        written += [list(map(tuple, found.tolist())) for found in np.split(moves, first[1:-1])]
    assert np.array_equal(is_resident, residency.everybody)
    return asked, written


@settings(deadline=None)
@given(cases(), st.integers(1, 6))
def test_what_is_written_at_once_is_what_is_answered(case, window: int) -> None:
    workload, model, machine, _, budgets, used = case
    costs = Costs(model, machine, used, int(workload.tokens.max()))
    asked, written = asked_and_written(workload, Gain(workload), Shape(8, tuple(budgets), costs), window)
    assert asked == written


@pytest.mark.parametrize("used", [EXECUTIONS["overlapped"], EXECUTIONS["ktransformers"], EXECUTIONS["tide-as-coded"]])
def test_shipped_routing_is_written_as_it_is_answered(used) -> None:
    with Trace.open(find_shipped("traces", "llada2.0-mini-synthetic", ".h5")) as trace:
        corpus, workload = (trace.workload(used.context, [number]).first(30) for number in (0, 1))
    model = replace(load_moe_config("llada2.0-mini"), num_layers=corpus.num_layers)
    for profile in ("rtx4090", "jetson-agx-orin"):
        costs = Costs(model, load_hardware(profile), used, int(workload.tokens.max()))
        shape = Shape(256, (40,) * model.num_layers, costs)
        asked, written = asked_and_written(workload, Gain(corpus), shape, 13)
        assert asked == written
    assert any(asked)


def test_deciding_takes_numba_only_when_it_decides() -> None:
    code = "import sys, tidesim, tidesim.cli, tidesim.policies.gain; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@given(st.lists(st.sampled_from([-1.5, 0.0, 0.25, 1.0, 2.0]), max_size=90), st.integers(0, 90))
def test_the_lowest_keys_come_first_and_of_equals_the_lower_id(keys: list[float], num_lowest: int) -> None:
    num_lowest, ids = min(num_lowest, len(keys)), np.arange(len(keys))
    found, experts = np.array(keys, np.float64), ids.copy()
    gain_kernel.sort_lowest(found, experts, num_lowest)
    expected = sorted(ids, key=lambda expert: (keys[expert], expert))[:num_lowest]
    assert experts[:num_lowest].tolist() == expected
    assert found[:num_lowest].tolist() == [keys[expert] for expert in expected]
