"""Plan expert offloading for mixture-of-experts diffusion LLMs on paper, and prove it on the machine."""

from tidesim.comparison import Comparison, compare
from tidesim.errors import InputError, TidesimError
from tidesim.execution import EXECUTIONS, Execution
from tidesim.hardware import Hardware, load_hardware
from tidesim.moe import MoEConfig, load_moe_config
from tidesim.planner import Plan, plan
from tidesim.policies import Policy, Serving, policy
from tidesim.residency import Moves, Placement
from tidesim.result import RunResult
from tidesim.simulator import simulate
from tidesim.statistics import trace_statistics
from tidesim.study import Study, read_results, run_study
from tidesim.trace import Trace, TraceWriter, Workload

__all__ = [
    "EXECUTIONS",
    "Comparison",
    "Execution",
    "Hardware",
    "InputError",
    "MoEConfig",
    "Moves",
    "Placement",
    "Plan",
    "Policy",
    "RunResult",
    "Serving",
    "Study",
    "TidesimError",
    "Trace",
    "TraceWriter",
    "Workload",
    "compare",
    "load_hardware",
    "load_moe_config",
    "plan",
    "policy",
    "read_results",
    "run_study",
    "simulate",
    "trace_statistics",
]
