"""Find networks by path or by name, and read what their config.json says."""

import json
from pathlib import Path
from typing import Any

from tidesim.errors import ModelError
from tidesim.moe.config import MoEConfig
from tidesim.shipped import find_shipped

_SHORT_NAMES = {"mini": "llada2.0-mini", "flash": "llada2.0-flash"}


def find_model(name: str) -> Path:
    """The path `name`, or the folder of the shipped model of that name; "mini" and "flash" are those of LLaDA2.0.

    Raise ModelError if there is neither, naming the nearest shipped models.
    """
    is_path = Path(name).expanduser().exists()
    return find_shipped("models", name if is_path else _SHORT_NAMES.get(name, name), error=ModelError)


def load_moe_config(name: str) -> MoEConfig:
    """The `MoEConfig` of a model folder, a `config.json`, or a shipped model's name ("llada2.0-mini").

    Raise ModelError if there is no such model or its config.json cannot be read.
    """
    path = find_model(name)
    return MoEConfig.from_hf(read_hf_config(path), (path if path.is_dir() else path.parent).resolve().name)


def read_hf_config(path: Path) -> dict[str, Any]:
    """The config.json at `path`, or inside the folder `path`. Raise ModelError if it is missing or not JSON."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no config.json; a Hugging Face model folder is expected.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read as JSON ({error}).") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file}: a JSON object is expected, not {type(config).__name__}.")
    return config
