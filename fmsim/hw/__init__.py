"""The memory system: device presets, the link's and the kernels' costs, and the SimPy model of what
they share.
"""

from fmsim.hw.spec import (
    Hardware,
    figure_names,
    hardware_names,
    load_hardware,
    replace_figure,
    times_figure,
)

__all__ = [
    "Hardware",
    "figure_names",
    "hardware_names",
    "load_hardware",
    "replace_figure",
    "times_figure",
]
