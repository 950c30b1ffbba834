"""Counts of how often experts were routed to, in the file that KTransformers reads."""

from collections.abc import Sequence
from pathlib import Path

import torch

from tidesim.errors import InputError


def save_counts(logical_count: Sequence[Sequence[Sequence[int]]], path: Path) -> None:
    """Write counts [1, layers, E] as SGLang's recorder does. Raise InputError if the file cannot be written."""
    try:
        with path.open("wb") as file:
            torch.save({"logical_count": torch.tensor(logical_count)}, file)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}).") from None
