"""Why a run takes as long as it does: the longest path through all that waited for something else.

Every task of a run is a node of a graph, and an edge says that one waited for another (`simulator.Task`). A task starts
when the last that it waited for has ended, so the longest path to the end of the run is exactly as long as the run.
What lies on it is what took the time; everything else ran beside it and was hidden. So the parts of the path by
resource say where the time went in another way than `RunResult.breakdown_s` does: there waiting for copies is waiting,
here it is the copies that are waited for, and the kernels that they waited for in their turn.

The same graph says what would be left if one resource took no time at all, with the same decisions: the longest path
where its tasks have length 0. Where device, host and copies slow each other, the others are taken at their speed alone
for that, so that it is a bound in any case.

The path of a whole run would take long to find, so it is found on a sample: the first sequences, whole ones if one is
short enough.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from tidesim.hardware import Hardware
from tidesim.moe import MoEConfig
from tidesim.paper_run import RunSettings
from tidesim.policies import Policy
from tidesim.simulator import LAUNCH, Task, simulate
from tidesim.workload import Workload

if TYPE_CHECKING:
    import networkx as nx

MOST_TASKS = 10_000  # in a sample: one or two seconds
_PILOT_FORWARDS = 8  # run before, to see how many tasks a forward has
_MOST_STRETCHES = 5
_START = -1  # of the run, before its first task
_TIME = "time"  # the length of an edge, beside one length for each resource that takes no time

# What can be on the path; the device, the host and the links as in `RunResult`, and the main process that launches.
ON_PATH = {
    "device": "kernels on the device",
    "host": "missed experts on the host, with their rows' way there and back",
    "h2d": "copies of experts to the device",
    "d2h": "copies of experts to the host",
    LAUNCH: "launching kernels, as far as it outlasts them",
}
# Resource and first word of a task's name -> what it does.
_WORKS = {
    ("device", "entry"): "embedding and layers without experts",
    ("device", "dense"): "attention, router and shared experts",
    ("device", "experts"): "resident experts",
    ("device", "expert"): "fetched experts",
    ("device", "head"): "lm_head and sampling",
    ("host", "experts"): "missed experts",
    ("h2d", "promote"): "copies to the device",
    ("d2h", "evict"): "copies to the host",
    (LAUNCH, LAUNCH): "launching",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceShare:
    """What one resource is on the critical path.

    Parameters
    ----------
    resource : one of `ON_PATH`.
    path_ns, share : time of its tasks on the path, and that over the makespan; together the resources are all of it.
    bound_ns : no run with the same decisions is shorter than that, however fast the resource is.
    slack_ns : makespan - bound: how much the resource could shrink the run before only other things are left to wait
        for. What of `path_ns` is beyond that, others beside it take as well.
    """

    resource: str
    path_ns: int
    share: float
    bound_ns: int
    slack_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkShare:
    """The same of one kind of work: `num_tasks` tasks of it are on the path."""

    resource: str
    work: str
    path_ns: int
    share: float
    num_tasks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A part of the path on which one resource works without a break, from one task to another.

    Layers are None outside of the MoE layers.
    """

    resource: str
    path_ns: int
    num_tasks: int
    first_work: str
    first_forward: int
    first_layer: int | None
    last_work: str
    last_forward: int
    last_layer: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticalPath:
    """What a run waited for.

    Parameters
    ----------
    num_forwards, num_sequences : what was run to find the path: the first forwards of the workload.
    all_forwards : of the workload.
    num_tasks : nodes of the graph that the end of the run waited for.
    makespan_ns : of the run, and the length of the path.
    is_contended : whether others slowed what ran, so that bounds are at the speed that everybody has alone.
    resources : each of `ON_PATH`, the largest share first.
    works : each kind of work on the path, the largest share first.
    stretches : the longest ones, longest first.
    """

    num_forwards: int
    all_forwards: int
    num_sequences: int
    num_tasks: int
    makespan_ns: int
    is_contended: bool
    resources: tuple[ResourceShare, ...]
    works: tuple[WorkShare, ...]
    stretches: tuple[Stretch, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, times in seconds, ready for JSON."""
        content: dict[str, Any] = _in_seconds(asdict(self))
        for name in ("resources", "works", "stretches"):
            content[name] = [_in_seconds(row) for row in content[name]]
        return content


def critical_path(
    workload: Workload,
    model: MoEConfig,
    hardware: Hardware,
    policy: Policy,
    *,
    most_tasks: int | None = MOST_TASKS,
    **settings: Unpack[RunSettings],
) -> CriticalPath:
    """The critical path of a run; `settings` are those that `simulate` and `replay` share.

    Parameters
    ----------
    most_tasks : about so many are run, by what the first forwards have; None for the whole workload. If the first
        sequences do with less they are run whole, else there are the first forwards of the first one, at least one.

    Raise what `simulate` raises.
    """

    def run(part: Workload) -> list[Task]:
        tasks: list[Task] = []
        simulate(part, model, hardware, policy, tasks=tasks, **settings)
        return tasks

    sample = workload
    if most_tasks is not None:
        pilot = workload.first(_PILOT_FORWARDS)
        sample = _first_sequences(workload, max(1, pilot.num_forwards * most_tasks // len(run(pilot))))
    tasks = run(sample)
    graph = _graph(tasks)
    path = [tasks[number] for number in _longest(graph, _TIME) if number != _START]
    makespan_ns = tasks[-1].end_ns
    assert sum(map(_length_ns, path)) == makespan_ns
    return CriticalPath(
        num_forwards=sample.num_forwards,
        all_forwards=workload.num_forwards,
        num_sequences=sample.num_sequences,
        num_tasks=len(graph) - 1,
        makespan_ns=makespan_ns,
        is_contended=any(_length_ns(tasks[number]) != tasks[number].alone_ns for number in graph if number != _START),
        resources=_by_resource(path, graph, makespan_ns),
        works=_by_work(path, makespan_ns),
        stretches=_stretches(path),
    )


def _first_sequences(workload: Workload, most_forwards: int) -> Workload:
    """The first sequences that have at most so many forwards together, or so many forwards of the first one."""
    if workload.num_forwards <= most_forwards:
        return workload
    # Where the next sequence begins, or the next batch of them.
    starts = np.flatnonzero(np.diff(workload.sequence)) + 1
    whole = starts[starts <= most_forwards]
    return workload.first(int(whole[-1]) if whole.size else most_forwards)


# --- the graph ---


def _graph(tasks: Sequence[Task]) -> "nx.DiGraph":
    """All that the end of a run waited for, by number. An edge is as long as the task that it leads to takes."""
    import networkx as nx  # here, as it takes a while and few commands ask for it

    graph = nx.DiGraph()
    for number, task in enumerate(tasks):
        lengths = {name: 0 if name == task.resource else task.alone_ns for name in ON_PATH}
        edges = ((before, number) for before in task.after or (_START,))
        graph.add_edges_from(edges, **lengths, **{_TIME: _length_ns(task)})
    end = len(tasks) - 1
    graph.remove_nodes_from(set(graph) - nx.ancestors(graph, end) - {end})
    return graph


def _longest(graph: "nx.DiGraph", length: str) -> list[int]:
    """The longest path. Numbers ascend from what is waited for to who waits, so they are an order of the graph."""
    import networkx as nx

    path: list[int] = nx.dag_longest_path(graph, weight=length, topo_order=sorted(graph))
    return path


def _length_ns(task: Task) -> int:
    return task.end_ns - task.start_ns


# --- what the path says ---


def _by_resource(path: Sequence[Task], graph: "nx.DiGraph", makespan_ns: int) -> tuple[ResourceShare, ...]:
    shares = []
    for resource in ON_PATH:
        path_ns = sum(_length_ns(task) for task in path if task.resource == resource)
        bound_ns = sum(graph.edges[edge][resource] for edge in pairwise(_longest(graph, resource)))
        shares.append(
            ResourceShare(
                resource=resource,
                path_ns=path_ns,
                share=path_ns / makespan_ns,
                bound_ns=bound_ns,
                slack_ns=makespan_ns - bound_ns,
            )
        )
    return tuple(sorted(shares, key=lambda share: -share.path_ns))


def _by_work(path: Sequence[Task], makespan_ns: int) -> tuple[WorkShare, ...]:
    mine: dict[tuple[str, str], list[int]] = {}
    for task in path:
        if task.resource in ON_PATH:
            mine.setdefault((task.resource, _work(task)), []).append(_length_ns(task))
    shares = [
        WorkShare(
            resource=resource, work=work, path_ns=sum(times), share=sum(times) / makespan_ns, num_tasks=len(times)
        )
        for (resource, work), times in mine.items()
    ]
    return tuple(sorted(shares, key=lambda share: -share.path_ns))


def _stretches(path: Iterable[Task]) -> tuple[Stretch, ...]:
    # What takes no time is no break.
    lasting = (task for task in path if _length_ns(task))
    found = [_stretch(list(group)) for _, group in groupby(lasting, key=lambda task: task.resource)]
    return tuple(sorted(found, key=lambda stretch: -stretch.path_ns)[:_MOST_STRETCHES])


def _stretch(tasks: Sequence[Task]) -> Stretch:
    first, last = tasks[0], tasks[-1]
    return Stretch(
        resource=first.resource,
        path_ns=last.end_ns - first.start_ns,
        num_tasks=len(tasks),
        first_work=_work(first),
        first_forward=first.forward,
        first_layer=first.layer,
        last_work=_work(last),
        last_forward=last.forward,
        last_layer=last.layer,
    )


def _work(task: Task) -> str:
    return _WORKS[task.resource, task.name.split()[0]]


def _in_seconds(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name.removesuffix("_ns") + "_s" if name.endswith("_ns") else name: value / 1e9
        if name.endswith("_ns")
        else value
        for name, value in row.items()
    }
