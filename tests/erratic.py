"""A policy that does everything that a policy may do, at random: hard on slots, copies and books."""

import numpy as np

from tidesim.policies import Ahead, Policy, Serving
from tidesim.residency import Moves, Placement


class Erratic(Policy):
    """Refreshes, keeps, drops, leaves to the host and moves ahead; the same in every run of the same workload."""

    name = "erratic"
    miss_action = "split"

    def __init__(self, scope="layer", scratch=2):
        self.scope, self.scratch = scope, scratch

    def initial(self, shape):
        self.shape = shape
        self.budgets = [sum(shape.budgets)] * shape.num_layers if self.scope == "network" else shape.budgets
        return Placement(tuple(tuple(range(budget // 2)) for budget in shape.budgets))

    def _rng(self, forward, layer, what):
        return np.random.default_rng([forward.index, layer, what])

    def _victims(self, layer, present, rng):
        """Residents that could go for `layer`, as moves name them, in random order."""
        pooled = self.scope == "network"
        return rng.permutation(np.flatnonzero(present if pooled else present[layer])).tolist()

    def _num_free(self, layer, present):
        return self.budgets[layer] - int(np.count_nonzero(present if self.scope == "network" else present[layer]))

    def _swaps(self, layer, present, rng, most):
        """A few evictions, and then promotions as far as there is room."""
        there = self._victims(layer, present, rng)[: rng.integers(0, most + 1)]
        room = self._num_free(layer, present) + len(there)
        gone = {there_id % self.shape.num_experts for there_id in there}
        away = [e for e in rng.permutation(np.flatnonzero(~present[layer])).tolist() if e not in gone]
        return Moves(tuple(away[: min(room, int(rng.integers(0, most + 1)))]), tuple(there))

    def refresh(self, forward, layer, counts, is_resident):
        return self._swaps(layer, is_resident, self._rng(forward, layer, 0), 3)

    def serve(self, forward, layer, missed, counts, is_resident):
        rng = self._rng(forward, layer, 1)
        shuffled = rng.permutation(missed).tolist()
        first, second = sorted(rng.integers(0, len(missed) + 1, 2).tolist())
        keep, drop = shuffled[:first], shuffled[first:second]
        idle = np.flatnonzero((counts == 0) & ~is_resident[layer])
        if len(idle) and rng.random() < 0.3:
            (keep if rng.random() < 0.5 else drop).append(int(rng.choice(idle)))
        present, offset = is_resident.copy(), layer * len(counts) if self.scope == "network" else 0
        # Residents may be copied through scratch memory as well, even those that give up their slots.
        if rng.random() < 0.3:
            drop += rng.permutation(np.flatnonzero(present[layer])).tolist()[:2]
        free, kept, evict = self._num_free(layer, present), [], []
        for expert in keep:
            if free:
                free -= 1
            else:
                candidates = self._victims(layer, present, rng)
                if not candidates:
                    drop.append(expert)
                    continue
                evict.append(candidates[0])
                present.reshape(-1)[candidates[0] - offset + layer * len(counts)] = False
            present[layer, expert] = True
            kept.append(expert)
        return Serving(Moves(tuple(kept), tuple(evict)), tuple(drop))

    def ahead(self, forward, layer, counts, is_resident):
        rng = self._rng(forward, layer, 2)
        there = int(rng.integers(self.shape.num_layers))
        return [Ahead(there, self._swaps(there, is_resident, rng, 2))] if rng.random() < 0.7 else []
