import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidesim.errors import BudgetError, InputError
from tidesim.residency import NO_MOVES, Moves, Placement, Residency, Swap, per_layer


@pytest.fixture
def residency() -> Residency:
    """Two layers of six experts: layer 0 has 2 of 3 slots taken, layer 1 has 2 of 2."""
    return Residency(6, (3, 2), Placement(((0, 4), (1, 2))))


def test_the_placement_is_resident_at_the_start(residency):
    assert residency.placement() == Placement(((0, 4), (1, 2)))
    assert residency.is_resident(0).tolist() == [True, False, False, False, True, False]
    assert [residency.num_resident(layer) for layer in range(residency.num_layers)] == [2, 2]


def test_a_refresh_evicts_first_so_a_full_layer_can_swap(residency):
    assert residency.apply(1, Moves(promote=(5, 0), evict=(2, 1))) == (Swap(5, 2), Swap(0, 1))
    assert residency.placement().experts[1] == (0, 5)


def test_promotions_take_free_slots_before_those_of_the_evicted(residency):
    assert residency.apply(0, Moves(promote=(5, 3), evict=(0,))) == (Swap(5, None), Swap(3, 0))


def test_evictions_without_a_promotion_come_last(residency):
    assert residency.apply(1, Moves(promote=(5,), evict=(1, 2))) == (Swap(5, 1), Swap(None, 2))
    assert residency.apply(0, NO_MOVES) == ()


def test_an_expert_fetched_early_can_be_a_later_victim_of_the_same_fetch(residency):
    assert residency.fetch(1, Moves(promote=(0, 3, 5), evict=(1, 2, 0))) == (Swap(0, 1), Swap(3, 2), Swap(5, 0))
    assert residency.placement().experts[1] == (3, 5)


@pytest.mark.parametrize("victims", [(), (1,), (1, 2, 4)])
def test_a_fetch_needs_one_victim_for_each_expert_without_a_free_slot(residency, victims):
    with pytest.raises(ValueError, match="layer 1"):
        residency.fetch(1, Moves(promote=(0, 3), evict=victims))


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        (Moves(promote=(4,)), "expert 4 cannot be promoted, it is on the device already"),
        (Moves(promote=(1, 1)), "expert 1 cannot be promoted"),
        (Moves(evict=(1,)), "expert 1 cannot be evicted, it is not on the device"),
        (Moves(evict=(0, 0)), "expert 0 cannot be evicted"),
        (Moves(promote=(1, 2)), r"no slot is left for expert 2, budget\(=3\) is full"),
        (Moves(promote=(6,)), r"expert\(=6\) must be in 0..5"),
        (Moves(promote=(-1,)), r"expert\(=-1\) must be in 0..5"),
    ],
)
def test_moves_that_do_not_fit_are_refused(residency, moves, message):
    with pytest.raises(ValueError, match=message):
        residency.apply(0, moves)


def test_the_view_follows_moves_and_cannot_be_written(residency):
    view = residency.is_resident(0)
    residency.apply(0, Moves(promote=(3,)))
    assert view[3]
    with pytest.raises(ValueError, match="read-only"):
        view[1] = True


def test_budgets_out_of_range_are_refused():
    with pytest.raises(BudgetError, match=r"budget\(=7\) of layer 1 must be in 0..num_experts\(=6\)"):
        Residency(6, (3, 7), Placement(((), ())))
    with pytest.raises(BudgetError, match="budget"):
        Residency(6, (-1,), Placement(((),)))


def test_a_placement_that_exceeds_the_budget_or_the_layers_is_refused():
    with pytest.raises(ValueError, match="no slot is left"):
        Residency(6, (1,), Placement(((0, 1),)))
    with pytest.raises(ValueError, match="1 layers"):
        Residency(6, (1, 1), Placement(((0,),)))


def test_placements_survive_json_and_sort_their_ids():
    placement = Placement.of([{3, 1}, [], [2]])
    assert placement.to_json() == [[1, 3], [], [2]]
    assert Placement.from_json(placement.to_json()) == placement


@pytest.mark.parametrize("bad", [None, [1], [[1.5]], [[True]], {"0": [1]}])
def test_json_that_is_no_placement_is_refused(bad):
    with pytest.raises(InputError, match="placement"):
        Placement.from_json(bad)


@pytest.mark.parametrize("bad", [((1, 1),), ((2, 1),), ((-1,),)])
def test_placements_with_repeated_or_unordered_ids_are_refused(bad):
    with pytest.raises(ValueError, match="ascending"):
        Placement(bad)


def test_one_number_serves_all_layers_and_a_list_serves_each():
    assert per_layer(4, 3, "budget") == (4, 4, 4)
    assert per_layer([1, 2], 2, "budget") == (1, 2)
    with pytest.raises(InputError, match="budget has 2 numbers; give one, or one for each of the 3 MoE layers"):
        per_layer([1, 2], 3, "budget")


@settings(deadline=None)
@given(st.data())
def test_no_sequence_of_legal_moves_exceeds_the_budget(data):
    budget = data.draw(st.integers(0, 8))
    residency = Residency(8, (budget,), Placement.of([range(data.draw(st.integers(0, budget)))]))
    for _ in range(5):
        resident = set(residency.placement().experts[0])
        evict = data.draw(st.lists(st.sampled_from(sorted(resident)), unique=True)) if resident else []
        room = budget - len(resident) + len(evict)
        absent = sorted(set(range(8)) - resident)
        promote = data.draw(st.lists(st.sampled_from(absent), unique=True, max_size=room)) if absent and room else []
        swaps = residency.apply(0, Moves(tuple(promote), tuple(evict)))
        assert set(residency.placement().experts[0]) == (resident - set(evict)) | set(promote)
        assert residency.num_resident(0) == len(resident) - len(evict) + len(promote) <= budget
        assert [swap.promote for swap in swaps if swap.promote is not None] == promote
        assert [swap.evict for swap in swaps if swap.evict is not None] == evict
