"""The backend of an accelerator, with the CPU in its place: how often the device is called."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from accelerator_stand_in import Event, StandIn
from engine_cases import SMALL

from tidesim.engine.accelerator import AcceleratorBackend
from tidesim.engine.backend import Batch
from tidesim.engine.cores import Cores
from tidesim.engine.host_weights import HostWeights
from tidesim.engine.kernel import sorted_pairs
from tidesim.engine.slots import Place


class Counting(StandIn):
    """Counts what is made and recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.num_made = self.num_recorded = 0

    def new_event(self) -> Event:
        self.num_made += 1
        return super().new_event()

    def record(self, stream: object, event: Event | None = None) -> Event:
        self.num_recorded += 1
        return super().record(stream, event)


@pytest.fixture
def backend():
    weights = HostWeights.random(SMALL, torch.float32, torch.Generator().manual_seed(0))
    calls = Counting()
    with Cores(1) as cores:
        made = AcceleratorBackend(SMALL, weights, cores, calls)
        made.calls = calls
        made.open_slots([8, 0])
        yield made
        made.close()


def test_copies_that_are_begun_together_wait_for_one_event_and_arrive_one_by_one(backend) -> None:
    calls = backend.calls
    for number in range(5):
        arrivals = backend.copy([Place(0, number + slot, 0, slot) for slot in range(8)])
        assert len({id(arrival) for arrival in arrivals}) == 8
        assert all(backend.has_arrived(arrival) for arrival in arrivals)
        assert calls.num_recorded == (number + 1) * (8 + 2)
    # The one that copies wait for is used again at once, those of a batch when the next one finds it done.
    assert calls.num_made == 8 + 1
    assert backend.busy_ns()["h2d"] > 0
    assert backend.copy([]) == []
    assert torch.equal(backend.slabs[0], backend._weights.layers[0][4:12])


def test_an_arrival_stays_one_when_its_event_stands_for_another(backend) -> None:
    (first,) = backend.copy([Place(0, 0, 0, 0)])
    backend.copy([Place(0, 1, 0, 1)])
    assert first.event is None
    assert backend.has_arrived(first)
    backend.wait_for(first)


def test_copies_into_free_slots_wait_for_nothing(backend) -> None:
    backend.copy([Place(0, 3, 0, 0), Place(0, 4, 0, 1)], is_free=True)
    assert backend.calls.num_recorded == 2 + 1
    assert torch.equal(backend.slabs[0][:2], backend._weights.layers[0][3:5])


def test_experts_that_were_fetched_together_give_what_the_host_gives(backend, rng: np.random.Generator) -> None:
    """Two groups of a layer, in two slabs; experts in another order than their slots."""
    backend.open_slots([8, 3])
    ids = np.argsort(rng.random((6, SMALL.num_experts)), axis=1)[:, :4]
    x = torch.from_numpy(rng.standard_normal((6, SMALL.hidden_size), np.float32))
    pairs = sorted_pairs(ids, np.full(SMALL.num_experts, -1), 8)
    batch = Batch(x, pairs, 8, 0)
    missed = batch.missed
    backend.ids_on_host(x, torch.from_numpy(ids))
    backend.run_residents(0, batch)
    backend.finish_missed(backend.start_missed(0, batch, missed))
    expected = backend._on_device["outputs"][: ids.size].clone()
    fetched = missed[:8].tolist()
    slots = [(0, 6), (1, 2), (0, 1), (0, 7), (1, 0), (0, 0), (1, 1), (0, 3)]
    places = [Place(0, expert, *at) for expert, at in zip(fetched, slots, strict=True)]
    backend.copy(places)
    backend._on_device["outputs"][batch.pairs_of(np.array(fetched))] = torch.nan
    backend.run_fetched(batch, places[:5])
    backend.run_fetched(batch, places[5:])
    torch.testing.assert_close(backend._on_device["outputs"][: ids.size], expected, rtol=1e-4, atol=1e-5)


def test_stamps_of_a_forward_are_used_again_in_the_next(backend) -> None:
    for _ in range(4):
        assert len(backend.elapsed_ns([backend.stamp() for _ in range(6)])) == 5
    assert backend.calls.num_made == 6


def test_missed_pairs_are_few_slices(rng: np.random.Generator) -> None:
    for _ in range(50):
        ids = np.argsort(rng.random((6, SMALL.num_experts)), axis=1)[:, :4]
        slots = np.full(SMALL.num_experts, -1)
        slots[:5] = np.arange(5)
        pairs = sorted_pairs(ids, slots, 5)
        batch = Batch(torch.zeros(6, 4), pairs, 5, int(pairs.first[5]))
        some = batch.missed[rng.random(len(batch.missed)) < 0.7]
        if not len(some):
            continue
        runs = batch.runs_of(some)
        expected = batch.pairs_of(some)
        listed = np.concatenate([np.arange(run.start, run.stop) for run in runs])
        np.testing.assert_array_equal(listed, np.arange(24)[expected])
        assert len(runs) <= len(batch.missed) - len(some) + 1
