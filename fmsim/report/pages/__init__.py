"""Pages of `fmsim report`, one module a kind of result."""
