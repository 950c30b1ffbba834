"""Batches: which forwards of consecutive sequences run together, and sums over them.

Letters: F forwards of single sequences, M forwards of batches.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batches:
    """Which of F forwards run together, as M forwards of batches.

    Parameters
    ----------
    order : [F], the forwards one batch after another; those that run together side by side, by their sequences.
    start : [M], where each merged forward begins in `order`.
    first : [M], a forward of the first sequence of its batch.
    batch : [F], the batch of each forward, counted from 0.
    place : [F], the sequence of each forward, counted from 0.
    """

    order: Ints
    start: Ints
    first: Ints
    batch: Ints
    place: Ints

    @classmethod
    def of(cls, sequence: npt.NDArray[np.integer[Any]], batch_size: int) -> Self:
        """Batches of `batch_size` consecutive sequences; `sequence` [F] is ascending. Forward i runs with forward i."""
        begin, place = np.unique(sequence, return_index=True, return_inverse=True)[1:]
        turn = np.arange(len(sequence)) - begin[place]
        batch = place // batch_size
        order = np.lexsort((place, turn, batch))
        is_new = (np.diff(batch[order], prepend=-1) != 0) | (np.diff(turn[order], prepend=-1) != 0)
        start = np.flatnonzero(is_new)
        first = begin[batch[order[start]] * batch_size]
        return cls(order=order, start=start, first=first, batch=batch, place=place)

    @property
    def leader(self) -> Ints:
        """[M], the forward of the first sequence that takes part in each merged one."""
        leader: Ints = self.order[self.start]
        return leader

    def any(self, is_so: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Whether anything is so [F] in each merged forward, [M]."""
        return np.asarray(np.logical_or.reduceat(is_so[self.order], self.start))

    def sums(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """`values` [F, ...] added up over the forwards that run together, [M, ...], in 32 bits or wider."""
        total = values[self.leader].astype(np.promote_types(values.dtype, np.int32), copy=False)
        size = np.diff(self.start, append=len(self.order))
        # One member of every merged forward at a time, so that memory holds no second copy of all values.
        for member in range(1, int(size.max())):
            has_more = np.flatnonzero(size > member)
            total[has_more] += values[self.order[self.start[has_more] + member]]
        return total

    def sum_of_peaks(self, values: npt.NDArray[np.int64]) -> int:
        """The largest sum, over all batches, of what each sequence of the batch has at most."""
        peaks, sums = np.zeros(self.place[-1] + 1, np.int64), np.zeros(self.batch[-1] + 1, np.int64)
        np.maximum.at(peaks, self.place, values)
        begin = np.flatnonzero(np.diff(self.place, prepend=-1))
        np.add.at(sums, self.batch[begin], peaks)
        return int(sums.max())
