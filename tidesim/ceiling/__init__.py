"""What no policy can beat: bounds that know all of the routing in advance.

`hit_ceiling` is about hits, `time_ceiling` about the time of a run. Both say for whom they hold.
"""

from tidesim.ceiling.hits import hit_ceiling
from tidesim.ceiling.time import Ceiling, time_ceiling

__all__ = ["Ceiling", "hit_ceiling", "time_ceiling"]
