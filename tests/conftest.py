"""Settings for the whole test run."""

import os

# Tests of small tensors gain nothing from a thread pool, and lose much where another process keeps a core busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
