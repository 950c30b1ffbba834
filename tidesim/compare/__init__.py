"""All policies on one workload and one machine, at equal bytes, beside the ceiling that none of them can pass."""

from tidesim.compare.comparing import Comparison, Row, compare
from tidesim.compare.contenders import OWN_EXECUTIONS, Contender, contenders

__all__ = ["OWN_EXECUTIONS", "Comparison", "Contender", "Row", "compare", "contenders"]
