"""Routing traces: where the router sent every token of every forward, in one HDF5 file.

A trace holds routing and nothing about time. `TraceWriter` appends whole sequences, `Trace` opens and checks a
file, and `Trace.workload` reduces it to what a simulator eats: how many tokens each expert got in each forward.

Letters: F forwards, L MoE layers, T tokens, E experts, K top-k, B block length, N routed tokens of all forwards.
"""

from tidesim.trace.reading import Trace
from tidesim.trace.writing import ForwardRouting, SequenceRouting, TraceWriter
from tidesim.workload import Context, ForwardKind, Workload

__all__ = ["Context", "ForwardKind", "ForwardRouting", "SequenceRouting", "Trace", "TraceWriter", "Workload"]
