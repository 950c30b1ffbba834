"""Plans in the words of other engines: exact texts by hand, and what each engine would make of them."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import plan_for
from toy import TOY, toy_workload

from tidesim import cli
from tidesim.errors import ModelError, PlanError
from tidesim.exports import (
    FORMATS,
    model_of,
    pinned,
    routing_for,
    to_ktransformers,
    to_llama_cpp,
    to_pins,
    to_tide,
)
from tidesim.moe import MoEConfig, load_moe_config
from tidesim.planner import Plan
from tidesim.residency import Placement
from tidesim.trace import Trace

# Layer 0 is dense; the MoE layers are 1, 2 and 3 of the network, with four experts each.
MODEL = replace(TOY, num_dense_layers=1, num_layers=3, num_experts=4)


def static_plan(model: MoEConfig, experts) -> Plan:
    placement = Placement.of(experts)
    budget = map(len, placement.experts)
    return plan_for(model, budget, policy="static", refresh_interval=None, placement=placement)


MOVING = plan_for(MODEL, (1, 4, 3))
STATIC = static_plan(MODEL, ((2,), (0, 1, 2, 3), (0, 1, 3)))
LRU = plan_for(MODEL, (2, 2, 2), policy="lru", refresh_interval=None, miss_rule="fetch")
# Three forwards of three tokens, top-2. Tokens of the experts 0 to 3: 1 4 6 7 in layer 1, 9 9 0 0 in layer 2, 6 4 4 4
# in layer 3. Experts touched over the forwards: 3 + 4 + 3 = 10, 2 + 2 + 2 = 6, 2 + 3 + 2 = 7.
ROUTING = toy_workload(
    [[0, 1, 2, 3], [3, 3, 0, 0], [3, 3, 0, 0]],
    [[1, 1, 2, 2], [3, 3, 0, 0], [3, 1, 2, 0]],
    [[0, 2, 2, 2], [3, 3, 0, 0], [0, 0, 2, 4]],
)


# --- exact texts ---


def test_tide_gets_its_two_numbers() -> None:
    export = to_tide(plan_for(MODEL, (2, 2, 2), policy="tide-as-coded", execution="tide-as-coded"))
    assert export.text == (
        "model.enable_predictive_expert_offload("
        "predictive_expert_offload=True, max_gpu_experts_per_layer=2, jump_steps=4)"
    )
    assert export.values == {"predictive_expert_offload": True, "max_gpu_experts_per_layer": 2, "jump_steps": 4}
    assert (export.slots, export.planned_slots, export.kept) == (6, 6, ("by hand.",))
    assert [sentence.split(":")[0] for sentence in export.lost] == ["Memory"]


@pytest.mark.parametrize(
    ("plan", "lost"),
    [
        (MOVING, ["Budgets that differ", "Policy 'tide'", "Execution 'overlapped'", "Memory"]),
        (
            plan_for(MODEL, (2, 2, 2), refresh_interval=(1, 2, 2)),
            ["Refresh intervals that differ", "Policy 'tide'", "Execution 'overlapped'", "Memory"],
        ),
        (
            plan_for(MODEL, (2, 2, 2), refresh_interval=None, refresh_steps=((0, 1), (0, 1), ())),
            ["Refresh steps that are no multiples", "Policy 'tide'", "Execution 'overlapped'", "Memory"],
        ),
        (STATIC, ["Budgets that differ", "Policy 'static'", "Which experts", "Execution 'overlapped'", "Memory"]),
        (LRU, ["Policy 'lru'", "Missed experts are fetched", "Execution 'overlapped'", "Memory"]),
    ],
)
def test_tide_is_told_what_it_cannot_do(plan: Plan, lost: list[str]) -> None:
    said = to_tide(plan).lost
    assert len(said) == len(lost)
    assert all(sentence.startswith(start) for sentence, start in zip(said, lost, strict=True))


@pytest.mark.parametrize(
    ("budget", "text", "device_layers"),
    [
        ((1, 4, 3), "--n-gpu-layers 5 --n-cpu-moe 2", [2, 3]),
        ((0, 0, 4), "--n-gpu-layers 5 --n-cpu-moe 3", [3]),
        ((2, 2, 2), "--n-gpu-layers 5 --n-cpu-moe 3", [3]),  # of equals the last one
        (
            (4, 1, 3),
            r"--n-gpu-layers 5 --override-tensor 'blk\.(2)\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU'",
            [1, 3],
        ),
        (
            (4, 1, 2),
            r"--n-gpu-layers 5 --override-tensor 'blk\.(2|3)\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU'",
            [1],
        ),
        ((1, 1, 1), "--n-gpu-layers 5 --cpu-moe", []),
        ((0, 0, 0), "--n-gpu-layers 5 --cpu-moe", []),
        ((4, 4, 4), "--n-gpu-layers 5", [1, 2, 3]),
    ],
)
def test_llama_cpp_gets_whole_layers(budget: tuple[int, ...], text: str, device_layers: list[int]) -> None:
    export = to_llama_cpp(plan_for(MODEL, budget), MODEL)
    assert export.text == text
    assert export.values["device_layers"] == device_layers
    assert export.slots == 4 * len(device_layers) <= export.planned_slots == sum(budget)
    assert export.lost[0].startswith(f"{sum(budget) - export.slots} of {sum(budget)} slots stay empty")
    assert (export.values["override_tensor"] is None) == (budget == (4, 4, 4))


def test_llama_cpp_keeps_the_layers_that_are_touched_most() -> None:
    export = to_llama_cpp(MOVING, MODEL, ROUTING)  # 10, 6 and 7 touches: the second MoE layer goes to the host
    assert export.values["device_layers"] == [1, 3]
    assert export.text == (r"--n-gpu-layers 5 --override-tensor 'blk\.(2)\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU'")
    assert export.kept == (
        "The experts of 2 of 3 MoE layers are on the device, those whose experts the trace touches most often.",
    )


def test_ktransformers_gets_counts_that_choose_the_placement() -> None:
    export = to_ktransformers(STATIC, MODEL)
    assert export.text == (
        "--kt-gpu-experts-ratio 0.708333333 --kt-expert-placement-strategy frequency --init-expert-location counts.pt"
    )
    assert export.values["logical_count"] == [[[0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1], [1, 1, 0, 1]]]
    assert export.values["num_gpu_experts"] == [1, 4, 3]
    assert export.values["gpu_experts"] == {1: [2], 2: [0, 1, 2, 3], 3: [0, 1, 3]}
    assert (export.slots, export.planned_slots) == (8, 8)
    assert export.lost == (
        "The host's weights, method and threads (--kt-weight-path, --kt-method, --kt-cpuinfer) are in no plan.",
    )


def test_ktransformers_is_told_one_count_where_all_layers_have_it() -> None:
    export = to_ktransformers(LRU, MODEL, ROUTING, "my counts.pt")
    assert export.text == (
        "--kt-num-gpu-experts 2 --kt-expert-placement-strategy frequency --init-expert-location 'my counts.pt'"
    )
    assert export.values["gpu_experts"] == {1: [2, 3], 2: [0, 1], 3: [0, 1]}  # of the equals 1, 2, 3 the first
    assert export.lost[0].startswith("Policy 'lru': the plan moves experts")


def test_pins_are_listed_by_layer() -> None:
    assert to_pins(STATIC, MODEL).text.splitlines() == [
        "# EXPERT_CACHE_PIN_LIST v1",
        "n_layer 4",
        "n_expert 4",
        "layer 1: 2",
        "layer 2: 0 1 2 3",
        "layer 3: 0 1 3",
    ]
    assert to_pins(static_plan(MODEL, ((), (3,), ())), MODEL).text.splitlines()[3:] == [
        "layer 1:",
        "layer 2: 3",
        "layer 3:",
    ]


# --- what the engines make of it ---


def gguf_tensors(num_layers: int, num_dense: int) -> list[str]:
    """The names of a mixture-of-experts network's tensors in a GGUF file, as llama.cpp's gguf-py gives them."""
    names = ["token_embd.weight", "output_norm.weight", "output.weight"]
    everywhere = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm", "attn_output", "ffn_norm")
    dense = ("ffn_gate", "ffn_up", "ffn_down")
    moe = ("ffn_gate_inp", "exp_probs_b", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_shexp")
    moe += ("ffn_up_shexp", "ffn_down_shexp", "ffn_gate_inp_shexp", "ffn_norm_exps")
    for layer in range(num_layers):
        parts = (*everywhere, *(dense if layer < num_dense else moe))
        names += [f"blk.{layer}.{part}.{'bias' if part == 'exp_probs_b' else 'weight'}" for part in parts]
    return names


def on_host(arguments: list[str], names: list[str]) -> set[str]:
    """Which tensors llama.cpp leaves on the host: those in whose names it finds a pattern."""
    experts = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
    patterns = []
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if option == "--cpu-moe":
            patterns.append(experts)
        elif option == "--n-cpu-moe":
            patterns += [rf"blk\.{layer}{experts}" for layer in range(int(value))]
        elif option == "--override-tensor":
            pattern, _, buffer = value.partition("=")
            assert (buffer, "," in value) == ("CPU", False)
            patterns.append(pattern)
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from(["llada2.0-mini", "llada-moe-7b-a1b", "sdar-30b-a3b"]),
    data=st.data(),
)
def test_llama_cpp_moves_exactly_the_experts_of_the_layers_told(shape: str, data: st.DataObject) -> None:
    model = load_moe_config(shape)
    whole = data.draw(st.lists(st.booleans(), min_size=model.num_layers, max_size=model.num_layers))
    export = to_llama_cpp(plan_for(model, [model.num_experts * is_whole for is_whole in whole]), model)
    host = [model.num_dense_layers + layer for layer in range(model.num_layers) if not whole[layer]]
    assert export.values["host_layers"] == host
    names = gguf_tensors(model.num_dense_layers + model.num_layers, model.num_dense_layers)
    wanted = {f"blk.{layer}.ffn_{part}_exps.weight" for layer in host for part in ("gate", "up", "down")}
    assert on_host(export.values["arguments"], names) == wanted
    if host:
        assert on_host(["--override-tensor", export.values["override_tensor"]], names) == wanted


def chosen_by_ktransformers(arguments: list[str], counts, num_dense: int):
    """The mask [layers, E] that kt-kernel makes of counts [1, layers, E], by its strategy "frequency"."""
    freq = counts.sum(dim=0).float()
    num_layers, num_experts = freq.shape
    option, value = arguments[:2]
    num_moe = num_layers - num_dense
    total = int(value) * num_moe if option == "--kt-num-gpu-experts" else int(num_moe * num_experts * float(value))
    mask = freq.new_zeros(num_layers * num_experts, dtype=bool)
    mask[freq.view(-1).topk(total, sorted=False).indices] = True
    return mask.view(num_layers, num_experts)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_ktransformers_reads_back_the_placement(data: st.DataObject, tmp_path_factory) -> None:
    torch = pytest.importorskip("torch")
    from tidesim.engine.expert_counts import save_counts

    num_experts = data.draw(st.integers(2, 300))
    model = replace(MODEL, num_dense_layers=data.draw(st.integers(0, 2)), num_experts=num_experts)
    layer = st.sets(st.integers(0, num_experts - 1))
    plan = static_plan(model, data.draw(st.tuples(layer, layer, layer)))
    path = tmp_path_factory.mktemp("counts") / "counts.pt"
    export = to_ktransformers(plan, model, counts_file=str(path))
    save_counts(export.values["logical_count"], path)
    counts = torch.load(path, map_location="cpu", weights_only=True)["logical_count"]
    assert counts.shape == (1, model.num_dense_layers + 3, num_experts)
    mask = chosen_by_ktransformers(export.values["arguments"], counts, model.num_dense_layers)
    assert not mask[: model.num_dense_layers].any()
    assert Placement.of(row.nonzero()[:, 0].tolist() for row in mask[model.num_dense_layers :]) == plan.placement


def test_pins_read_back_as_the_placement() -> None:
    lines = to_pins(STATIC, MODEL).text.splitlines()
    assert lines[0] == "# EXPERT_CACHE_PIN_LIST v1"
    sizes = dict(line.split() for line in lines[1:3])
    assert {name: int(value) for name, value in sizes.items()} == {"n_layer": 4, "n_expert": 4}
    layers = dict(re.fullmatch(r"layer (\d+):(.*)", line).groups() for line in lines[3:])
    assert list(map(int, layers)) == [1, 2, 3]
    assert Placement.of(map(int, ids.split()) for ids in layers.values()) == STATIC.placement


# --- what a plan does not hold ---


def test_the_most_popular_experts_are_pinned_to_the_budget() -> None:
    assert pinned(STATIC) == STATIC.placement
    assert pinned(MOVING, ROUTING).experts == ((3,), (0, 1, 2, 3), (0, 1, 2))


@pytest.mark.parametrize(("plan", "routing"), [(MOVING, None), (LRU, None), (STATIC, ROUTING)])
def test_who_is_pinned_is_said_once(plan: Plan, routing) -> None:
    way_out = "leave the trace out" if plan is STATIC else "give --trace TRACE"
    for make in (to_ktransformers, to_pins):
        with pytest.raises(PlanError, match=way_out):
            make(plan, MODEL, routing)


def test_exports_are_for_the_model_of_the_plan() -> None:
    other = replace(MODEL, num_dense_layers=2)
    for make in (to_llama_cpp, to_ktransformers, to_pins):
        with pytest.raises(PlanError, match="sizes outside the experts differ"):
            make(STATIC, other)
    with pytest.raises(PlanError, match=r"counts\.json: KTransformers reads counts from a \.pt file"):
        to_ktransformers(STATIC, MODEL, counts_file="counts.json")


def test_routing_of_another_shape_is_refused() -> None:
    for make in (to_llama_cpp, to_ktransformers, to_pins):
        with pytest.raises(PlanError, match=r"layers and experts \(2, 4\), and the plan \(3, 4\)"):
            make(MOVING, MODEL, replace(ROUTING, counts=ROUTING.counts[:, :2]))


def test_the_model_is_found_by_the_name_in_the_plan_at_its_width() -> None:
    narrow = load_moe_config("llada2-tiny").with_weight_bits(4)
    plan = plan_for(narrow, (1,) * narrow.num_layers)
    assert model_of(plan) == narrow
    assert model_of(plan, "llada2-tiny") == narrow
    with pytest.raises(PlanError, match=r"made for llada2-tiny, not for llada2\.0-mini"):
        model_of(plan, "llada2.0-mini")
    with pytest.raises(ModelError, match="no model 'toy'"):
        model_of(MOVING)


def test_popularity_is_counted_on_the_sequences_the_plan_was_made_on() -> None:
    tiny = load_moe_config("llada2-tiny")
    plan = plan_for(replace(tiny, num_layers=6), (2,) * 6)
    with Trace.open("llada2-tiny") as trace:
        own = replace(plan, trace=replace(plan.trace, fingerprint=trace.fingerprint, training=(1, 3)))
        counts = routing_for(own, trace).counts
        assert np.array_equal(counts, trace.workload("block", (1, 3)).tiled(6).counts)
        assert len(routing_for(plan, trace).counts) == len(trace.workload("block").counts)
        with pytest.raises(PlanError, match="routes to 256 experts a layer and toy has 4"):
            routing_for(MOVING, trace)


# --- as a user types it ---


@pytest.fixture
def run(capsys, monkeypatch):
    def type_command(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tidesim", *map(str, words)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return type_command


@pytest.fixture
def tiny(tmp_path):
    """A saved static plan for the shipped tiny model: 4 MoE layers after a dense one."""
    file = tmp_path / "plan.json"
    static_plan(load_moe_config("llada2-tiny"), ((7,), (), range(256), (0, 255))).save(file)
    return file


def test_stdout_is_the_export_and_nothing_else(run, tiny, tmp_path) -> None:
    code, out, err = run("export", tiny, "--to", "llama.cpp")
    pattern = r"blk\.(1|2|4)\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"
    assert (code, out) == (0, f"--n-gpu-layers 6 --override-tensor '{pattern}'\n")
    assert err.splitlines()[:3] == [
        "slots: 256 of 259",
        "kept: The experts of 1 of 4 MoE layers are on the device, those with the largest budgets.",
        "lost: 3 of 259 slots stay empty: a layer takes all its 256 or none.",
    ]
    assert run("export", tiny, "--to", "pins")[1].splitlines()[3:5] == ["layer 1: 7", "layer 2:"]
    assert run("export", tiny, "--to", "tide")[1].startswith("model.enable_predictive_expert_offload(")


def test_files_are_written_and_not_overwritten(run, tiny, tmp_path) -> None:
    pins = tmp_path / "pins.txt"
    assert run("export", tiny, "--to", "pins", "--out", pins)[:2] == (0, "")
    assert pins.read_text(encoding="utf-8").endswith("layer 4: 0 255\n")
    code, _, err = run("export", tiny, "--to", "pins", "--out", pins)
    assert (code, "give --overwrite" in err) == (2, True)
    assert run("export", tiny, "--to", "tide", "--out", pins, "--overwrite")[0] == 0
    code, _, err = run("export", tiny, "--to", "pins", "--out", tmp_path / "nowhere" / "pins.txt")
    assert (code, "cannot be written" in err) == (2, True)


def test_counts_are_written_for_ktransformers(run, tiny, tmp_path) -> None:
    torch = pytest.importorskip("torch")
    counts = tmp_path / "counts.pt"
    code, out, _ = run("export", tiny, "--to", "ktransformers", "--out", counts)
    assert (code, out.split()[-1]) == (0, str(counts))
    assert int(torch.load(counts, weights_only=True)["logical_count"].sum()) == 259
    assert "--out counts.pt writes" in run("export", tiny, "--to", "ktransformers")[2]
    code, _, err = run("export", tiny, "--to", "ktransformers", "--out", tmp_path / "nowhere" / "counts.pt")
    assert (code, "cannot be written" in err) == (2, True)


@pytest.mark.parametrize("to", FORMATS)
def test_json_holds_the_export_and_what_is_lost(run, tiny, to) -> None:
    code, out, _ = run("export", tiny, "--to", to, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["format"] == to
    assert document.keys() >= {"text", "values", "slots", "planned_slots", "kept", "lost", "plan", "out", "seed"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--to", "vllm"), "vllm"),
        (("--to", "tide", "--trace", "llada2-tiny"), "leave --model and --trace out"),
        (("--to", "pins", "--trace", "llada2-tiny"), "names its experts itself"),
        (("--to", "llama.cpp", "--trace", "nothing.h5"), "no trace 'nothing.h5'"),
        (("--to", "llama.cpp", "--model", "mini"), "not for llada2.0-mini"),
        (("--to", "llama.cpp", "--model", "nobody"), "no model 'nobody'"),
        (("--to", "ktransformers", "--out", "counts.json"), "reads counts from a .pt file"),
    ],
)
def test_what_cannot_be_exported_is_one_clear_error(run, tiny, options, said) -> None:
    code, out, err = run("export", tiny, *options)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "tidesim-plan", "version": 9}', "\x00" * 50])
def test_what_is_no_plan_is_refused(run, tmp_path, content) -> None:
    file = tmp_path / "plan.json"
    file.write_text(content, encoding="utf-8")
    for to in FORMATS:
        code, out, err = run("export", file, "--to", to)
        assert (code, out) == (2, "")
        assert str(file) in err
