"""What a model keeps for a context, in bytes, and what it computes, in operations."""

from fmsim.geometry.base import Geometry
from fmsim.geometry.deepseek_v4 import CSA, HCA, SLIDING, DeepseekV4Geometry
from fmsim.geometry.described import Described
from fmsim.geometry.layers import LayerSpec
from fmsim.geometry.named import PRESETS, deepseek_v4_named, from_config, geometry_named

__all__ = [
    "CSA",
    "HCA",
    "PRESETS",
    "SLIDING",
    "DeepseekV4Geometry",
    "Described",
    "Geometry",
    "LayerSpec",
    "deepseek_v4_named",
    "from_config",
    "geometry_named",
]
