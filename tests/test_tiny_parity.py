"""The promises of the live engine, kept on the model that comes with the package: same text, same decisions."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tidesim.engine.choice import by_hand
from tidesim.engine.generate import Sampler
from tidesim.engine.live import DeviceSettings, LiveModel, open_model
from tidesim.engine.session import Session
from tidesim.engine.tokenizer import read_prompts
from tidesim.execution import EXECUTIONS, Execution
from tidesim.hardware import load_hardware
from tidesim.policies import Policy, policy
from tidesim.result import Decision
from tidesim.shipped import shipped_folder
from tidesim.trace import Trace
from tidesim.validate.measuring import predict

TINY = shipped_folder("models") / "llada2-tiny"
PROMPTS = read_prompts(None, 1, is_chat=False)
SAMPLER = Sampler(gen_length=40, steps=12)
OVERLAPPED = EXECUTIONS["overlapped"]
UNCACHED = replace(OVERLAPPED, kv_cache=False)


@pytest.fixture(scope="module", params=["cpu", "disk"])
def live(request: pytest.FixtureRequest) -> Iterator[LiveModel]:
    with open_model(TINY, DeviceSettings(device=request.param, device_threads=1, host_threads=2)) as opened:
        yield opened


@pytest.fixture(scope="module")
def popularity() -> object:
    with Trace.open("llada2-tiny") as trace:
        return trace.workload("block").counts.sum(axis=0)


@pytest.fixture(scope="module")
def expected(live: LiveModel) -> list[str]:
    """What the model says with every expert on the device."""
    choice = by_hand(policy("all-device"), 256, OVERLAPPED, live)
    return Session(live, choice, machine="here", seed=0).answer(TINY, PROMPTS, SAMPLER).texts


@pytest.mark.slow
@pytest.mark.parametrize("execution", [OVERLAPPED, UNCACHED], ids=["cached", "uncached"])
@pytest.mark.parametrize("budget", [8, 100])
@pytest.mark.parametrize("name", ["all-host", "static", "lru", "tide", "tide-as-coded"])
def test_placement_changes_no_text_and_the_simulator_decides_the_same(
    live: LiveModel,
    expected: list[str],
    popularity: object,
    tmp_path: Path,
    name: str,
    budget: int,
    execution: Execution,
) -> None:
    def make() -> Policy:
        parameters = {"static": {"popularity": popularity}}.get(name, {})
        return policy(name, **(parameters | ({"refresh_interval": 3} if "tide" in name else {})))

    decisions: list[Decision] = []
    choice = by_hand(make(), budget, execution, live)
    session = Session(live, choice, machine="here", seed=0, decisions=decisions.append)
    outcome = session.answer(TINY, PROMPTS, SAMPLER, record=tmp_path / "live.h5")
    assert outcome.texts == expected
    with Trace.open(tmp_path / "live.h5") as trace:
        again = by_hand(make(), budget, execution, live)
        result, predicted = predict(live, trace.workload(execution.context), load_hardware("rtx4090"), again)
    assert decisions == predicted
    assert (outcome.result.hits, outcome.result.promotions) == (result.hits, result.promotions)
