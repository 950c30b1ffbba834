"""The shape of the package: who may import whom, what the front door offers, what may be read from a user."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tidesim

PACKAGE = Path(tidesim.__file__).parent
ROOT = PACKAGE.parent

# Imports point to a lower rank only.
RANKS = (
    ("errors",),
    ("batches", "compiling", "shipped", "tables", "windows", "workers"),
    ("moe", "hardware", "workload", "residency", "result"),
    ("trace_format", "counting", "execution"),
    ("trace", "policies"),
    ("paper_run", "lending"),
    ("statistics", "synthesize", "simulator", "replay", "ceiling"),
    ("timing", "critical_path", "alternatives"),
    ("what_if",),
    ("planner", "explained", "scored"),
    ("comparison", "exports", "study"),
    ("engine", "report", "console"),
    ("validate",),
    ("cli",),
    ("__main__", "__init__"),
)
RANK = {module: rank for rank, modules in enumerate(RANKS) for module in modules}
ONLY_USER = {"yaml": "hardware", "h5py": "trace", "simpy": "simulator", "pulp": "planner", "torch": "engine"}
ONLY_USER |= {"pandas": "study", "dask": "study", "distributed": "study", "networkx": "critical_path"}
# Lazy on purpose: the commands that run the network import it inside.
LAZY = {("cli", "torch"), ("cli", "engine"), ("cli", "validate")}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """First part of a module's path inside the package: packages count as one module."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(dotted name, whether at the top of the module) of every import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "tidesim" else [node.module]
            )
            found += [(name, id(node) in top) for name in names]
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = module_of(path)
    assert own in RANK, f"{own} has no rank: add it to RANKS"
    for name, is_top in imports_of(path):
        root, *rest = name.split(".")
        if root == "tidesim" and rest[0] != own:
            assert RANK[rest[0]] < RANK[own], f"{own} (rank {RANK[own]}) imports {name}"
            if (own, rest[0]) in LAZY:
                assert not is_top, f"{own} must import {name} inside the command that needs it"
        if root in ONLY_USER and (own, root) not in LAZY:
            assert own == ONLY_USER[root], f"{root} is for {ONLY_USER[root]} alone, not for {own}"


def test_the_front_door_offers_exactly_what_it_imports() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imported = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(tidesim.__all__) == sorted(imported)
    assert all(hasattr(tidesim, name) for name in tidesim.__all__)


def test_importing_tidesim_leaves_torch_alone() -> None:
    code = "import sys, tidesim, tidesim.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_unpickles_or_runs_code_from_a_file() -> None:
    forbidden = re.compile(
        r"import pickle|pickle\.load|trust_remote_code|yaml\.load\(|\beval\(|\bexec\(|weights_only=False"
    )
    for path in modules():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert not forbidden.search(line.replace(".eval()", "")), f"{path}:{number}: {line}"


def test_the_top_level_is_what_the_readme_says() -> None:
    expected = {
        "LICENSE",
        "Makefile",
        "README.md",
        "hardware_profiles",
        "notebooks",
        "pyproject.toml",
        "tests",
        "tidesim",
    }
    expected.add("traces")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    tops = {name.split("/")[0] for name in listed.stdout.split() if not name.startswith(".")}
    assert tops <= expected
