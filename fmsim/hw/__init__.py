"""The memory system: device presets, the link's and the kernels' costs, and the SimPy model of what they share."""

from fmsim.hw.spec import Hardware, hardware_names, load_hardware

__all__ = ["Hardware", "hardware_names", "load_hardware"]
