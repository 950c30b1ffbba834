"""Policies made by name: what each of them is given of what is known, and what is said where it is not."""

from dataclasses import replace

import numpy as np
import pytest
from toy import toy_workload

from tidesim.errors import InputError
from tidesim.policies import POLICIES, Ahead, Shape, forwards_of, parameters_of
from tidesim.policies.knowledge import PREDICTORS, Knowledge
from tidesim.residency import Moves

E = 4
CORPUS = toy_workload([[5, 3, 1, 0], [0, 4, 4, 1]])
KNOWN = Knowledge(workload=CORPUS, corpus=CORPUS)


@pytest.mark.parametrize("name", POLICIES)
def test_who_knows_everything_can_make_every_policy(name: str) -> None:
    assert KNOWN.make(name, {}).name.startswith(name)


def test_nobody_needs_a_corpus_who_does_not_ask_for_one() -> None:
    nothing = Knowledge()
    for name in POLICIES:
        needed = {one.name for one in parameters_of(name).values() if one.default is one.empty}
        if needed & {"corpus", "popularity"}:
            with pytest.raises(InputError, match=rf"'{name}' learns .*--corpus TRACE"):
                nothing.make(name, {})
        else:
            nothing.make(name, {})


def test_popularity_is_counted_in_the_corpus() -> None:
    made = KNOWN.make("static", {})
    assert made.initial(Shape(E, (2, 1))).experts == ((0, 1), (1,))
    given = KNOWN.make("static", {"popularity": np.array([[0, 0, 1, 2]])})
    assert given.initial(Shape(E, (1,))).experts == ((3,),)


def test_a_predictor_is_what_its_name_says_and_known_only_where_it_can_be() -> None:
    assert PREDICTORS[0] == "previous"
    for name in ("pre-gated", "next-layer-prefetch"):
        KNOWN.make(name, {"predictor": "oracle"})
        with pytest.raises(InputError, match=r"look-ahead.*--lookahead"):
            KNOWN.make(name, {"predictor": "look-ahead"})
        with pytest.raises(InputError, match="did you mean 'oracle'"):
            KNOWN.make(name, {"predictor": "oracel"})
        with pytest.raises(InputError, match=r"'oracle' knows the routing that is run.*--routing TRACE"):
            Knowledge(corpus=CORPUS).make(name, {"predictor": "oracle"})
    with pytest.raises(InputError, match="'lru' takes no 'predictor'"):
        KNOWN.make("lru", {"predictor": "previous"})
    with pytest.raises(InputError, match="did you mean 'lru'"):
        KNOWN.make("lur", {})


def test_a_recorded_look_ahead_is_what_foretells() -> None:
    foretold = replace(CORPUS, lookahead=np.array([[[0, 0, 0, 0], [0, 0, 2, 0]]], np.int32))
    made = Knowledge(workload=foretold).make("pre-gated", {"predictor": "look-ahead"})
    made.initial(Shape(E, (2, 2)))
    (forward,) = forwards_of(CORPUS)
    assert made.ahead(forward, 0, CORPUS.counts[0, 0], np.zeros((2, E), np.bool_)) == [Ahead(1, Moves((2,)))]
