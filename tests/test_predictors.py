"""Who says in advance what experts a layer will use, against cases worked by hand."""

from dataclasses import replace

import numpy as np
import pytest
from prefetch_cases import Foretold, begun, forward, see
from toy import toy_workload

from tidesim.errors import InputError
from tidesim.policies import Shape, forwards_of
from tidesim.policies.predictors import (
    ExpectedVisits,
    NearestForward,
    NearestSequence,
    Noisy,
    Oracle,
    Previous,
    Recorded,
)
from tidesim.workload import ForwardKind

# --- the routing itself ---


def test_the_oracle_knows_every_later_layer():
    oracle = begun(Oracle(toy_workload([[1, 3], [4, 0]], [[2, 2], [0, 4]])), 2, 2)
    assert oracle.predict(forward(1), 0, 1).tolist() == [0, 4]
    assert oracle.confidence(forward(1), 0) == 1


@pytest.mark.parametrize("kind", [Oracle, NearestSequence, NearestForward, lambda work: Recorded(work.counts)])
def test_data_of_another_network_is_refused(kind):
    with pytest.raises(InputError, match=r"has \[L, E\] = \[2, 2\], but the network that is run has \[3, 2\]"):
        begun(kind(toy_workload([[1, 3], [4, 0]])), 3, 2)


def test_a_workload_with_fewer_forwards_than_are_run_is_refused():
    with pytest.raises(InputError, match="knows of 1 forwards, not of forward 1; make it for the workload that is run"):
        begun(Oracle(toy_workload([[1, 3], [4, 0]])), 2, 2).predict(forward(1), 0, 1)


def many_pairs(num_forwards=40):
    """Two layers, 64 experts of which half are used."""
    rng = np.random.default_rng(3)
    used = np.argsort(rng.random((num_forwards, 2, 64)), axis=2) < 32
    return toy_workload(*(used * rng.integers(1, 9, used.shape)))


@pytest.mark.parametrize("accuracy", [0.0, 0.3, 0.8, 1.0])
def test_a_noisy_predictor_is_as_accurate_as_it_states(accuracy):
    workload = many_pairs()
    noisy, right, total = begun(Noisy(workload, accuracy, seed=1), 2, 64), 0, 0
    for info in forwards_of(workload):
        true, said = workload.counts[info.index, 1], noisy.predict(info, 0, 1)
        assert said.sum() == true.sum()
        assert (said[true > 0] <= true[true > 0]).all()
        right, total = right + np.minimum(said, true).sum(), total + true.sum()
    # 5800 pairs: a standard deviation of 0.007 at most.
    assert abs(right / total - accuracy) < (0.02 if 0 < accuracy < 1 else 1e-9)


def test_wrong_pairs_are_spread_over_experts_that_are_not_used():
    workload = toy_workload(*[[[4, 0, 0], [900, 0, 0]]] * 2)
    said = begun(Noisy(workload, 0.0), 2, 3).predict(forward(), 0, 1)
    assert said[0] == 0
    assert abs(said[1] - 450) < 75  # five standard deviations of 15
    full = toy_workload([[2, 2], [900, 900]])
    assert 700 < begun(Noisy(full, 0.5), 2, 2).predict(forward(), 0, 1).sum() < 1100


def test_noise_does_not_depend_on_the_order_of_questions():
    workload = many_pairs(4)
    infos = forwards_of(workload)
    one, other = begun(Noisy(workload, 0.5, seed=2), 2, 64), begun(Noisy(workload, 0.5, seed=2), 2, 64)
    said = [one.predict(info, 0, 1).tolist() for info in infos]
    assert [other.predict(info, 0, 1).tolist() for info in reversed(infos)] == said[::-1]
    assert [one.predict(info, 0, 1).tolist() for info in infos] == said
    assert begun(Noisy(workload, 0.5, seed=3), 2, 64).predict(infos[0], 0, 1).tolist() != said[0]


@pytest.mark.parametrize("bad", [-0.1, 1.1])
def test_accuracies_that_are_no_probabilities_are_refused(bad):
    with pytest.raises(InputError, match="accuracy"):
        Noisy(toy_workload([[1, 3]]), bad)


def test_a_recording_foretells_the_next_layer_only():
    recorded = begun(Recorded(np.array([[[0, 0], [1, 3], [2, 2]]], np.int32)), 3, 2)
    assert recorded.predict(forward(), 0, 1).tolist() == [1, 3]
    assert recorded.predict(forward(), 1, 2).tolist() == [2, 2]
    assert recorded.predict(forward(), 0, 2).tolist() == [0, 0]


def test_the_previous_forward_foretells_within_its_block():
    previous = begun(Previous(), 2, 2)
    see(previous, forward(0, kind=ForwardKind.PREFILL), 1, [9, 9])
    assert previous.predict(forward(1), 0, 1).tolist() == [0, 0]
    see(previous, forward(1), 1, [1, 3])
    assert previous.predict(forward(2), 0, 1).tolist() == [1, 3]
    assert previous.predict(forward(2, block=2), 0, 1).tolist() == [0, 0]
    assert previous.predict(forward(2, sequence=1), 0, 1).tolist() == [0, 0]
    begun(previous, 2, 2)
    assert previous.predict(forward(2), 0, 1).tolist() == [0, 0]


# --- what ran before ---

# Two sequences of two forwards; summed they are [20 20 02] and [02 02 20] (tokens of two experts in three layers).
SEQUENCES = toy_workload(
    [[1, 0], [2, 0], [0, 1]],
    [[1, 0], [0, 0], [0, 1]],
    [[0, 2], [0, 1], [1, 0]],
    [[0, 0], [0, 1], [1, 0]],
    sequence=np.array([4, 4, 7, 7], np.int32),
)


def test_the_nearest_sequence_has_the_highest_mean_cosine():
    nearest = begun(NearestSequence(SEQUENCES), 3, 2)
    see(nearest, forward(), 0, [1, 1])
    # 0.707 / 3 for both: the first one. Weights 1 - 1/4 and 1 - 2/4.
    assert nearest.predict(forward(), 0, 1).tolist() == [1.5, 0]
    assert nearest.predict(forward(), 0, 2).tolist() == [0, 1]
    see(nearest, forward(), 1, [0, 2])
    # (0.707 + 0) / 3 against (0.707 + 1) / 3.
    assert nearest.predict(forward(), 1, 2).tolist() == [1.5, 0]
    # What the sequence got so far counts still: layer 1 is like the second, layer 0 with [2, 1] like the first.
    see(nearest, forward(1), 0, [1, 0])
    assert nearest.predict(forward(1), 0, 1).tolist() == [0, 1.5]


def test_a_new_sequence_is_matched_from_nothing():
    nearest = begun(NearestSequence(SEQUENCES), 3, 2)
    see(nearest, forward(), 0, [2, 1])
    see(nearest, forward(), 1, [0, 2])
    # Layer 1 would be like the second sequence still.
    see(nearest, forward(1, sequence=1), 0, [2, 1])
    assert nearest.predict(forward(1, sequence=1), 0, 1).tolist() == [1.5, 0]
    # With the tokens of sequence 1, [2 2] would be as like one as the other.
    see(nearest, forward(2, sequence=2), 0, [0, 1])
    assert nearest.predict(forward(2, sequence=2), 0, 1).tolist() == [0, 1.5]


def test_as_coded_only_later_layers_are_compared_and_everybody_is_expected_a_little():
    nearest = begun(NearestSequence(SEQUENCES, "later", floor=0.5), 3, 2)
    see(nearest, forward(), 0, [0, 2])
    assert nearest.predict(forward(), 0, 1).tolist() == [2.5 * 0.75, 0.5 * 0.75]
    see(nearest, forward(), 1, [0, 2])
    see(nearest, forward(), 2, [2, 0])
    see(nearest, forward(1), 0, [2, 0])
    assert nearest.predict(forward(1), 0, 1).tolist() == [0.5 * 0.75, 2.5 * 0.75]


# Shares [.75 .25, 0 1, .5 .5] and [.25 .75, 1 0, 1 0].
FORWARDS = toy_workload([[3, 1], [0, 4], [2, 2]], [[1, 3], [4, 0], [4, 0]])


def test_the_nearest_forward_has_the_highest_cosine_over_all_layers_so_far():
    nearest = begun(NearestForward(FORWARDS), 3, 2)
    see(nearest, forward(), 0, [2, 0])
    assert nearest.confidence(forward(), 0) == pytest.approx(0.75 / 0.625**0.5)
    assert nearest.predict(forward(), 0, 1).tolist() == [0, 1]
    assert nearest.predict(forward(), 0, 2).tolist() == [0.25, 0.25]
    see(nearest, forward(), 1, [4, 0])
    # Products 0.75 + 0 and 0.25 + 1; both have the norm sqrt(0.625 + 1), this forward has sqrt(2).
    assert nearest.confidence(forward(), 1) == pytest.approx(1.25 / (1.625 * 2) ** 0.5)
    assert nearest.predict(forward(), 1, 2).tolist() == [1, 0]
    see(nearest, forward(1), 0, [2, 0])
    assert nearest.predict(forward(1), 0, 1).tolist() == [0, 1]


@pytest.mark.parametrize("kind", [NearestSequence, NearestForward])
def test_nothing_is_expected_by_an_empty_corpus(kind):
    empty = replace(FORWARDS, counts=FORWARDS.counts[:0], sequence=FORWARDS.sequence[:0])
    predictor = begun(kind(empty), 3, 2)
    see(predictor, forward(), 0, [2, 0])
    assert predictor.predict(forward(), 0, 2).tolist() == [0, 0]


def test_expected_visits_are_shares_times_visits_and_forgotten_with_an_eviction():
    score = ExpectedVisits(Foretold([[0, 0], [3, 1]]), nearest=1)
    for piece in (*score.parts, score):
        piece.begin(Shape(2, (1, 1)))
    visits = score.parts[1]

    def tell(what, *args):
        for piece in (visits, score):
            getattr(piece, what)(*args)

    tell("promoted", 1, 0)
    tell("observe", forward(), 0, np.array([1, 0]), np.zeros((2, 2), np.bool_))
    assert score.table.tolist() == [[0, 0], [0.75, 0]]
    tell("promoted", 1, 1)
    tell("observe", forward(), 1, np.array([1, 0]), np.array([[0, 0], [1, 1]], np.bool_))
    assert score.table.tolist() == [[0, 0], [2 * 0.75, 1 * 0.25]]
    tell("evicted", 1, 0)
    assert score.table.tolist() == [[0, 0], [0, 0.25]]
    tell("promoted", 1, 0)
    assert score.of(1).tolist() == [0, 0.25]
