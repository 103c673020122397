"""Kernels compiled for a Hopper GPU where there is none, as tests ask for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent


def compiled(launches: list[str], cache: Path) -> list[dict]:
    """A row for each kernel that ``launches`` of kernel_launches.py compile, into a ``cache``."""
    # the interpreter takes the compiler's place where it is on, so this is another process
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT)]),
    }
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "compile_kernels.py"), *launches],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
