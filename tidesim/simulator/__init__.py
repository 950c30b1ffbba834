"""A run of an offloading engine as a SimPy model: the readable reference for what every setting means in time.

Four actors: the main process walks the forwards, the host worker computes missed experts, and one copy engine per
direction copies experts. Four resources: the device, the host, and the two directions of the link (h2d, d2h). The clock
counts whole nanoseconds; every duration comes from `tidesim.execution.Costs`.

Time, layer by layer
--------------------
1. The dense part runs on the device.
2. Blocking copies: the policy is asked for this layer's refresh and its moves are done at once, all evictions and then
   all promotions, while nothing else runs (`copy_wait`). Only then hits and misses are counted.
3. Resident experts run on the device. Those that were promoted in the background and are needed now are waited for,
   up to the last of them (`copy_wait`). Missed experts run on the host: after the device's part ("serial"), or
   beside it ("parallel"), starting as soon as the router is done, hence also beside that wait. What then remains of
   the host's part is `host_wait`.
4. Background copies: the policy is asked after the layer's experts are done. Its moves count from the next forward on;
   their copies queue up, first come first served, and nobody waits for them until they are needed. A copy that
   was queued is done even if its expert is evicted again before it arrives. With write-back the victim goes out
   before the promoted expert comes into its slot.

A policy that fetches misses (`miss_action` "fetch") has no host part. Background: the copies of the missed experts are
queued when the router is done, run beside the resident experts, and each fetched expert runs alone once it has
arrived (`copy_wait` until then). A copy into the slot of an expert that this forward still needs waits until that one
has run: for a resident one until all residents have. Blocking: the residents run first, then each missed expert is
copied (after its victim went out, with write-back) and run.

Rows of tokens travel within the host's part and do not queue behind weights. The run ends with its last
forward; what the copy engines still have to do then is left out of the times, not out of the moves and bytes.

Where device, host and copies share one memory (`hardware.contention`), whoever is busy slows the others. A duration
is then what something takes alone. While it runs, its speed is the product of the shares that it keeps beside whoever
else is busy, and its end is rounded up to a whole nanosecond. Launching takes none of the memory and is not slowed.

So residency, hits, misses and moves never depend on the clock, and no result depends on the order of events at the
same instant.
"""

from tidesim.simulator.run import simulate

__all__ = ["simulate"]
