"""What the README tells people to type works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
