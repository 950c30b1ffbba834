"""What is known before a run, and policies that are made with as much of it as they ask for."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tidesim.errors import InputError, nearest_name
from tidesim.policies import Policy, parameters_of, policy
from tidesim.policies.predictors import Oracle, Predictor, Previous, Recorded
from tidesim.workload import Workload

# Who foretells: the forward before; the very routing that is run; the look-ahead of the routers, as it was recorded.
PREDICTORS = ("previous", "oracle", "look-ahead")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Knowledge:
    """What policies may know before they begin; None where nobody knows it.

    Parameters
    ----------
    workload : the sequences that are run, with their look-ahead if there is one.
    corpus : sequences to learn from.
    """

    workload: Workload | None = None
    corpus: Workload | None = None

    def make(self, name: str, params: Mapping[str, object]) -> Policy:
        """The policy called `name`, with `params` and what else it asks for.

        A predictor is named in `params`, as one of `PREDICTORS`; "previous" is the default.

        Raise InputError as `policy` does, and if it asks for something that is not known.
        """
        given = dict(params)
        for param, accepted in parameters_of(name).items():
            is_needed = accepted.default is accepted.empty
            if param == "predictor":
                given[param] = self._predictor(given.get(param, "previous"))
            elif param in ("corpus", "popularity") and param not in given and (is_needed or self.corpus is not None):
                given[param] = self._learnt(name, param)
        return policy(name, **given)

    def _learnt(self, name: str, param: str) -> object:
        """The corpus, or how popular [L, E] experts are in it."""
        if self.corpus is None:
            raise InputError(
                f"policy {name!r} learns {'who is popular' if param == 'popularity' else 'what comes'} from sequences "
                "that are known before; name a trace of them, --corpus TRACE."
            )
        return self.corpus if param == "corpus" else self.corpus.counts.sum(axis=0, dtype=np.int64)

    def _predictor(self, name: object) -> Predictor:
        """The predictor called `name`."""
        if name == "previous":
            return Previous()
        if name not in PREDICTORS:
            raise InputError(f"no predictor {name!r}; {nearest_name(str(name), PREDICTORS)}")
        if self.workload is None:
            raise InputError(
                f"predictor {name!r} knows the routing that is run, and nobody knows that of a text before it is "
                "written; run a trace, --routing TRACE, or take 'previous'."
            )
        if name == "oracle":
            return Oracle(self.workload)
        if self.workload.lookahead is None:
            raise InputError(f"predictor {name!r} needs a trace that keeps it; record one with --lookahead.")
        return Recorded(self.workload.lookahead)
