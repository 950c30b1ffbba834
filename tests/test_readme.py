"""What the README tells people to type works."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tidesim.study import read_results, sensitivity

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
def test_the_python_examples_run() -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert examples
    for code in examples:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert float(done.stdout.split()[0]) > 0


def test_every_command_shown_exists_with_its_options() -> None:
    from typer.main import get_command

    from tidesim.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    shown = re.findall(r"^\$ tidesim (.*)$|`tidesim ([^`]*)`", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(shown) > 4
    for words in ("".join(pair).split() for pair in shown):
        known = {option for parameter in commands[words[0]].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.slow
def test_the_study_runs_and_its_answers_are_those_that_are_told(tmp_path: Path) -> None:
    text = README.read_text(encoding="utf-8")
    (study,) = re.findall(r"```yaml\n(# study.yaml.*?)```", text, re.DOTALL)
    (command,) = re.findall(r"^\$ (tidesim sweep .*)$", text, re.MULTILINE)
    (shown,) = re.findall(r"\$ tidesim sweep .*?\n(.*?)```", text, re.DOTALL)
    (tmp_path / "study.yaml").write_text(study, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(README.parent)}
    words = [sys.executable, "-m", *command.split()]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    printed = "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())
    assert printed.startswith(shown)
    (asked,) = re.findall(r"```pycon\n(.*?)```", text, re.DOTALL)
    code = asked.replace(">>> ", "").replace("sensitivity(results", "found = sensitivity(results")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    found = sensitivity(read_results(tmp_path / "runs" / "study"), "links.h2d_pinned.bandwidth_gb_s")
    told = found[(found["budget_asked"] == "32") & (found["weight_bits"] == 16)].set_index("policy")
    lru, static = told.loc["lru"], told.loc["static"]
    assert f"16 bits {100 * lru['change']:.0f} % more tokens a second, an elasticity of {lru['elasticity']:.2f}" in text
    assert f"which copies nothing, {100 * static['change']:.2f} %." in text
