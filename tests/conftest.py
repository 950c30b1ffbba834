"""Settings for the whole test run, and a recording that several modules read."""

import os
from pathlib import Path

import numpy as np
import pytest
from compiled import compile_all
from hand_made import decode, writer
from hypothesis import settings

from tidesim.trace import SequenceRouting

# Tests of small tensors gain nothing from a thread pool, and lose much where another process keeps a core busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A quarter of the usual number: the tests are run often, and draw other cases each time.
settings.register_profile("tidesim", max_examples=25)
settings.load_profile("tidesim")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Before tests are shared among processes."""
    compile_all()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def sequence(rng: np.random.Generator) -> SequenceRouting:
    return decode(rng, prompt_tokens=9, steps=[2, 3])[0]


@pytest.fixture
def path(tmp_path: Path, sequence: SequenceRouting) -> Path:
    """A trace of two sequences."""
    file = tmp_path / "trace.h5"
    with writer(file) as out:
        out.append(sequence)
        out.append(sequence)
    return file
