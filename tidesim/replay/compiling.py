"""How the replay is compiled: as everything else is."""

from tidesim.compiling import Whole, compiled, inlined

__all__ = ["Whole", "compiled", "inlined"]
