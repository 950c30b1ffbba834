"""A run of an offloading engine as a SimPy model: the readable reference for what every setting means in time.

Four actors: the main process walks the forwards, the host worker computes missed experts, and one copy engine per
direction copies experts. Four resources: the device, the host, and the two directions of the link (h2d, d2h). The clock
counts whole nanoseconds; every duration comes from `tidesim.execution.Costs`.

Time, layer by layer
--------------------
1. The dense part runs on the device.
2. Blocking copies: the policy is asked for this layer's refresh and its moves are done at once, all evictions and then
   all promotions, while nothing else runs (`copy_wait`). Only then hits and misses are counted.
3. The policy says what becomes of the missed experts (`Serving`): some are fetched, the host computes the others. The
   host's part runs after the device's ("serial"), or beside it ("parallel"), starting as soon as the router is done.
   What remains of it after the device's part is `host_wait`.
4. Resident experts run on the device, all together. Those that were promoted in the background and are needed now are
   waited for before, up to the last of them (`copy_wait`).
5. Fetched experts run after them, one by one, in the order of their copies. Blocking: each is copied (after its victim
   went out, with write-back) and runs. Background: their copies are queued when the router is done, run beside the
   resident experts, and each expert runs alone once it has arrived (`copy_wait` until then). A copy into the slot of an
   expert that this forward still needs waits until that one has run: for a resident one until all residents have.
   Experts that are dropped after use come into scratch memory: a place there is free again once its expert has run.
   Who was fetched without having rows is not waited for. Engines that run together what is copied together
   (`Execution.fetched`) differ in that an expert's launches hide behind its copy.
6. Moves in other layers (`Policy.ahead`). Background: their copies queue up behind those of the fetched experts, when
   the router is done. Blocking: they are done after the layer's experts, while nothing else runs.
7. Background copies: the policy is asked for the refresh after the layer's experts are done. Its moves count from the
   next forward on.

Copies in the background are done first come first served, and nobody waits for them until they are needed. A copy that
was queued is done even if its expert is evicted again before it arrives. With write-back the victim goes out before the
promoted expert comes into its slot.

Rows of tokens travel within the host's part and do not queue behind weights. The run ends with its last
forward; what the copy engines still have to do then is left out of the times, not out of the moves and bytes.

Where device, host and copies share one memory (`hardware.contention`), whoever is busy slows the others. A duration
is then what something takes alone. While it runs, its speed is the product of the shares that it keeps beside whoever
else is busy, and its end is rounded up to a whole nanosecond. Launching takes none of the memory and is not slowed.

So residency, hits, misses and moves never depend on the clock, and no result depends on the order of events at the
same instant.
"""

from tidesim.simulator.recording import END, LAUNCH, Task
from tidesim.simulator.run import simulate

__all__ = ["END", "LAUNCH", "Task", "simulate"]
