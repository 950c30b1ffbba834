"""The command line: each command parses, loads, calls one public function and prints.

Results go to stdout, everything else to stderr. Exit codes: 0, 2 for what the user can mend, 1 for our own faults.
"""

from tidesim.cli import exporting, live, paper, sweep
from tidesim.cli.app import app, main

__all__ = ["app", "exporting", "live", "main", "paper", "sweep"]
