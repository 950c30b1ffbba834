"""A run that writes down what each of its tasks waited for, for those who ask why it takes as long as it does."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import simpy

from tidesim.execution import Costs
from tidesim.policies import ForwardInfo, Policy, Shape
from tidesim.result import Decision, Interval
from tidesim.simulator.actors import Ints, Run, Story
from tidesim.simulator.work import Job, Routed, Work
from tidesim.workload import Workload

# Resources of tasks besides those that are busy or idle: the main process that launches, and the end of the run.
LAUNCH, END = "launch", "end"


class Task(NamedTuple):
    """Something that took time: `resource`, one of `RESOURCES`, LAUNCH or END, did `name`. `layer` as in `Interval`.

    A task starts in the nanosecond in which the last of those that it waited for has ended, or at 0. It waits for the
    task before it in the program order of the main process, or on its worker; a copy or the host's part for the main
    process to ask for it; kernels for the copies of their experts; a layer for its host's part; a copy for the last use
    of the slot that it fills, and with write-back for its victim's copy. Waits that cost nothing, as what they were for
    had ended before, are there as well.

    The last task of a run is its END and takes no time. What nobody waited for is no part of it, finished or not.

    Parameters
    ----------
    alone_ns : what it takes with nobody beside it; less than from start to end where others slow it.
    after : numbers of the tasks that it waited for, all smaller than its own. Of several on one resource there is the
        last, as that waited for the others.
    """

    resource: str
    name: str
    start_ns: int
    end_ns: int
    alone_ns: int
    forward: int
    layer: int | None
    after: tuple[int, ...]


# The number of the last task of each resource that somebody waited for.
Front = Mapping[str, int]


class RecordedRun(Run):
    """The same run, whose tasks are written down in `tasks`."""

    def __init__(
        self,
        workload: Workload,
        costs: Costs,
        policy: Policy,
        shape: Shape,
        decisions: Callable[[Decision], None] | None,
        timeline: list[Interval] | None,
        spent: Ints | None,
        tasks: list[Task],
    ) -> None:
        super().__init__(workload, costs, policy, shape, decisions, timeline, spent)
        self._tasks = tasks
        # What the main process has waited for since its last task, and that task.
        self._front: Front = {}
        # By event: what the main process had waited for when it asked for it, and what made it happen.
        self._asked: dict[simpy.Event, Front] = {}
        self._causes: dict[simpy.Event, Front] = {}
        # The job of each worker, and the number of its last task.
        self._jobs: dict[str, Job] = {}
        self._last: dict[str, int] = {}

    def play(self) -> None:
        """Run, and write down the end."""
        super().play()
        self._begin(END, END, 0, self.workload.num_forwards - 1, None, self._front)

    # --- what runs ---

    def busy(self, resource: str, name: str, duration_ns: int, forward: int, layer: int | None) -> Story:
        """A task of a worker that has a job, or else of the main process."""
        job = self._jobs.get(resource)
        front = self._front if job is None else self._front_of(resource, job)
        number = self._begin(resource, name, duration_ns, forward, layer, front)
        yield from super().busy(resource, name, duration_ns, forward, layer)
        self._tasks[number] = self._tasks[number]._replace(end_ns=self.books.now_ns)
        if job is None:
            self._front = {resource: number}
        else:
            self._causes[job.done] = {resource: number}

    def work_off(self, name: str, job: Job, resource: simpy.Resource) -> Story:
        """What `name` begins next is this job."""
        self._jobs[name] = job
        yield from super().work_off(name, job, resource)

    def launch(self, launch_ns: int, forward: int, layer: int | None) -> simpy.Event:
        """A task of the main process."""
        self._front = {LAUNCH: self._begin(LAUNCH, LAUNCH, launch_ns, forward, layer, self._front)}
        return super().launch(launch_ns, forward, layer)

    def _front_of(self, resource: str, job: Job) -> Front:
        """What a job waited for: the one before it, the main process, and all that it needs."""
        before = {resource: self._last[resource]} if resource in self._last else {}
        return _latest([before, self._asked.pop(job.done), *(self._causes[need] for need in job.needs)])

    def _begin(self, resource: str, name: str, alone_ns: int, forward: int, layer: int | None, front: Front) -> int:
        """Write down what begins now; its number."""
        number, now_ns = len(self._tasks), self.books.now_ns
        after = tuple(front.values())
        self._tasks.append(Task(resource, name, now_ns, now_ns + alone_ns, alone_ns, forward, layer, after))
        self._last[resource] = number
        return number

    # --- who waits for whom ---

    def wait_for(self, event: simpy.Event, part: str, layer: int) -> Story:
        """The main process goes on after whatever made `event` happen."""
        yield from super().wait_for(event, part, layer)
        self._front = _latest([self._front, self._causes[event]])

    def tell(self, event: simpy.Event) -> None:
        """What the main process says is caused by all that it waited for."""
        self._causes[event] = self._front
        super().tell(event)

    def call_host(self, forward: ForwardInfo, layer: int, work: Work) -> simpy.Event | None:
        """The host begins after what the main process has waited for."""
        result = super().call_host(forward, layer, work)
        if result is not None:
            self._asked[result] = self._front
        return result

    def order(
        self, direction: str, expert: int, needs: list[simpy.Event], forward: ForwardInfo, layer: int
    ) -> simpy.Event:
        """So does a copy."""
        done = super().order(direction, expert, needs, forward, layer)
        self._asked[done] = self._front
        return done

    def needed_arrivals(self, layer: int, routed: Routed) -> list[simpy.Event]:
        """Of those that have arrived, too: with a slower link, or a faster device, they might not have."""
        return [arrival for expert, arrival in self.in_flight[layer].items() if routed.counts[layer, expert]]


def _latest(fronts: Sequence[Front]) -> Front:
    """What waits for all of `fronts` at once."""
    latest: dict[str, int] = {}
    for front in fronts:
        for resource, number in front.items():
            latest[resource] = max(number, latest.get(resource, number))
    return latest
