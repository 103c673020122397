"""Attention traces: what a real model attended to, step by step, in one safetensors file.

No torch in here but for the dense recorder (`fmsim.trace.importers.dense`), which is imported by
itself.
"""

from fmsim.trace.check import validate
from fmsim.trace.format import (
    ENTRY_TOKENS,
    FORMAT_VERSION,
    TAU,
    CacheLayout,
    ModelInfo,
    Trace,
    TraceHeader,
)
from fmsim.trace.reader import read
from fmsim.trace.recorder import TraceRecorder
from fmsim.trace.shared import lightened
from fmsim.trace.writer import write, write_shared

__all__ = [
    "ENTRY_TOKENS",
    "FORMAT_VERSION",
    "TAU",
    "CacheLayout",
    "ModelInfo",
    "Trace",
    "TraceHeader",
    "TraceRecorder",
    "lightened",
    "read",
    "validate",
    "write",
    "write_shared",
]
