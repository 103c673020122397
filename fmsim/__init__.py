"""fmsim: which KV pages should stay in GPU memory, and what that choice costs and saves."""

__version__ = "0.1.0"
