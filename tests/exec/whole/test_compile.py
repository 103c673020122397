"""Every kernel of training compiles for a Hopper GPU and fits its shared memory: no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: it exists for Linux only")
SUPPORT = Path(__file__).parents[2] / "support"
LAUNCHES = [
    "training, window and range",
    "training, chosen",
    "training, shares",
    "training, index scores",
    "training, sinkhorn",
    "training, read",
    "training, leave",
    "training, norm",
    "training, gated",
]
KERNELS = {
    "range_forward",
    "range_backward",
    "chosen_forward",
    "chosen_backward",
    "mean_weights",
    "scores_forward",
    "scores_backward",
    "sinkhorn_forward",
    "sinkhorn_backward",
    "read_forward",
    "read_backward",
    "leave_forward",
    "leave_backward",
    "norm_rotate_forward",
    "norm_rotate_backward",
    "swiglu_forward",
    "swiglu_backward",
}


READING = {
    "range_forward",
    "chosen_forward",
    "scores_forward",
    "sinkhorn_forward",
    "read_forward",
    "leave_forward",
    "norm_rotate_forward",
    "swiglu_forward",
}


def compiled(launches: list[str], tmp_path: Path) -> list[dict]:
    """A row for each kernel that ``launches`` compile."""
    # the interpreter takes the compiler's place where it is on, so this is another process
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_prompt_is_read_by_kernels_that_compile_for_sm_90(tmp_path, dtype):
    assert {row["kernel"] for row in compiled([f"reading, {dtype}"], tmp_path)} >= READING


def test_every_kernel_of_training_compiles_for_sm_90(tmp_path):
    found = compiled(LAUNCHES, tmp_path)
    assert {row["kernel"] for row in found} == KERNELS
    products = {kind for row in found if row["kernel"] == "range_forward" for kind in row["ptx"]}
    assert any("wgmma" in kind or "mma.sync" in kind for kind in products)
