"""Splits of misses between host and device by what they take: the least sum, or both done as soon as possible."""

from collections.abc import Sequence

import numpy as np

from tidesim.errors import InputError
from tidesim.execution import Costs
from tidesim.policies.interface import Counts, ForwardInfo, Mask, Shape
from tidesim.policies.pieces import Floats, Piece, Score
from tidesim.policies.splits import Fetched, Split

# --- what a missed expert costs ---


class Tariff(Piece):
    """What missed experts cost on the host and fetched, in one unit."""

    def of(self, tokens: Counts) -> tuple[Floats, Floats]:
        """Prices on the host and fetched of experts with so many tokens each; both have the shape of `tokens`."""
        raise NotImplementedError


class Constants(Tariff):
    """So much for each token on the host, and one price for every expert that is fetched.

    Raise InputError if a price is negative.
    """

    def __init__(self, host_per_token: float, copy: float) -> None:
        if host_per_token < 0 or copy < 0:
            raise InputError(f"prices(={host_per_token}, {copy}) must be >= 0.")
        self._host_per_token, self._copy = host_per_token, copy

    def of(self, tokens: Counts) -> tuple[Floats, Floats]:
        """See `Tariff`."""
        return self._host_per_token * tokens.astype(np.float64), np.full(tokens.shape, float(self._copy))


class Predicted(Tariff):
    """Nanoseconds by the profile: an expert of so many rows on the host; its copy, and its run alone on the device.

    Where the host is called once for a whole layer, that call is nobody's and is left out. Raise InputError at the
    beginning of a run without predicted times.
    """

    def begin(self, shape: Shape) -> None:
        """Make a table of both by rows."""
        costs = required_costs(shape)
        self._host_ns = costs.host_expert_ns.astype(np.float64)
        self._fetched_ns = costs.promote_ns + costs.fetched_ns.astype(np.float64)

    def of(self, tokens: Counts) -> tuple[Floats, Floats]:
        """See `Tariff`."""
        return self._host_ns[tokens], self._fetched_ns[tokens]


def required_costs(shape: Shape) -> Costs:
    """The predicted times of a run. Raise InputError if there are none."""
    if shape.costs is None:
        raise InputError("the policy decides by a profile's times, and this run has no profile; take mode 'coded'.")
    return shape.costs


# --- splits ---


class LeastSum(Split):
    """The least sum of what all misses cost, as if host and device took turns; the fetched ones are dropped.

    A sum is least when each of its terms is, so each expert goes where it is cheaper, whatever becomes of the others.
    Ties: the device. Copies are made in ascending ids.
    """

    def __init__(self, tariff: Tariff) -> None:
        self._tariff = tariff

    @property
    def parts(self) -> Sequence[Piece]:
        """The prices."""
        return (self._tariff,)

    def choose(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Fetched:
        """Those that are not cheaper on the host."""
        on_host, fetched = self._tariff.of(counts[list(missed)])
        return Fetched(drop=[expert for expert, is_dear in zip(missed, on_host >= fetched, strict=True) if is_dear])


class Balanced(Split):
    """As many are fetched as let copies and host, which begin together, end soonest; the fetched ones stay.

    With F of M misses fetched, the longer of F copies and M - F experts on the host is least; ties: the smaller F.
    Without predicted times at most one is fetched.

    An expert is taken to last as long as its weights do, by the profile: a copy on the link, and the host's run of a
    single row. Where copies and host slow each other (`hardware.contention`), both last as long as beside each other.

    Parameters
    ----------
    first : those worth most are fetched, most first; ties: the lower id.
    """

    def __init__(self, first: Score) -> None:
        self._first = first

    @property
    def parts(self) -> Sequence[Piece]:
        """The score."""
        return (self._first,)

    def begin(self, shape: Shape) -> None:
        """Look up how long one expert takes."""
        self._ns_each: tuple[float, float] | None = None
        if shape.costs is not None:
            copy_ns, host_ns = float(shape.costs.promote_ns), float(shape.costs.host_expert_ns[1])
            contention = shape.costs.hardware.contention
            if contention is not None:
                copy_ns /= contention.copies_beside_host
                host_ns /= contention.host_beside_copies
            self._ns_each = copy_ns, host_ns

    def choose(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Fetched:
        """Those worth most."""
        worth = self._first.of(layer)
        return Fetched(keep=sorted(missed, key=lambda expert: (-worth[expert], expert))[: self._number(len(missed))])

    def _number(self, num_missed: int) -> int:
        """F of M."""
        if self._ns_each is None:
            return min(1, num_missed)
        copy_ns, host_ns = self._ns_each
        fetched = np.arange(num_missed + 1)
        return int(np.argmin(np.maximum(fetched * copy_ns, (num_missed - fetched) * host_ns)))


class TwoPointers(Split):
    """Host and device take experts from the two ends of one list, whoever would be done with its next one first.

    The list has the hits and then the misses, both with most tokens first (ties: the lower id). The device takes from
    the front, for `device` each and `wait` more for a miss; the host takes from the back, for `host` a token and `call`
    once. Ties: the device. The misses that the device takes are fetched in their order, and stay.

    Hits that the host would take run on the device all the same. That changes no miss, as these are taken before.
    """

    def __init__(self, *, device: float, wait: float, host: float, call: float) -> None:
        self._device, self._wait, self._host, self._call = device, wait, host, call

    def choose(
        self, forward: ForwardInfo, layer: int, missed: Sequence[int], counts: Counts, is_resident: Mask
    ) -> Fetched:
        """Those that the device takes."""
        num_hits = int(np.count_nonzero((counts > 0) & is_resident[layer]))
        misses = sorted(missed, key=lambda expert: (-counts[expert], expert))
        return Fetched(keep=misses[: self._number(num_hits, counts[misses].tolist())])

    def _number(self, num_hits: int, tokens: Sequence[int]) -> int:
        """How many misses the device takes, of those with so many `tokens` each."""
        device, host, call = 0.0, 0.0, self._call
        taken, left = 0, len(tokens)
        while taken < left:
            on_device = self._device + (0 if num_hits else self._wait)
            on_host = call + self._host * tokens[left - 1]
            if device + on_device > host + on_host:
                host, call, left = host + on_host, 0.0, left - 1
                continue
            device += on_device
            num_hits, taken = (num_hits - 1, taken) if num_hits else (0, taken + 1)
        return taken
