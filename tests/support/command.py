"""fmsim as a user calls it: in a process of its own, or in this one."""

import contextlib
import io
import os
import re
import subprocess
import sys
from unittest import mock

from fmsim.cli import main

FIELDS = [  # of a measured row
    "policy",
    "gpu_bytes",
    "gpu_ratio",
    "entry_recall",
    "entry_recall_per_step",
    "mass_kept",
    "set_overlap",
    "decode_tokens_per_s",
    "step_s",
    "h2d_bytes",
    "h2d_bytes_per_step",
    "stall_ratio",
    "max_requests",
    "hit_rate",
    "misses",
]
# of a replayed row: the paper's accounting, intervals, and times with as many requests as fit
RUN_FIELDS = [
    *FIELDS[:3],
    *("kv_hbm_bytes", "kv_hbm_ratio"),
    *FIELDS[3:],
    *("ci95", "at_max_requests", "answers_kept"),
]


WIDTHS = (80, 100, 120)  # of terminals


def fits(text, width):
    """Whether no line is too long, and every table is whole."""
    assert max(map(len, text.splitlines())) <= width, text
    assert "…" not in text
    tables = re.findall(r"^┏.*?^└[^\n]*$", text, re.MULTILINE | re.DOTALL)
    assert tables
    for table in tables:
        assert len({len(line) for line in table.splitlines()}) == 1
        assert sum(line.startswith("│") for line in table.splitlines()) > 0


def fmsim(*arguments, folder=None):
    command = [sys.executable, "-c", "from fmsim.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def fmsim_here(*arguments, folder=None):
    """The same without a new process, which takes half a second to start: for what a mistake is
    told.
    """
    out, err = io.StringIO(), io.StringIO()
    argv = ["fmsim", *map(str, arguments)]
    code = 0
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ, {"COLUMNS": "80"}),
        contextlib.chdir(folder or "."),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())
