"""Nearly as fast, and simpler: who is near enough, and who comes before whom."""

import json

import pytest

from tidesim.alternatives import Candidate, moving_of, near_optimal, simplest
from tidesim.policies import policy


def candidate(description, tok_per_s=100.0, moving="refresh", budget=(4, 4), refresh_interval=(2, 2), **params):
    return Candidate(
        description=description,
        moving=moving,
        budget=budget,
        refresh_interval=None if moving == "never" else refresh_interval,
        params=params,
        tok_per_s=tok_per_s,
    )


def names(candidates):
    return [one.description for one in candidates]


def test_the_simplest_within_two_per_cent_is_chosen():
    fetch = candidate("fetch", 100.0, "fetch", refresh_interval=None)
    refresh = candidate("refresh", 99.0)
    static = candidate("static", 98.0, "never")
    assert simplest([fetch, refresh, static]) is static
    assert simplest([fetch, refresh, static], within=0.01) is refresh
    assert simplest([fetch, refresh, static], within=0) is fetch
    assert names(near_optimal([fetch, refresh, static])) == ["static", "refresh", "fetch"]


def test_who_is_just_too_slow_is_left_out():
    assert names(near_optimal([candidate("a"), candidate("b", 98.0), candidate("c", 97.99)])) == ["a", "b"]


@pytest.mark.parametrize(
    ("simple", "other"),
    [
        ({"moving": "never", "budget": (9, 3)}, {"moving": "refresh"}),
        ({"moving": "refresh", "budget": (9, 3), "margin": 1}, {"moving": "fetch", "refresh_interval": None}),
        ({"budget": (6, 6), "margin": 1}, {"budget": (5, 3)}),
        ({"refresh_interval": (2, 2), "margin": 1}, {"refresh_interval": (2, 4)}),
        ({"budget": (6, 6)}, {"budget": (4, 4), "margin": 1}),
        ({"moving": "fetch", "refresh_interval": None, "budget": (6, 6)}, {"moving": "fetch"}),
        ({"budget": (3, 3), "tok_per_s": 99.0}, {"budget": (4, 4)}),
        ({"tok_per_s": 100.0}, {"tok_per_s": 99.0}),
    ],
)
def test_one_is_simpler_than_another(simple, other):
    pair = [candidate("other", **other), candidate("simple", **simple)]
    assert names(near_optimal(pair)) == ["simple", "other"]
    assert names(near_optimal(pair[::-1])) == ["simple", "other"]


def test_equals_stay_in_their_order():
    assert names(near_optimal([candidate("b"), candidate("a")])) == ["b", "a"]


def test_there_must_be_something_to_choose_from():
    with pytest.raises(ValueError, match="there must be a candidate"):
        simplest([])
    with pytest.raises(ValueError, match=r"within\(=2\) must be >= 0 and < 1"):
        simplest([candidate("a")], within=2)


def test_how_a_policy_moves_experts():
    static = policy("static", popularity=[[1, 2]])
    made = [
        static,
        policy("all-host"),
        policy("tide", refresh_interval=[1, 2]),
        policy("lru"),
        policy("fiddler", popularity=[[1, 2]]),
    ]
    assert [moving_of(one) for one in made] == ["never", "never", "refresh", "fetch", "fetch"]


def test_a_candidate_is_told_as_plain_data():
    told = json.loads(json.dumps(candidate("a", margin=0.5).to_dict()))
    assert told == {
        "description": "a",
        "moving": "refresh",
        "budget": [4, 4],
        "refresh_interval": [2, 2],
        "params": {"margin": 0.5},
        "tok_per_s": 100.0,
        "is_uniform": True,
        "num_params": 2,
    }
