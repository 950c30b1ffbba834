"""A small study on a real trace, and the fields of one in a file."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hand_made import decode, writer

from tidesim.study import Study

LINK = "links.h2d_pinned.bandwidth_gb_s"


def small_trace(path: Path, num_sequences: int = 4) -> Path:
    """A recording of some short sequences, each different."""
    rng = np.random.default_rng(3)
    with writer(path) as out:
        for _ in range(num_sequences):
            out.append(decode(rng, prompt_tokens=9, steps=[3, 4, 2])[0])
    return path


def content(trace: Path, **changes: Any) -> dict[str, Any]:
    """A study of twelve cases, four of which do not fit: the network has 16 experts."""
    plain = {
        "traces": [str(trace)],
        "machines": ["rtx4090"],
        "policies": ["static", "tide"],
        "budgets": [2, "largest", 17],
        "intervals": [1, 2, 3],
    }
    return {name: value for name, value in (plain | changes).items() if value is not None}


def study(trace: Path, **changes: Any) -> Study:
    return Study.from_content(content(trace, **changes))


def save(path: Path, **fields: Any) -> Path:
    path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    return path
