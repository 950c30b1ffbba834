"""How the software runs a forward, and how long each part of it then takes on a machine.

A `Hardware` profile says what wires and chips can do. An `Execution` says how an engine uses them: pinned or pageable
copies, before the experts or in the background, one kernel for all experts or a loop, KV cache or not. `Costs`
puts model, machine and execution together and hands out durations; `check_memory` says what fits the device.

Every duration is worked out in seconds, rounded once to whole nanoseconds, and only added from there on. So parts
add up exactly, and every simulator that uses these numbers can agree to the last nanosecond.

Times follow the roofline model (Williams, Waterman and Patterson, CACM 2009): the longer of bytes over bandwidth and
operations over rate. For routed experts a profile may have curves, measured by their rows; these go before. Where
launches are asynchronous, launching the kernels of a part costs time only where it outlasts them. Letters: L MoE
layers, T rows routed in a forward, E experts.
"""

from tidesim.execution.costs import Costs
from tidesim.execution.memory import GIB, DeviceMemory, check_memory, device_memory, largest_budget
from tidesim.execution.presets import EXECUTIONS, Execution, execution

__all__ = [
    "EXECUTIONS",
    "GIB",
    "Costs",
    "DeviceMemory",
    "Execution",
    "check_memory",
    "device_memory",
    "execution",
    "largest_budget",
]
