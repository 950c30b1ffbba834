"""All policies beside each other: who is compared with what, at equal bytes, under a ceiling, with what in mind."""

import json
from dataclasses import replace

import numpy as np
import pytest
from toy import TOY, toy_execution, toy_hardware, toy_workload

from tidesim.ceiling import hit_ceiling, time_ceiling
from tidesim.comparison import Comparison, Contender, compare, contenders
from tidesim.comparison.comparing import slots_left
from tidesim.comparison.warnings import warnings_about
from tidesim.errors import BudgetError, InputError
from tidesim.execution import Costs, device_memory, execution
from tidesim.hardware import load_hardware
from tidesim.hardware.keys import CurveFigure, Figure
from tidesim.moe import load_moe_config
from tidesim.policies import POLICIES, policy
from tidesim.policies.knowledge import Knowledge
from tidesim.simulator import simulate
from tidesim.timing import timed
from tidesim.trace import Trace

TWO_LAYERS = replace(TOY, num_layers=2)
OVERLAPPED = toy_execution(copies="background", host="parallel")
HINDSIGHT = "static in hindsight"


def random_workload(seed: int, num_forwards: int = 24, num_experts: int = 8):
    """Two layers, three rows, blocks of six steps; neighbouring forwards mostly choose alike."""
    rng = np.random.default_rng(seed)
    liking = np.repeat(rng.random((num_forwards // 6, 2, 1, num_experts)), 6, axis=0)
    picks = np.argsort(liking + 0.4 * rng.random((num_forwards, 2, 3, num_experts)), axis=-1)[..., :2]
    counts = (picks[..., None] == np.arange(num_experts)).sum(axis=(2, 3))
    block = np.arange(num_forwards, dtype=np.int32) // 6
    return toy_workload(*counts, steps=[*range(6)] * (num_forwards // 6), block=block)


WORKLOAD = random_workload(1)
CORPUS = replace(random_workload(2), sequence=np.full(24, 7, np.int32))


def compared(**changes) -> Comparison:
    settings = {"execution": OVERLAPPED, "budget": 3, "names": ["lru", "tide", "gain"], "workers": 1, "seed": 5}
    return compare(changes.pop("workload", WORKLOAD), CORPUS, TWO_LAYERS, toy_hardware(), **(settings | changes))


# --- who is compared ---


def test_sequences_run_together_in_every_row_and_are_all_named() -> None:
    pair = replace(WORKLOAD, sequence=np.repeat(np.array([3, 5], np.int32), 12), num_sequences=2)
    comparison = compared(workload=pair, batch_size=2)
    document = comparison.to_dict()
    assert (document["batch_size"], document["sequences"]) == (2, (3, 5))
    assert all(row.result.batch_size == 2 and row.result.num_forwards == 12 for row in comparison.rows)
    assert all(row.ceiling_share <= 1 for row in comparison.rows)
    assert comparison.ceiling.makespan_ns < compared(workload=pair).ceiling.makespan_ns


def test_everybody_is_compared_but_for_who_has_all_the_memory() -> None:
    found = contenders((1,))
    assert {one.policy for one in found} == set(POLICIES) - {"all-device"}
    assert len({one.name for one in found}) == len(found)
    assert found[0] == Contender(HINDSIGHT, "static", (("popularity", "hindsight"),))


def test_a_policy_that_refreshes_has_a_row_for_each_interval() -> None:
    assert contenders((1, 4), ["tide", "lru", "tide"])[1:] == [
        Contender("tide, tau=1", "tide", (("refresh_interval", 1),), "tide"),
        Contender("tide, tau=4", "tide", (("refresh_interval", 4),), "tide"),
        Contender("lru", "lru"),
    ]


@pytest.mark.parametrize(("has_lookahead", "real"), [(False, "previous"), (True, "look-ahead")])
def test_a_policy_that_predicts_has_an_oracle_and_what_an_engine_has(has_lookahead: bool, real: str) -> None:
    rows = contenders((1,), ["pre-gated"], has_lookahead=has_lookahead)[1:]
    assert [(one.name, one.params) for one in rows] == [
        ("pre-gated, oracle", (("predictor", "oracle"),)),
        (f"pre-gated, {real}", (("predictor", real),)),
    ]


def test_an_unknown_policy_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="no policy 'tied'; did you mean 'tide'"):
        contenders((1,), ["lru", "tied"])


@pytest.mark.parametrize(
    ("budget", "scratch", "num_layers", "slots"),
    [
        (4, 0, 3, (4, 4, 4)),
        (4, 6, 3, (2, 2, 2)),
        (4, 2, 3, (4, 3, 3)),
        (4, 1, 3, (4, 4, 3)),
        (4, 12, 3, (0, 0, 0)),
        (4, 13, 3, None),
    ],
)
def test_scratch_memory_is_taken_off_the_slots(budget, scratch, num_layers, slots) -> None:
    assert slots_left(budget, scratch, num_layers) == slots


# --- what they know ---


def made(contender: Contender, workload, corpus):
    """The contender's policy; the best in hindsight goes by the corpus too."""
    params = {key: value for key, value in contender.params if value != "hindsight"}
    return Knowledge(workload=workload, corpus=corpus).make(contender.policy, params)


def test_the_best_static_placement_in_hindsight_knows_what_the_others_do_not() -> None:
    # Ids are turned round, so that what the corpus uses most the workload does not.
    other = replace(CORPUS, counts=np.ascontiguousarray(CORPUS.counts[:, :, ::-1]))
    comparison = compare(
        WORKLOAD, other, TWO_LAYERS, toy_hardware(), execution=OVERLAPPED, budget=3, names=["static"], workers=1
    )
    rows = {row.name: row.result for row in comparison.rows}
    assert rows[HINDSIGHT].hits > rows["static"].hits
    assert rows[HINDSIGHT].makespan_ns < rows["static"].makespan_ns


# --- the comparison ---


def test_rows_are_sorted_and_the_best_interval_is_known() -> None:
    rows = compared(intervals=(1, 2, 3)).rows
    assert {row.name for row in rows} == {HINDSIGHT, "gain", "lru", "tide, tau=1", "tide, tau=2", "tide, tau=3"}
    times = [row.result.makespan_ns for row in rows]
    assert times == sorted(times)
    tide = [row for row in rows if row.family == "tide"]
    assert [row.is_best_of_family for row in tide] == [True, False, False]
    assert all(row.is_best_of_family for row in rows if row.family is None)
    assert len({row.result.makespan_ns for row in tide}) == 3


def test_intervals_longer_than_every_block_are_one() -> None:
    names = [row.name for row in compared(names=["tide"], intervals=(32, 4, 6, 16, 4)).rows]
    assert sorted(names) == [HINDSIGHT, "tide, tau=4", "tide, tau=6"]


@pytest.mark.parametrize("changes", [{}, {"copies": "blocking", "write_back": True}, {"host": "serial"}])
def test_all_have_the_same_bytes_and_nobody_passes_the_ceiling(changes) -> None:
    used = replace(OVERLAPPED, **changes)
    comparison = compared(names=None, intervals=(1, 2), budget=5, execution=used)
    costs = Costs(TWO_LAYERS, toy_hardware(), used, 3)
    each, pooled = (time_ceiling(WORKLOAD, costs, 5, is_pooled=shared) for shared in (False, True))
    assert (comparison.ceiling, comparison.pooled_ceiling) == (each, pooled)
    assert comparison.most_hits == hit_ceiling(WORKLOAD, 5)
    assert comparison.num_pairs == WORKLOAD.counts.sum()
    scopes = {one.name: made(one, WORKLOAD, CORPUS).scope for one in contenders((1, 2))}
    assert {*scopes.values()} == {"layer", "network"}
    for row in comparison.rows:
        budget = row.result.budget
        slots = 2 * budget if isinstance(budget, int) else sum(budget)
        assert slots + row.scratch == 2 * 5, row.name
        assert 0 < row.ceiling_share <= 1, row.name
        assert row.result.hits + row.result.misses == comparison.num_pairs
        assert row.ceiling is (comparison.pooled_ceiling if scopes[row.name] == "network" else comparison.ceiling)
    assert any(row.scratch for row in comparison.rows)
    assert not comparison.left_out


def test_who_cannot_run_is_left_out_with_the_reason() -> None:
    comparison = compared(budget=0, names=["lru", "gain", "all-device"])
    assert [row.name for row in comparison.rows] == [HINDSIGHT]
    assert comparison.left_out["gain"] == "its scratch memory of 2 experts exceeds the 0 slots"
    assert comparison.left_out["lru"] == "its scratch memory of 1 experts exceeds the 0 slots"
    (why,) = compared(budget=0, names=["lfu"]).left_out.values()
    assert "budget(=0) must be >= 1" in why
    assert "needs a budget of all 8 experts" in comparison.left_out["all-device"]


def test_a_comparison_is_plain_data_with_all_that_a_run_has() -> None:
    comparison = compared()
    document = json.loads(comparison.to_json())
    assert document == json.loads(json.dumps(comparison.to_dict()))
    assert (document["budget"], document["sequences"], document["corpus"], document["seed"]) == (3, [0], [7], 5)
    assert document["ceiling"]["tok_per_s"] == pytest.approx(comparison.ceiling.tok_per_s)
    assert document["hit_ceiling"] == comparison.most_hits / comparison.num_pairs
    assert (document["hardware"], document["trace_origin"]) == ("paper", "synthetic")
    own = {"name", "family", "scratch", "is_routing_only", "is_best_of_family", "ceiling_share"}
    for row, found in zip(comparison.rows, document["rows"], strict=True):
        assert set(found) == own | set(row.result.to_dict())
        assert found["tok_per_s"] == row.result.tok_per_s
        assert found["ceiling_share"] == row.result.tok_per_s / row.ceiling.tok_per_s
    assert {row["name"]: row["is_routing_only"] for row in document["rows"]}["gain"] is False


def test_comparing_again_gives_the_same_and_says_how_far_it_is() -> None:
    done = []
    again = compared(progress=lambda number, total: done.append((number, total)))
    assert again == compared()
    # tau = 1, 2, 4 and 8 for all that is longer than a block of six steps; lru, gain and the best in hindsight.
    assert done == [(number, 7) for number in range(1, 8)]


@pytest.mark.slow
def test_processes_change_nothing() -> None:
    assert compared(workers=2) == compared()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"budget\(=9\)"):
        compared(budget=9)
    # So much has to stay free that there is room for two experts a layer and no more.
    reserve = 4 * 2**30 - device_memory(TWO_LAYERS, toy_hardware(), OVERLAPPED, 2, WORKLOAD.max_tokens, 0).total
    with pytest.raises(BudgetError, match="the largest budget that fits is 2 experts a layer"):
        compared(reserve_bytes=reserve)
    assert compared(reserve_bytes=reserve, names=[], budget=2)
    assert compared(reserve_bytes=reserve, names=[], is_memory_checked=False)
    with pytest.raises(InputError, match="no policy 'tied'"):
        compared(names=["tied"])


# --- what to bear in mind ---


@pytest.fixture
def result():
    """A run in which no resource is busy for long."""
    static = policy("static", popularity=CORPUS.counts.sum(axis=0))
    run = simulate(
        WORKLOAD, TWO_LAYERS, toy_hardware(), static, budget=8, execution=OVERLAPPED, is_memory_checked=False
    )
    return busy(run)


def busy(result, **shares):
    """The same run with resources that are busy for such shares of it."""
    return replace(result, busy_ns={name: round(shares.get(name, 0) * result.makespan_ns) for name in result.busy_ns})


def warned(results, *, machine=None, model=TWO_LAYERS, workload=WORKLOAD, budget=8, **changes) -> tuple[str, ...]:
    costs = Costs(model, machine or toy_hardware(), replace(OVERLAPPED, **changes), 40)
    return warnings_about([(workload, costs)], budget, results)


def test_there_is_nothing_to_warn_of(result) -> None:
    assert warned([result, result]) == ()


def test_a_budget_below_the_working_set(result) -> None:
    # Four of the six forwards touch three experts, the others five.
    rows = [[2, 2, 2, 0, 0, 0, 0, 0]] * 4 + [[2, 1, 1, 1, 1, 0, 0, 0]] * 2
    workload = toy_workload(*([row] for row in rows))
    (said,) = warned([result], model=TOY, workload=workload, budget=2)
    assert said.startswith("the budget of 2 is below the working set: a forward touches 3 experts of a layer (median)")
    assert "in 100% of all cases" in said
    assert warned([result], model=TOY, workload=workload, budget=3) == ()
    # In just a half of all cases it is not yet below.
    assert warned([result], model=TOY, workload=toy_workload(*([row] for row in rows[2:])), budget=4) == ()


@pytest.mark.parametrize(
    ("resource", "what"), [("h2d", "the link to the device"), ("host", "the host"), ("device", "the device")]
)
def test_what_limits_the_fastest(result, resource: str, what: str) -> None:
    (said,) = warned([busy(result, **{resource: 0.96}), result])
    assert said == f"{what} is busy for 96% of the time under the fastest policy: it is what limits this machine."
    assert warned([busy(result, **{resource: 0.94}), result]) == ()


def test_who_jams_the_link(result) -> None:
    jammed = replace(busy(result, h2d=0.97), policy="lru")
    (said,) = warned([result, jammed, busy(result, host=0.99), jammed, replace(jammed, policy="lfu")])
    assert said == "the link to the device is busy for 95% of the time or more under lru, lfu."


def with_curve(path: str, last: int):
    return replace(toy_hardware(), curves={path: CurveFigure((1, last), (1.0, 1.0), "measured", "here")})


@pytest.mark.parametrize(
    ("path", "rows", "changes"),
    [
        # The rows of the busiest expert, of a forward, and those that get logits: five, twelve and three.
        ("device.expert_curve", 5, {}),
        ("host.expert_curve", 5, {}),
        ("device.dense_curve", 12, {}),
        ("device.head_curve", 3, {}),
        ("device.head_curve", 12, {"logits": "all"}),
    ],
)
def test_rows_beyond_what_was_measured(result, path: str, rows: int, changes) -> None:
    workload = toy_workload([[5, 5, 4, 4, 3, 3, 0, 0]], [[1, 1, 1, 1, 1, 1, 0, 0]], kinds="pd")
    settings = {"model": TOY, "workload": workload} | changes
    assert warned([result], machine=with_curve(path, rows), **settings) == ()
    (said,) = warned([result], machine=with_curve(path, rows - 1), **settings)
    assert said == f"paper: {path} was measured up to {rows - 1} rows, and {rows} occur; its last rate is used there."


def test_experts_of_fewer_bits_than_were_measured(result) -> None:
    small = TWO_LAYERS.with_weight_bits(4)
    (said,) = warned([result], machine=with_curve("host.expert_curve", 2), model=small)
    assert said == "paper was measured with weights of 16 bits, and experts of 4 bits go by its bandwidths alone."
    # Curves of what keeps its bits hold, and without a curve nothing was measured with other ones.
    assert warned([result], machine=with_curve("device.dense_curve", 9), model=small) == ()
    assert warned([result], model=small) == ()


def test_figures_that_nobody_measured(result) -> None:
    def guessed(*paths: str):
        sources = {path: Figure(1.0, "guess", "none") for path in paths}
        return replace(toy_hardware(), sources=sources | {"host.cores": Figure(1, "measured", "here")})

    drive = "links.nvme.latency_us"
    assert warned([result], machine=guessed("host.bf16_gflops")) == ("paper: host.bf16_gflops is a guess.",)
    # The drive counts only where experts live there.
    assert warned([result], machine=guessed(drive)) == ()
    (said,) = warned([result], machine=guessed("host.bf16_gflops", drive), home="disk")
    assert said == f"paper: host.bf16_gflops, {drive} are guesses."


# --- at full size ---

MINI = load_moe_config("llada2.0-mini")
FULL_SIZE = {"execution": execution("overlapped"), "budget": 64, "is_memory_checked": False}


def mini_workloads(num_layers: int):
    """Two sequences of the shipped trace, and two that may be known before, in the first layers."""
    with Trace.open("llada2.0-mini-synthetic") as trace:
        for part in ((0, 1), (2, 3)):
            whole = trace.workload("block", part)
            yield replace(whole, counts=whole.counts[:, :num_layers])


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["a100-40gb"])
def test_every_policy_keeps_its_books_and_the_ceiling_at_full_size(profile: str) -> None:
    # Three layers of the nineteen, as some policies take a minute for all; scratch memory, which may be whole layers,
    # comes on top.
    workload, corpus = mini_workloads(3)
    model, machine = replace(MINI, num_layers=3), load_hardware(profile)
    costs = Costs(model, machine, FULL_SIZE["execution"], int(workload.tokens.max()))
    ceilings = {
        scope: time_ceiling(workload, costs, 64, is_pooled=scope == "network").makespan_ns
        for scope in ("layer", "network")
    }
    for contender in contenders((2,)):
        player = made(contender, workload, corpus)
        result = timed(workload, model, machine, player, **FULL_SIZE)
        assert result.hits + result.misses == workload.counts.sum(), contender.name
        assert result.h2d_bytes == (result.promotions + result.drops) * MINI.expert_bytes, contender.name
        assert result.makespan_ns >= ceilings[player.scope], contender.name


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["rtx4090"])
def test_gain_is_at_least_as_fast_as_tide_at_any_interval(profile: str) -> None:
    workload, corpus = mini_workloads(MINI.num_layers)
    machine, gain = load_hardware(profile), policy("gain", corpus=corpus)
    equal_bytes = FULL_SIZE | {"budget": slots_left(64, gain.scratch, MINI.num_layers)}
    least_ns = timed(workload, MINI, machine, gain, **equal_bytes).makespan_ns
    for name in ("tide", "tide-as-coded"):
        for interval in (1, 2, 4, 8):
            tide = policy(name, refresh_interval=interval)
            assert least_ns <= timed(workload, MINI, machine, tide, **FULL_SIZE).makespan_ns, (name, interval)
