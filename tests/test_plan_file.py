"""Plans as files: what is written comes back, and what is wrong with a file is said, all of it and where."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import plan_for
from toy import TOY, toy_execution, toy_hardware, toy_workload

from tidesim.errors import PlanError
from tidesim.planner.plan_fields import FIELDS
from tidesim.planner.plan_file import Machine, Plan, Prediction, Routing
from tidesim.residency import Placement
from tidesim.result import PARTS
from tidesim.simulator import simulate

MODEL = replace(TOY, num_layers=2)
PREDICTION = Prediction(
    tok_per_s=12.5,
    makespan_s=0.4,
    num_forwards=3,
    generated_tokens=5,
    hit_rate=0.75,
    breakdown_s=dict.fromkeys(PARTS, 0.08),
)
TIDE = plan_for(
    MODEL,
    (3, 2),
    hardware=Machine(name="paper", device_memory_bytes=toy_hardware().device.memory_bytes, fingerprint="a" * 64),
    trace=Routing(model="toy", origin="synthetic", fingerprint="b" * 64, training=(0, 2), profiled=(2,), held_out=(1,)),
    execution="plain",
    refresh_interval=(4, 1),
    reserve_bytes=1000,
    predicted=PREDICTION,
    held_out=replace(PREDICTION, tok_per_s=11.0),
)
STEPS = replace(TIDE, refresh_interval=None, refresh_steps=((0, 1, 4), ()))
STATIC = replace(TIDE, policy="static", refresh_interval=None, placement=Placement(((0, 3, 7), (1, 2))))
LRU = replace(TIDE, policy="lru", refresh_interval=None, miss_rule="fetch")
PLANS = {"tide": TIDE, "steps": STEPS, "static": STATIC, "lru": LRU}


def content(plan: Plan = TIDE) -> dict:
    """The plan as it stands in its file."""
    return json.loads(json.dumps(plan.to_dict()))


def write(path, data) -> str:
    file = path / "plan.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return str(file)


def refusal(path, data) -> list[str]:
    """The lines of the error that loading `data` gives, without the file's name."""
    file = write(path, data)
    with pytest.raises(PlanError) as caught:
        Plan.load(file)
    return [line.removeprefix(f"{file}: ") for line in str(caught.value).splitlines()]


# --- round trip ---


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_what_is_saved_comes_back(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_a_plan_without_held_out_sequences_comes_back(tmp_path):
    plan = replace(TIDE, held_out=None, trace=replace(TIDE.trace, held_out=()))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_the_file_holds_every_described_field_and_no_other():
    def paths(node, prefix=""):
        for key, value in node.items():
            if isinstance(value, dict):
                yield from paths(value, f"{prefix}{key}.")
            else:
                yield prefix + key

    assert sorted(paths(content())) == sorted(field.path for field in FIELDS)


def test_a_plan_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        TIDE.policy = "static"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PlanError, match="nowhere"):
        TIDE.save(tmp_path / "nowhere" / "plan.json")
    with pytest.raises(PlanError, match=r"none\.json: cannot be read"):
        Plan.load(tmp_path / "none.json")


def test_a_plan_from_before_there_were_refresh_steps_has_none(tmp_path):
    data = content()
    del data["refresh_steps"]
    assert Plan.load(write(tmp_path, data)) == TIDE


# --- files that are no plans ---


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "not JSON",
        "[" * 100_000,
        '{"format": NaN}',
        '{"format": "tidesim-plan", "format": "tidesim-plan"}',
        "\ud800".encode("utf-8", "surrogatepass"),
        b"\x80\x04\x95\x0b\x00\x00\x00",
    ],
    ids=["empty", "cut", "words", "deep", "nan", "twice", "surrogate", "binary"],
)
def test_what_is_no_json_is_refused(text, tmp_path):
    file = tmp_path / "plan.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanError, match="is not a plan, which is JSON"):
        Plan.load(file)


@pytest.mark.parametrize("data", [[], 3, None, '"tidesim-plan"', {}, {"format": "tidesim-trace"}, {"format": ["x"]}])
def test_json_of_something_else_is_refused(data, tmp_path):
    assert "is not a plan: format must be 'tidesim-plan'" in refusal(tmp_path, data)[0]


@pytest.mark.parametrize("version", [2, 0, "1", None, [1]])
def test_another_version_is_refused(version, tmp_path):
    (line,) = refusal(tmp_path, content() | {"version": version})
    assert line.startswith(f"version(={version!r}) must be 1")
    assert line.endswith("plan again.")


# --- fields that are wrong ---


def test_all_problems_are_told_at_once_each_with_its_path(tmp_path):
    data = content()
    data["budget"] = [3, -1]
    data["model"]["num_layers"] = "two"
    data["hardware"]["speed"] = 3
    data["polcy"] = data.pop("policy")
    del data["predicted"]["breakdown_s"]["launch"]
    assert refusal(tmp_path, data) == [
        "num_layers(='two') must be a whole number from 1 to 2^53 @ $.model.num_layers",
        "policy is missing: who decides which experts are resident @ $.policy",
        "budget(=[3, -1]) item 1 must be a whole number from 0 to 2^53 @ $.budget",
        "launch is missing: seconds: launching kernels, as far as it outlasts them @ $.predicted.breakdown_s.launch",
        "there is no field 'speed' @ $.hardware",
        "there is no field 'polcy'; did you mean 'policy'? @ $",
    ]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seed", True, "whole number"),
        ("seed", 1.0, "whole number"),
        ("seed", 10**30, "whole number"),
        ("max_tokens", 0, "from 1"),
        ("objective", "thrift", "must be one of throughput"),
        ("policy", "oracle", "must be one of static, tide, tide-as-coded, lru"),
        ("policy", ["tide"], "must be one of"),
        ("budget", 3, "must be a list"),
        ("budget", [3, 2.5], "item 1 must be a whole number"),
        ("budget", {"0": 3}, "must be a list"),
        ("refresh_interval", [0, 1], "item 0 must be a whole number from 1 to 2^53, or null"),
        ("refresh_steps", [[0, 2], [3, 1]], "item 1 must be ascending steps, each once, or null"),
        ("refresh_steps", [0, 2], "item 0 must be a list, or null"),
        ("placement", [[0, 0]], "item 0 must be ascending ids"),
        ("placement", [[0, "1"]], "item 0 item 1 must be a whole number"),
        ("placement", "all", "must be a list, or null"),
        ("miss_rule", "drop", "must be one of host, fetch"),
        ("predicted.hit_rate", 1.5, "must be a number >= 0 and <= 1"),
        ("predicted.makespan_s", -1, "must be a number >= 0"),
        ("predicted", None, "must be an object"),
        ("held_out", [], "must be an object"),
        ("predicted.breakdown_s", 3, "must be an object"),
        ("model.fingerprint", "xyz", "must be a SHA-256"),
        ("model.name", "", "must be text"),
        ("trace.origin", "invented", "must be one of recorded, imported, synthetic"),
        ("trace.training", [2, 0], "must be ascending ids"),
        ("tide_code.jump_steps", 0, "from 1"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule_and_path(path, value, message, tmp_path):
    data = content()
    *sections, name = path.split(".")
    node = data
    for section in sections:
        node = node[section]
    node[name] = value
    lines = refusal(tmp_path, data)
    assert message in lines[0]
    assert lines[0].endswith(f"@ $.{path}")


@pytest.mark.parametrize(
    ("plan", "changes", "line"),
    [
        (TIDE, {"budget": [3]}, "must have one number for each of the 2 layers @ $.budget"),
        (TIDE, {"budget": [3, 9]}, "must be at most num_experts(=8) @ $.budget"),
        (TIDE, {"refresh_interval": [1]}, "must have one number for each of the 2 layers @ $.refresh_interval"),
        (TIDE, {"refresh_interval": None}, "must have one number for each of the 2 layers @ $.refresh_interval"),
        (STEPS, {"refresh_steps": [[1]]}, "must have one list for each of the 2 layers @ $.refresh_steps"),
        (STEPS, {"refresh_interval": [1, 1]}, "must be null beside refresh_steps @ $.refresh_interval"),
        (STATIC, {"refresh_steps": [[], []]}, "must be null, 'static' never refreshes @ $.refresh_steps"),
        (TIDE, {"placement": [[0], [1]]}, "must be null, 'tide' starts by its own rule @ $.placement"),
        (TIDE, {"miss_rule": "fetch"}, "must be 'host' for policy 'tide' @ $.miss_rule"),
        (STATIC, {"refresh_interval": [1, 1]}, "must be null, 'static' never refreshes @ $.refresh_interval"),
        (STATIC, {"placement": None}, "must name as many experts in each layer as its budget @ $.placement"),
        (STATIC, {"placement": [[0], [1]]}, "must name as many experts in each layer as its budget @ $.placement"),
        (STATIC, {"placement": [[0, 3, 8], [1, 2]]}, "must hold ids below num_experts(=8) @ $.placement"),
        (LRU, {"miss_rule": "host"}, "must be 'fetch' for policy 'lru' @ $.miss_rule"),
        (TIDE, {"held_out": None}, "must be there with held-out sequences @ $.held_out"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(plan, changes, line, tmp_path):
    assert refusal(tmp_path, content(plan) | changes) == [line]


def test_a_sequence_cannot_be_trained_on_and_held_out():
    with pytest.raises(PlanError, match=r"must not share a sequence @ \$\.trace"):
        replace(TIDE, trace=replace(TIDE.trace, held_out=(2,)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None)
@given(field=st.sampled_from(FIELDS), depth=st.integers(0, 2), value=JSON)
def test_any_value_anywhere_is_a_plan_or_a_plan_error(field, depth, value, tmp_path_factory):
    data = content()
    *sections, name = field.path.split(".")[: depth + 1]
    node = data
    for section in sections:
        node = node[section]
    node[name] = value
    file = write(tmp_path_factory.mktemp("plans"), data)
    try:
        plan = Plan.load(file)
    except PlanError:
        return
    assert content(plan) == data


# --- using a plan ---


def test_a_plan_fits_its_own_model_under_any_name():
    TIDE.check(MODEL)
    TIDE.check(replace(MODEL, name="a folder"), toy_hardware())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_layers": 3}, "num_layers is 2 in the plan and 3 in other"),
        ({"num_experts": 16}, "num_experts is 8 in the plan and 16 in other"),
        ({"weight_bits": 8}, "expert_bytes is 24 in the plan and 12 in other"),
        ({"vocab_size": 31}, "sizes outside the experts differ"),
    ],
)
def test_a_plan_for_another_model_is_refused_with_the_reason(changes, reason):
    with pytest.raises(PlanError, match=rf"made for toy, not for other: {reason}; plan again"):
        TIDE.check(replace(MODEL, name="other", **changes))


def test_a_plan_for_another_memory_size_is_refused_with_the_reason():
    hardware = replace(toy_hardware(), name="big", device=replace(toy_hardware().device, memory_bytes=2**31))
    with pytest.raises(PlanError, match=r"of device memory of paper, and big has 2\.00 GiB; plan again"):
        TIDE.check(MODEL, hardware)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_loaded_plan_runs_as_it_says(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    counts = [[2, 0, 0, 2, 0, 0, 2, 0], [0, 1, 1, 1, 0, 3, 0, 0]]
    workload = toy_workload(*[counts] * 3)
    moved = []
    result = simulate(
        workload,
        MODEL,
        toy_hardware(),
        loaded.make_policy(),
        budget=loaded.budget,
        execution=toy_execution(),
        decisions=moved.append,
        reserve_bytes=0,
    )
    assert (result.policy, result.budget, result.refresh_interval) == (plan.policy, (3, 2), plan.refresh_interval)
    assert result.refresh_steps == plan.refresh_steps
    if plan is STATIC:
        # Layer 0 keeps 0, 3 and 7, layer 1 keeps 1 and 2.
        assert [(decision.hits, decision.misses) for decision in moved] == [(4, 2), (2, 4)] * 3
