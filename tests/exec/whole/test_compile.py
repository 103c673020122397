"""Every kernel of training compiles for a Hopper GPU and fits its shared memory: no GPU needed."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed: it exists for Linux only")

from compiled import compiled

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


def test_a_prompt_is_read_by_kernels_that_compile_for_sm_90(tmp_path):
    assert {row["kernel"] for row in compiled(["reading, bfloat16"], tmp_path)} >= READING


def test_every_kernel_of_training_compiles_for_sm_90(tmp_path):
    found = compiled(LAUNCHES, tmp_path)
    assert {row["kernel"] for row in found} == KERNELS
    products = {kind for row in found if row["kernel"] == "range_forward" for kind in row["ptx"]}
    assert any("wgmma" in kind or "mma.sync" in kind for kind in products)
