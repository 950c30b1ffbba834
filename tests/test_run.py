"""Running plans on the tiny model: what a user of `tidesim run` gets, and what is refused."""

import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from typer.testing import CliRunner

from tidesim.cli import app
from tidesim.engine.choice import by_hand, planned
from tidesim.engine.emulated import EmulatedBackend
from tidesim.engine.generate import Sampler, generate
from tidesim.engine.live import DeviceSettings, dummy_model, open_model
from tidesim.engine.session import Session
from tidesim.engine.tokenizer import Prompt
from tidesim.errors import BudgetError, InputError, ModelError, PlanError
from tidesim.execution import EXECUTIONS
from tidesim.hardware import load_hardware
from tidesim.moe import load_moe_config
from tidesim.planner import Plan, plan
from tidesim.policies import policy
from tidesim.result import RESOURCES
from tidesim.shipped import find_shipped, shipped_folder
from tidesim.simulator import simulate
from tidesim.trace import Trace

TINY = shipped_folder("models") / "llada2-tiny"
CPU = DeviceSettings(device="cpu", device_threads=1, host_threads=1)
SHORT = Sampler(gen_length=32, steps=8)
OVERLAPPED = EXECUTIONS["overlapped"]


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan for the tiny model on a machine with so little memory that not all experts fit."""
    file = tmp_path_factory.mktemp("plans") / "plan.json"
    small = load_hardware("rtx4090").replace_figure("device.memory_gib", 0.25)
    with Trace.open("llada2-tiny") as trace:
        report = plan(
            trace,
            load_moe_config("llada2-tiny"),
            small,
            execution=OVERLAPPED,
            policies=("static", "tide", "tide-as-coded", "lru"),
            reserve_bytes=228 << 20,
            workers=1,
        )
    report.chosen.save(file)
    return file


def test_a_plan_that_decides_by_predicted_times_runs_with_the_profile_it_was_made_with(tmp_path: Path) -> None:
    file, profile = tmp_path / "plan.json", tmp_path / "small.yaml"
    load_hardware("rtx4090").replace_figure("device.memory_gib", 0.25).to_yaml(profile)
    with Trace.open("llada2-tiny") as trace:
        model, small = load_moe_config("llada2-tiny"), load_hardware(str(profile))
        settings = {"execution": OVERLAPPED, "policies": ["gain"], "reserve_bytes": 228 << 20, "workers": 1}
        made = plan(trace, model, small, **settings).chosen
    made.save(file)
    words = ("run", "--plan", file, "--device", "cpu", "--prompt", "def f(x):\n", "--gen-length", 32, "--json")
    refused = invoke(*words)
    assert refused.exit_code == 1
    assert "--hardware PROFILE" in str(refused.exception)
    done = invoke(*words, "--hardware", profile)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["policy"] == "gain"
    other = load_hardware("rtx4090").replace_figure("device.memory_gib", 0.5)
    other.to_yaml(profile)
    assert "made with another profile" in str(invoke(*words, "--hardware", profile).exception)


def test_a_plan_runs_and_the_simulator_decides_the_same(plan_file: Path, tmp_path: Path) -> None:
    made = Plan.load(plan_file)
    assert sum(made.budget) < made.model.num_layers * made.model.num_experts
    done = invoke(
        "run", "--plan", plan_file, "--device", "cpu", "--prompt", "def f(x):\n", "--gen-length", 40, "--json",
        "--record", tmp_path / "live.h5", "--decisions", tmp_path / "live.jsonl", "--timeline", tmp_path / "t.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["is_measured"]
    assert document["trace_origin"] == "live"
    assert document["texts"][0]
    assert sum(document["breakdown_s"].values()) == pytest.approx(document["makespan_s"])
    assert set(document["busy_share"]) == set(RESOURCES)
    with Trace.open(tmp_path / "live.h5") as trace, (tmp_path / "simulated.jsonl").open("w") as file:
        simulate(
            trace.workload("block"),
            load_moe_config("llada2-tiny"),
            load_hardware("rtx4090"),
            made.make_policy(),
            budget=made.budget,
            execution=OVERLAPPED,
            decisions=lambda decision: file.write(decision.to_json() + "\n") and None,
        )
    assert (tmp_path / "simulated.jsonl").read_text() == (tmp_path / "live.jsonl").read_text()
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    assert max(event["ts"] + event["dur"] for event in events if event["ph"] == "X") <= 1e6 * document["makespan_s"] + 1


def test_text_streams_as_blocks_finish_and_is_followed_by_what_was_measured() -> None:
    words = ("run", "--policy", "lru", "--budget", 48, "--device", "cpu", "--prompt", "import os\n", "--gen-length", 64)
    shown, plain = invoke(*words), invoke(*words, "--json")
    text = json.loads(plain.stdout)["texts"][0]
    assert shown.stdout.startswith(text)
    assert "Measured run" in shown.stdout
    assert "tok/s measured" in shown.stdout
    pieces: list[str] = []
    with open_model(TINY, CPU) as live:
        session = Session(live, by_hand(policy("lru"), 48, OVERLAPPED, live), machine="here", seed=0)
        session.answer(
            TINY, [Prompt(text="import os\n")], Sampler(gen_length=64), on_text=lambda _, so_far: pieces.append(so_far)
        )
    assert len(pieces) > 1
    assert pieces[-1] == text


def test_every_device_says_the_same() -> None:
    texts = {}
    for device in ("cpu", "emulated", "disk"):
        settings = DeviceSettings(device=device, device_threads=1, host_threads=1)
        with open_model(TINY, settings) as live:
            choice = by_hand(policy("tide-as-coded", refresh_interval=2), 24, OVERLAPPED, live)
            session = Session(live, choice, machine=settings.description, seed=0)
            texts[device] = session.answer(TINY, [Prompt(text="class A:\n")], SHORT).texts
    assert texts["cpu"] == texts["emulated"] == texts["disk"] != [""]


def test_forced_routing_is_what_the_experts_see(tmp_path: Path) -> None:
    with Trace.open("llada2-tiny") as trace, dummy_model(TINY, CPU, 3, seed=1) as live:
        for context in ("block", "full"):
            how = replace(OVERLAPPED, kv_cache=context == "block")
            choice = by_hand(policy("tide", refresh_interval=2), 40, how, live)
            decisions: list[Any] = []
            session = Session(live, choice, machine="here", seed=0, decisions=decisions.append)
            outcome = session.replay(trace, [1, 2], num_forwards=50)
            workload = session.forced_workload(trace, [1, 2], num_forwards=50)
            predicted: list[Any] = []
            result = simulate(
                workload,
                live.sizes,
                load_hardware("rtx4090"),
                policy("tide", refresh_interval=2),
                budget=40,
                execution=how,
                decisions=predicted.append,
            )
            assert decisions == predicted
            assert outcome.result.num_forwards == 50
            assert outcome.result.hits == result.hits
            assert outcome.result.model == "routing of llada2-tiny forced on llada2-tiny, 3 layers of dummy weights"
            assert outcome.result.trace_origin == "recorded"


def test_dummy_layers_have_their_true_shape_and_no_more_than_the_model() -> None:
    with dummy_model(find_shipped("models", "llada2-tiny"), CPU, 2, seed=0) as live:
        assert live.sizes.num_layers == 2
        assert live.expert_bytes == load_moe_config("llada2-tiny").expert_bytes
    with pytest.raises(ModelError, match=r"layers\(=9\) must be in 1\.\.4"):
        dummy_model(TINY, CPU, 9, seed=0)
    with pytest.raises(BudgetError, match=r"take 19\d\.\d+ GiB, and this machine has .*--layers"):
        dummy_model(find_shipped("models", "llada2.0-flash"), CPU, None, seed=0)
    with pytest.raises(InputError, match="--device disk reads files"):
        dummy_model(TINY, DeviceSettings(device="disk"), 1, seed=0)


def test_a_plan_for_another_model_or_with_too_many_layers_is_refused(plan_file: Path) -> None:
    made = Plan.load(plan_file)
    with dummy_model(TINY, CPU, 2, seed=0) as live, pytest.raises(PlanError, match="num_layers is 4 in the plan and 2"):
        planned(made, live)
    done = invoke(
        "run", "--plan", plan_file, "--dummy-weights", "llada2-tiny", "--layers", 3, "--routing", "llada2-tiny"
    )
    assert isinstance(done.exception, PlanError)
    assert "plan again" in str(done.exception)


def test_a_plan_that_takes_too_much_memory_is_refused_with_the_figures(plan_file: Path) -> None:
    made = Plan.load(plan_file)
    with open_model(TINY, CPU) as live:
        fits = planned(made, live)
        fits.check_memory(live, made.max_tokens)
        with pytest.raises(BudgetError, match=r"needs experts .* = 0\.\d+ GiB on the device, which has 0\.250 GiB"):
            fits.check_memory(live, 100 * made.max_tokens)
        greedy = fits._replace(budgets=(live.sizes.num_experts,) * 4, memory_bytes=28 << 20)
        session = Session(live, greedy, machine="here", seed=0)
        with pytest.raises(BudgetError, match="smaller budget"):
            session.answer(TINY, [Prompt(text="x")], SHORT)


def test_a_run_stays_within_the_memory_that_was_reckoned(tmp_path: Path) -> None:
    """What PyTorch and NumPy take at the peak of a run is at most its slots, its cache and its transient part.

    Taken off before are buffers and records that are memory of the host.
    """
    sizes = {"hidden_size": 512, "moe_intermediate_size": 128, "num_experts": 64, "head_dim": 64, "vocab_size": 8192}
    config = json.loads((TINY / "config.json").read_text()) | sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompt, sampler = list(range(10, 202)), Sampler(gen_length=8, steps=4)
    with dummy_model(tmp_path, CPU, 2, seed=0) as live:
        choice = by_hand(policy("tide-as-coded"), 20, OVERLAPPED, live)
        for is_measured in (False, True):  # compiled code is read in the first run
            if is_measured:
                tracemalloc.start()
            with (
                torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as seen,
                live.start(*choice[:3]) as offload,
            ):
                made = generate(live.network, prompt, sampler, mask_id=2, end_id=0, watcher=offload)
        _, numpy_peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        torch_peak = int(np.cumsum([event.nbytes() for event in events if event.name() == "[memory]"]).max())
        need = live.memory(choice.budgets, choice.execution, len(prompt) + 8)
        backend = offload.backend
        assert isinstance(backend, EmulatedBackend)
        of_host = backend._host_rows.nbytes + backend._host_outputs.nbytes
        of_host += sum(tensor.nbytes for layers in made.routings for routing in layers for tensor in routing[:2])
        assert need.experts == 20 * 2 * live.expert_bytes
        assert need.experts < numpy_peak + torch_peak - of_host <= need.experts + need.kv_cache + need.transient


def test_running_out_of_memory_leaves_the_text_so_far_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = EmulatedBackend.run_residents

    def failing(self: EmulatedBackend, layer: int, batch: Any) -> None:
        self.num_calls = getattr(self, "num_calls", 0) + 1
        if self.num_calls > 4 * 40:
            raise torch.OutOfMemoryError("device out of memory: tried to allocate 2 GiB")
        ran(self, layer, batch)

    monkeypatch.setattr(EmulatedBackend, "run_residents", failing)
    done = invoke("run", "--policy", "static-not", "--budget", 8)
    assert isinstance(done.exception, InputError)
    done = invoke(
        "run", "--policy", "all-host", "--budget", 0, "--device", "cpu", "--prompt", "def f(x):\n", "--gen-length", 96
    )
    assert isinstance(done.exception, BudgetError)
    assert "ran out of memory in forward 40" in str(done.exception)
    assert "tried to allocate 2 GiB" in str(done.exception)
    assert len(done.stdout) > 10


def test_a_policy_that_decides_by_predicted_times_runs_and_the_simulator_decides_the_same(tmp_path: Path) -> None:
    shared = ("--policy", "gain", "--budget", 32, "--hardware", "rtx4090", "--corpus", "llada2-tiny", "--json")
    ran = invoke(
        "run", *shared, "--device", "cpu", "--prompt", "def f(x):\n", "--gen-length", 40,
        "--record", tmp_path / "live.h5", "--decisions", tmp_path / "live.jsonl",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["promotions"] > 0
    words = ("--trace", tmp_path / "live.h5", "--execution", "emulated", "--decisions", tmp_path / "paper.jsonl")
    done = invoke("simulate", *shared, *words)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "paper.jsonl").read_text() == (tmp_path / "live.jsonl").read_text()


def test_an_oracle_knows_the_routing_that_is_forced() -> None:
    words = ("run", "--policy", "pre-gated", "--budget", 256, "--device", "cpu", "--routing", "llada2-tiny", "--json")
    done = invoke(*words, "--sequences", 1, "--predictor", "oracle")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["hit_rate"] == 0.75  # all but the first of four layers are foretold


def test_a_corpus_of_other_experts_is_refused(tmp_path: Path) -> None:
    from hand_made import decode, writer

    with writer(tmp_path / "other.h5") as out:
        out.append(decode(np.random.default_rng(0), prompt_tokens=9, steps=[2])[0])
    words = ("--hardware", "rtx4090", "--corpus", tmp_path / "other.h5", "--device", "cpu")
    for name, said in (("static", "popularity has shape [4, 16]"), ("gain", "the corpus counts [4, 16] experts")):
        done = invoke("run", "--policy", name, "--budget", 9, *words)
        assert isinstance(done.exception, InputError), done.output
        assert said in str(done.exception)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing says who is on the device"),
        (["--plan", "no.json", "--policy", "lru"], "not both"),
        (["--plan", "no.json", "--corpus", "llada2-tiny"], "not both"),
        (["--plan", "no-such.json"], "cannot be read"),
        (["--policy", "lru", "--budget", "300"], "must be in 0"),
        (["--policy", "lru", "--budget", "1,2"], "budget has 2 numbers"),
        (["--policy", "static"], "who is popular"),
        (["--policy", "gain"], "--corpus TRACE"),
        (["--policy", "gain", "--corpus", "llada2-tiny"], "--hardware PROFILE"),
        (["--policy", "freetoken-hybrid"], "--hardware PROFILE"),
        (["--policy", "pre-gated", "--predictor", "oracle"], "--routing TRACE"),
        (["--policy", "pre-gated", "--predictor", "look"], "no predictor 'look'"),
        (["--policy", "lru", "--device", "gpu"], "no device 'gpu'"),
        (["--policy", "lru", "--device", "accelerator"], "sees no accelerator"),
        (["--policy", "lru", "--execution", "tide-as-coded"], "the engine cannot run"),
        (["--policy", "lru", "--layers", "2"], "for --dummy-weights"),
        (["--policy", "lru", "--dummy-weights", "llada2-tiny"], "--routing TRACE"),
        (["--policy", "lru", "--pace", "rtx4090", "--device", "cpu"], "only the emulated device"),
        (["--policy", "lru", "--pace", "dgx-spark", "--device", "emulated"], "unified memory"),
        (["--policy", "lru", "--prompt", ""], "is empty"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_way_out(words: list[str], said: str) -> None:
    done = invoke("run", *words)
    assert isinstance(done.exception, InputError), done.output
    assert said in str(done.exception)


def test_a_trace_of_other_experts_cannot_be_forced(tmp_path: Path) -> None:
    from hand_made import decode, writer

    with writer(tmp_path / "other.h5") as out:
        out.append(decode(np.random.default_rng(0), prompt_tokens=9, steps=[2])[0])
    done = invoke("run", "--policy", "lru", "--budget", 9, "--dummy-weights", "llada2-tiny", "--layers", 1,
                  "--routing", tmp_path / "other.h5")  # fmt: skip
    assert isinstance(done.exception, InputError)
    assert "2 of 16 experts" in str(done.exception)


def test_the_command_works_as_a_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tidesim", "run", "--policy", "lru", "--budget", "32", "--prompt", "x = 1\n"]
    done = subprocess.run([*command, "--gen-length", "32", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["promotions"] > 0
    failed = subprocess.run([*command, "--device", "gpu"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("tidesim: no device 'gpu'")


NOTHING_IS_COMPILED = """
import sys
from tidesim.engine import kernel, layer_kernel
from tidesim.engine.choice import by_hand
from tidesim.engine.generate import Sampler
from tidesim.engine.live import DeviceSettings, open_model
from tidesim.engine.session import Session
from tidesim.engine.tokenizer import Prompt
from tidesim.execution import EXECUTIONS
from tidesim.policies import policy
from tidesim.shipped import find_shipped

functions = [each for module in (kernel, layer_kernel) for each in vars(module).values() if hasattr(each, "signatures")]
folder = find_shipped("models", "llada2-tiny")
with open_model(folder, DeviceSettings(device=sys.argv[1])) as live:
    session = Session(live, by_hand(policy("lru"), 64, EXECUTIONS["overlapped"], live), machine="here", seed=0)
    start = live.start

    def started(*how):
        offload = start(*how)
        started.before = [len(each.signatures) for each in functions]
        return offload

    live.start = started
    session.answer(folder, [Prompt(text="import os")], Sampler(gen_length=8))
    after = [len(each.signatures) for each in functions]
assert max(after) > 0 and after == started.before, dict(zip(functions, zip(started.before, after)))
"""


@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_all_is_compiled_before_a_run_begins(device: str) -> None:
    """In a process of its own, as in this one most of it has been called before."""
    subprocess.run([sys.executable, "-c", NOTHING_IS_COMPILED, device], check=True)
