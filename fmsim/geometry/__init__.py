"""What a model keeps for a context, in bytes, and what it computes, in operations."""

from fmsim.geometry.deepseek_v4 import CSA, HCA, PRESETS, SLIDING, Geometry, from_config

__all__ = ["CSA", "HCA", "PRESETS", "SLIDING", "Geometry", "from_config"]
