"""All policies on one workload and one machine, at equal bytes, beside the ceiling that none of them can pass."""

from tidesim.comparison.comparing import Comparison, Row, compare
from tidesim.comparison.contenders import OWN_EXECUTIONS, STATIC_IN_HINDSIGHT, Contender, contenders

__all__ = ["OWN_EXECUTIONS", "STATIC_IN_HINDSIGHT", "Comparison", "Contender", "Row", "compare", "contenders"]
