"""The commands as a user types them: exit codes, streams, and keys that others rely on."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tidesim import cli
from tidesim.moe import read_hf_config
from tidesim.planner import Plan
from tidesim.result import PARTS, RESOURCES
from tidesim.shipped import find_shipped
from tidesim.synthesize import synthesize

RESULT_KEYS = {
    *("tok_per_s", "makespan_s", "num_forwards", "generated_tokens", "hit_rate", "hits", "misses", "promotions"),
    *(
        "evictions",
        "h2d_bytes",
        "d2h_bytes",
        "breakdown_s",
        "busy_share",
        "policy",
        "budget",
        "refresh_interval",
        "refresh_steps",
    ),
    *("execution", "context", "batch_size", "hardware", "model", "trace_origin", "seed", "version"),
}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """`simulate` on a short trace of four MoE layers, at the sizes of a network with nineteen."""
    path = tmp_path_factory.mktemp("traces") / "short.h5"
    config = read_hf_config(find_shipped("models", "llada2-tiny"))
    synthesize(config, path, model_name="llada2-tiny", num_sequences=2, prompt_tokens=40, gen_length=32)
    return ("simulate", "--hardware", "rtx4090.yaml", "--trace", str(path), "--model", "llada2.0-mini")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Type a command; gives exit code, stdout and stderr."""

    def type_command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tidesim", *map(str, words)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return type_command


def test_help_names_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in ("trace", "inspect", "synthesize", "simulate", "plan", "compare"):
        assert command in out
        assert run(command, "--help")[0] == 0


def test_simulate_reports_every_key_and_parts_that_add_up(run: Run, base: tuple[str, ...]) -> None:
    code, out, _ = run(*base, "--policy", "tide", "--budget", 64, "--refresh-interval", 4, "--json")
    assert code == 0
    result = json.loads(out)
    assert set(result) >= RESULT_KEYS
    assert set(result["breakdown_s"]) == set(PARTS)
    assert set(result["busy_share"]) == set(RESOURCES)
    assert sum(result["breakdown_s"].values()) == pytest.approx(result["makespan_s"], rel=1e-12)
    assert result["model"] == "routing of llada2-tiny at the sizes of llada2.0-mini"
    assert result["trace_origin"] == "synthetic"
    assert (result["budget"], result["refresh_interval"], result["refresh_steps"]) == (64, 4, None)


def test_simulate_refreshes_at_the_steps_that_are_listed(base: tuple[str, ...], run: Run) -> None:
    asked = (*base, "--policy", "tide", "--budget", 16)
    code, out, _ = run(*asked, "--refresh-steps", "0,1,4", "--json")
    assert (code, json.loads(out)["refresh_interval"], json.loads(out)["refresh_steps"]) == (0, None, [0, 1, 4])
    assert "refresh at steps 0,1,4 of each block" in run(*asked, "--refresh-steps", "0,1,4")[1]


def test_the_replay_says_what_the_simulator_says(base: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    asked = (*base, "--policy", "tide", "--budget", 16, "--json")
    code, out, _ = run(*asked, "--engine", "replay")
    assert code == 0
    assert json.loads(out) == json.loads(run(*asked)[1])
    code, _, err = run(*asked, "--engine", "replay", "--timeline", tmp_path / "t.json")
    assert (code, "come from the event simulator; leave out --engine replay" in err) == (2, True)


def test_the_origin_of_the_trace_is_always_shown(run: Run, base: tuple[str, ...]) -> None:
    code, out, _ = run("simulate", "--hardware", "rtx4090", "--policy", "static", "--budget", 16)
    assert code == 0
    assert "synthetic" in out
    recorded = run("simulate", "--trace", "llada2-tiny", "--hardware", "rtx4090", "--policy", "static", "--budget", 16)
    assert "recorded" in recorded[1]


def test_decisions_and_timeline_are_written(run: Run, tmp_path: Path, base: tuple[str, ...]) -> None:
    decisions, timeline = tmp_path / "d.jsonl", tmp_path / "t.json"
    code, out, _ = run(
        *(*base, "--policy", "lru", "--budget", 32, "--decisions", decisions, "--timeline", timeline, "--json")
    )
    assert code == 0
    result = json.loads(out)
    lines = [json.loads(line) for line in decisions.read_text().splitlines()]
    assert len(lines) == result["num_forwards"] * 19
    assert set(lines[0]) - {"drop"} == {"forward", "layer", "promote", "evict", "hits", "misses"}
    assert sum(len(line["promote"]) for line in lines) == result["promotions"]
    assert sum(line["hits"] for line in lines) == result["hits"]
    events = json.loads(timeline.read_text())["traceEvents"]
    assert max(e["ts"] + e["dur"] for e in events if e["ph"] == "X") <= result["makespan_s"] * 1e6 + 1e-3


@pytest.mark.parametrize("engine", ["simpy", "replay"])
def test_a_run_says_what_it_waits_for_when_asked(run: Run, base: tuple[str, ...], engine: str) -> None:
    words = (*base, "--policy", "tide", "--budget", 32, "--engine", engine, "--critical-path")
    code, out, _ = run(*words, "--json")
    assert code == 0
    path = json.loads(out)["critical_path"]
    assert path["num_forwards"] == path["all_forwards"] == json.loads(out)["num_forwards"]
    assert {row["resource"] for row in path["resources"]} == {*RESOURCES, "launch"}
    assert sum(row["share"] for row in path["resources"]) == pytest.approx(1)
    assert sum(row["path_s"] for row in path["works"]) == pytest.approx(path["makespan_s"])
    out = run(*words)[1]
    assert "What the run waits for" in out
    assert f"all {path['num_forwards']} forwards (2 sequences)" in out
    assert "critical_path" not in json.loads(run(*words[:-1], "--json")[1])


def test_context_follows_the_execution_unless_told(run: Run, base: tuple[str, ...]) -> None:
    def context_of(*more: str) -> tuple[str, str]:
        result = json.loads(run(*base, "--policy", "static", "--budget", 32, "--json", *more)[1])
        return result["execution"], result["context"]

    assert context_of() == ("overlapped", "block")
    assert context_of("--execution", "tide-as-coded") == ("tide-as-coded", "full")
    assert context_of("--context", "full") == ("overlapped without KV cache", "full")


def test_sequences_run_together_when_told(run: Run, base: tuple[str, ...]) -> None:
    words = (*base, "--policy", "static", "--budget", 64)
    alone, together = (json.loads(run(*words, "--batch", batch, "--json")[1]) for batch in (1, 2))
    assert (alone["batch_size"], together["batch_size"]) == (1, 2)
    assert together["hits"] + together["misses"] == alone["hits"] + alone["misses"]
    assert together["generated_tokens"] == alone["generated_tokens"]
    assert together["num_forwards"] < alone["num_forwards"]
    assert together["makespan_s"] < alone["makespan_s"]
    assert "2 sequences at a time" in run(*words, "--batch", 2)[1]
    assert "at a time" not in run(*words)[1]
    assert run(*words, "--batch", 0)[0] == 2


def test_fewer_weight_bits_move_fewer_bytes(run: Run, base: tuple[str, ...]) -> None:
    options = ("--policy", "tide", "--budget", 48, "--json")
    full, small = (json.loads(run(*base, *options, "--weight-bits", bits)[1]) for bits in (16, 4))
    assert small["promotions"] == full["promotions"]
    assert small["h2d_bytes"] * 4 == full["h2d_bytes"]


def test_without_a_budget_the_largest_that_fits_is_taken(run: Run, base: tuple[str, ...]) -> None:
    fits = json.loads(run(*base, "--policy", "static", "--json")[1])["budget"]
    assert 0 < fits < 256
    code, _, err = run(*base, "--policy", "static", "--budget", fits + 1)
    assert code == 2
    assert f"largest budget that fits is {fits}" in err
    assert run(*base, "--policy", "static", "--budget", fits + 1, "--ignore-memory")[0] == 0


# One of each kind: with nothing to know, an interval, a popularity, a corpus, a predictor, predicted times.
@pytest.mark.parametrize("name", ["lru", "rlx", "static", "finemoe", "pre-gated", "gain"])
def test_policies_can_be_simulated_by_name(run: Run, base: tuple[str, ...], name: str) -> None:
    code, out, err = run(*base, "--policy", name, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["policy"], result["hardware"]) == (name, "rtx4090")
    assert result["refresh_interval"] == (4 if name in ("tide", "tide-as-coded", "rlx") else None)


def test_policies_learn_from_the_trace_itself_unless_another_is_named(run: Run, base: tuple[str, ...]) -> None:
    words = (*base, "--policy", "static", "--budget", 32, "--json")
    hits = [json.loads(run(*words, *more)[1])["hits"] for more in ((), ("--corpus", "llada2.0-mini-synthetic"))]
    assert hits[0] > hits[1]


def test_who_foretells_can_be_chosen(run: Run, base: tuple[str, ...]) -> None:
    words = (*base, "--policy", "pre-gated", "--budget", 128, "--json")
    rates = [json.loads(run(*words, "--predictor", how)[1])["hit_rate"] for how in ("previous", "oracle")]
    assert rates[0] < 0.8 < rates[1]
    code, _, err = run(*words, "--predictor", "look-ahead")
    assert code == 2
    assert "--lookahead" in err


@pytest.fixture
def bad_profile(tmp_path: Path) -> Callable[[Callable[[dict[str, dict[str, object]]], object]], Path]:
    def write(change: Callable[[dict[str, dict[str, object]]], object]) -> Path:
        content = yaml.safe_load(find_shipped("hardware_profiles", "rtx4090.yaml").read_text())
        change(content)
        path = tmp_path / "bad.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def negate(content: dict[str, dict[str, object]]) -> None:
    content["device"]["memory_gb_s"] = {"value": -5, "kind": "guess", "source": "none"}


def misspell(content: dict[str, dict[str, object]]) -> None:
    content["device"]["memory_gbs"] = content["device"].pop("memory_gb_s")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content["host"].pop("cores"), "$.host.cores"),
        (negate, "$.device.memory_gb_s"),
        (misspell, "$.device.memory_gbs"),
    ],
)
def test_a_bad_profile_names_file_field_and_rule(
    run: Run,
    bad_profile: Callable[[Callable[[dict[str, dict[str, object]]], object]], Path],
    change: Callable[[dict[str, dict[str, object]]], object],
    said: str,
) -> None:
    path = bad_profile(change)
    code, out, err = run("simulate", "--hardware", path, "--policy", "static", "--budget", 8)
    assert code == 2
    assert not out
    assert str(path) in err
    assert said in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--policy", "tied", "--budget", 8), "did you mean 'tide'"),
        (("--policy", "tide", "--budget", 300), "300"),
        (("--policy", "tide", "--budget", "many"), "whole number"),
        (("--policy", "tide", "--budget", "8,8"), "one for each"),
        (("--policy", "tide", "--budget", 8, "--refresh-interval", 0), "refresh_interval"),
        (("--policy", "static", "--budget", 8, "--refresh-interval", 4), "refresh_interval"),
        (("--policy", "static", "--budget", 8, "--refresh-steps", "0,4"), "refresh_steps"),
        (("--policy", "tide", "--budget", 8, "--refresh-steps", "0,four"), "whole numbers with commas"),
        (("--policy", "tide", "--budget", 8, "--refresh-steps", "0,1/0"), "has 2 lists"),
        (("--policy", "tide", "--budget", 8, "--refresh-steps", "0", "--refresh-interval", 4), "leave one of them out"),
        (("--policy", "lru", "--budget", 8, "--predictor", "oracle"), "takes no 'predictor'"),
        (("--policy", "pre-gated", "--budget", 8, "--predictor", "oracel"), "did you mean 'oracle'"),
        (("--policy", "static", "--budget", 8, "--execution", "overlaped"), "did you mean 'overlapped'"),
        (("--policy", "static", "--budget", 8, "--weight-bits", 5), "weight_bits"),
        (("--policy", "static", "--budget", 8, "--hardware", "rtx4080"), "did you mean"),
        (("--policy", "static", "--budget", 8, "--trace", "nothing.h5"), "no trace"),
        (("--policy", "static", "--budget", 8, "--model", "llada9"), "no model"),
        (
            ("--policy", "static", "--budget", 8, "--model", "llada-moe-7b-a1b"),
            "none is shipped, and `tidesim synthesize",
        ),
        (("--policy", "static", "--budget", 8, "--reserve-gib", -1), "reserve-gib"),
        (("--policy", "all-device"), "GiB"),
    ],
)
def test_bad_input_is_one_clear_error_and_exit_code_2(
    run: Run, options: tuple[object, ...], said: str, base: tuple[str, ...]
) -> None:
    code, out, err = run(*base, *options)
    assert code == 2
    assert not out
    assert said in err
    assert "Traceback" not in err


def test_a_trace_cut_in_half_is_refused_with_the_way_out(run: Run, tmp_path: Path, base: tuple[str, ...]) -> None:
    whole = find_shipped("traces", "llada2-tiny", ".h5").read_bytes()
    cut = tmp_path / "cut.h5"
    cut.write_bytes(whole[: len(whole) // 2])
    for words in (("inspect", cut), (*base, "--trace", cut, "--policy", "static", "--budget", 8)):
        code, out, err = run(*words)
        assert code == 2
        assert not out
        assert "cut.h5" in err
        assert "Traceback" not in err


def test_inspect_prints_the_statistics_beside_the_published_ones(run: Run) -> None:
    code, out, _ = run("inspect", "llada2-tiny")
    assert code == 0
    assert "recorded" in out
    assert "dMoE" in out
    assert "hits do not rank policies by time" in out
    code, out, _ = run("inspect", "llada2-tiny", "--json")
    document = json.loads(out)
    assert document["trace"]["num_layers"] == len(document["statistics"]["distinct_experts_by_layer"]) == 4
    curve = document["lru_hits_and_copies"]
    assert len(curve["hit_rate"]) == 257
    assert (curve["hit_rate"][0], curve["hit_rate"][256]) == (0, 1)


def test_synthesize_writes_a_trace_that_says_so(run: Run, tmp_path: Path) -> None:
    out_file = tmp_path / "s.h5"
    words = (
        "synthesize",
        "--shape",
        "llada2.0-mini",
        "--sequences",
        2,
        "--gen-length",
        32,
        "--out",
        out_file,
        "--json",
    )
    code, out, _ = run(*words)
    assert code == 0
    document = json.loads(out)
    assert (document["origin"], document["num_sequences"], document["num_layers"]) == ("synthetic", 2, 19)
    code, _, err = run(*words)
    assert code == 2
    assert "exists" in err
    again = json.loads(run(*words, "--overwrite")[1])
    assert again["fingerprint"] == document["fingerprint"]


def test_trace_records_the_tiny_model_and_shows_what_it_writes(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out_file = tmp_path / "t.h5"
    words = ("trace", "--limit", 1, "--gen-length", 32, "--out", out_file)
    code, out, err = run(*words, "--json", "--show-text")
    assert code == 0
    assert json.loads(out)["num_sequences"] == 1
    assert len(err.strip()) > 0
    document = json.loads(run("inspect", out_file, "--json")[1])
    assert document["trace"]["origin"] == "recorded"
    code, _, err = run("trace", "--model", "llada2.0-mini", "--out", tmp_path / "none.h5")
    assert code == 2
    assert "no weights" in err


def test_inspect_shows_how_well_the_layers_foretell_each_other(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out_file = tmp_path / "ahead.h5"
    assert run("trace", "--limit", 1, "--gen-length", 32, "--lookahead", "--out", out_file)[0] == 0
    code, out, _ = run("inspect", out_file)
    assert code == 0
    assert "experts foretold by the layer before" in out
    assert "in prefill forwards" in out
    assert "if named at random" in out
    found = json.loads(run("inspect", out_file, "--json")[1])["statistics"]
    first, *others = found["lookahead_share_by_layer"]
    assert first is None
    assert found["lookahead_share"] == pytest.approx(sum(others) / 3)
    assert found["lookahead_share_by_kind"]["denoise"] == found["lookahead_share"]
    assert found["lookahead_share_random"] == 8 / 256


def test_a_missing_engine_says_what_to_install(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, err = run("trace", "--out", tmp_path / "t.h5")
    assert code == 2
    assert "tidesim[engine]" in err


def test_plan_prints_and_saves_what_to_use(run: Run, base: tuple[str, ...], tmp_path: Path) -> None:
    out_file = tmp_path / "plan.json"
    words = ("plan", *base[1:], "--out", out_file, "--workers", 1)
    code, out, _ = run(*words, "--json")
    assert code == 0
    document = json.loads(out)
    assert {"chosen", "predicted", "baselines", "gap", "solver", "held_out", "solve_s"} <= set(document)
    assert set(document["predicted"]) >= RESULT_KEYS
    loaded = Plan.load(out_file)
    assert loaded.policy == document["chosen"]["policy"]
    first = out_file.read_bytes()
    code, out, _ = run(*words)
    assert code == 0
    assert out_file.read_bytes() == first
    for said in ("synthetic", "tok/s", "this plan", "static", "all-host", "jump_steps"):
        assert said in out


def test_a_plan_that_cannot_be_made_says_why(run: Run, base: tuple[str, ...], tmp_path: Path) -> None:
    for words, said in (
        (("--reserve-gib", 23), "GiB"),
        (("--held-out-share", 1.5), "held_out_share"),
        (("--out", tmp_path / "no" / "plan.json"), "plan.json"),
        (("--hardware", "a100-40gb", "--out", tmp_path / "plan.json"), "--out takes the plan of one machine"),
        (("--objective", "memory"), "needs tok_per_s"),
        (("--objective", "memory", "--tok-per-s", 1e9), "tok/s are wanted"),
        (("--policy", "guess"), "must be some of"),
    ):
        code, out, err = run("plan", *base[1:], "--workers", 1, *words)
        assert code == 2
        assert not out
        assert said in err
        assert "Traceback" not in err


@pytest.fixture(scope="module")
def rivals(base: tuple[str, ...]) -> tuple[object, ...]:
    """`compare` of few policies on one of the two sequences."""
    few = ("--policy", "lru", "--policy", "tide", "--held-out-share", 0.5, "--workers", 1)
    return ("compare", *base[1:], *few, "--budget", 64)


@pytest.fixture
def never_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a comparison begins."""
    monkeypatch.setattr("tidesim.cli.paper.run_comparison", lambda *_, **__: pytest.fail("it began"))


def test_compare_shows_the_origin_the_ceiling_and_every_policy(
    run: Run, rivals: tuple[object, ...], tmp_path: Path
) -> None:
    code, out, _ = run(*rivals)
    assert code == 0
    for said in (
        "synthetic",
        "no policy is faster than",
        "of ceiling",
        "lru",
        "tide, tau=1",
        "static in hindsight",
        "known before",
    ):
        assert said in out
    code, out, _ = run(*rivals, "--json")
    assert code == 0
    document = json.loads(out)
    assert {"ceiling", "pooled_ceiling", "hit_ceiling", "warnings", "left_out", "corpus"} <= set(document)
    assert (len(document["sequences"]), len(document["corpus"])) == (1, 1)
    assert document["sequences"] != document["corpus"]
    assert all(set(row) >= RESULT_KEYS for row in document["rows"])
    assert {row["policy"] for row in document["rows"]} == {"static", "lru", "tide"}
    assert max(row["ceiling_share"] for row in document["rows"]) <= 1


def test_compare_draws_a_picture(run: Run, rivals: tuple[object, ...], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "compared.png"
    assert run(*rivals, "--picture", picture)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.usefixtures("never_compares")
@pytest.mark.parametrize(
    ("name", "said"),
    [("no/compared.png", "compared.png: cannot be written"), ("compared.tide", "no picture ends so; take .png")],
)
def test_a_picture_that_cannot_be_written_is_refused_before_anything_runs(
    run: Run, rivals: tuple[object, ...], tmp_path: Path, name: str, said: str
) -> None:
    pytest.importorskip("matplotlib")
    code, out, err = run(*rivals, "--picture", tmp_path / name)
    assert (code, out) == (2, "")
    assert said in err


@pytest.mark.usefixtures("never_compares")
def test_a_picture_without_matplotlib_is_refused_before_anything_runs(
    run: Run, rivals: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run(*rivals, "--picture", tmp_path / "compared.png")
    assert (code, out) == (2, "")
    assert "drawing needs matplotlib: install the extra, pip install 'tidesim[engine]'" in err


def test_a_comparison_that_cannot_be_made_says_why(run: Run, rivals: tuple[object, ...]) -> None:
    for words, said in (
        (("--policy", "tied"), "did you mean 'tide'"),
        (("--budget", 250), "the largest budget that fits is"),
        (("--budget", 300), "budget(=300)"),
        (("--held-out-share", 1.5), "held_out_share"),
        (("--execution", "overlaped"), "did you mean 'overlapped'"),
    ):
        code, out, err = run(*rivals, *words)
        assert code == 2
        assert not out
        assert said in err
        assert "Traceback" not in err
