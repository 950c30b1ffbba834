"""The shape of a mixture-of-experts network: how many parameters, bytes and operations each part has."""

from tidesim.moe.config import MoEConfig
from tidesim.moe.loading import find_model, load_moe_config, read_hf_config
from tidesim.moe.parts import LatentAttention, Layout

__all__ = ["LatentAttention", "Layout", "MoEConfig", "find_model", "load_moe_config", "read_hf_config"]
