"""fmsim as a user calls it, in a process of its own."""

import os
import subprocess
import sys

FIELDS = [
    "policy",
    "kv_hbm_bytes",
    "kv_hbm_ratio",
    "entry_recall",
    "mass_kept",
    "set_overlap",
    "decode_tokens_per_s",
    "step_s",
    "h2d_bytes",
    "stall_ratio",
    "max_requests",
]


def fmsim(*arguments, folder=None):
    command = [sys.executable, "-c", "from fmsim.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
