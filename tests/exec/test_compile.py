"""Every kernel compiles for a Hopper GPU, fits its shared memory, and reaches its matrix
instructions: no GPU needed.

Those of a decode always; those of training and of reading at once take longer.
"""

import pytest

pytest.importorskip("triton", reason="Triton is not installed: it exists for Linux only")

from compiled import compiled

# One launch of each kernel, to take seconds; `python tests/support/compile_kernels.py` compiles all
# that kernel_launches.py and nano_training/launches.py list.
DECODE = [
    "index_scores",
    "index_scores, single entries",
    "index_weights",
    "memory_scores",
    "top_k, preselected",
    "sparse_attention, single entries",
    "sparse_attention, rounded",
    "sparse_attention, many",
    "append, csa",
    "hyper_connection, rounded",
    "hyper_connection, one",
    "norm_rope, rounded",
    "rms_norm, rounded",
    "route, with its product",
    "likeliest",
    "experts, some of many",
    "experts, float8, one",
    "linear, output",
    "one_row, grouped",
    "one_row, two",
    "one_row, odd",
    "linear, output, 128 rows",
    "linear, float8 rows, 128",
    "linear, described, split",
    "copy_rows, entries",
    "stage",
    "keep",
    "block_tables",
    "late_entries",
    "late_pages, entries",
    "listed",
]
DECODE_KERNELS = {
    "_index_scores",
    "_index_weights",
    "_set_aside",
    "_choose_among_few",
    "_attend_in_place",
    "_gather",
    "_attend",
    "_combine",
    "_row_masses",
    "_append",
    "_leave_and_project",
    "_enter",
    "_leave_one_and_project",
    "_enter_one",
    "_norm_rope",
    "_rms_norm",
    "_routed",
    "_best_of_block",
    "_best_of_all",
    "_schedule",
    "_gate_up",
    "_down",
    "_sum_pairs",
    "_linear",
    "_described_linear",
    "_one_row",
    "_one_row_in_turns",
    "_two_rows",
    "_round_rows",
    "_copy_rows",
    "_stage",
    "_keep",
    "_enter_slots",
    "_bring_entries",
    "_copy_late",
    "_take_back",
    "_wait_for_copy",
    "_listed",
}
TRAINING = [
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
TRAINING_KERNELS = {
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
READING = "reading, bfloat16"
READING_KERNELS = {name for name in TRAINING_KERNELS if name.endswith("_forward")}


def test_every_kernel_of_a_decode_compiles_for_sm_90(tmp_path):
    decode = compiled(DECODE, tmp_path)
    assert {row["kernel"] for row in decode} == DECODE_KERNELS
    scoring = [kind for row in decode if row["kernel"] == "_index_scores" for kind in row["ptx"]]
    assert any("wgmma" in kind and "e4m3" in kind for kind in scoring) and any(
        "wgmma" in kind and "f16" in kind for kind in scoring
    )
    # of a layer whose pool starts at an address that 16 does not divide
    alone = [row["ptx"] for row in decode if row["launch"].endswith("single entries")]
    assert len(alone) > 1
    assert all("ld.global.b8" not in kinds and kinds.get("ld.global.b16", 0) < 2 for kinds in alone)
    products = {
        kind for row in decode if row["kernel"] in ("_gate_up", "_down") for kind in row["ptx"]
    }
    assert any("wgmma" in kind and "bf16" in kind for kind in products) and any(
        "mma.sync" in kind and "f16" in kind for kind in products
    )
    assert "cp.async.cg.shared.global" in products  # 16 bytes a thread
    products = [row["ptx"] for row in decode if row["kernel"] == "_linear"]
    few, many, rounded = products
    assert any("mma.sync" in kind and "f16" in kind for kind in few)
    assert any("wgmma" in kind and "f16.f16" in kind for kind in many)
    assert any("wgmma" in kind and "e4m3.e4m3" in kind for kind in rounded)
    assert all("cp.async.cg.shared.global" in kinds for kinds in products)  # 16 bytes a thread
    [described] = [row["ptx"] for row in decode if row["kernel"] == "_described_linear"]
    assert any("wgmma" in kind and "e4m3.e4m3" in kind for kind in described)
    assert "cp.async.bulk.tensor.2d" in described
    for kernel in ("_one_row", "_stage", "_keep", "_enter_slots", "_bring_entries", "_copy_rows"):
        [row] = [row["ptx"] for row in decode if row["kernel"] == kernel]
        assert {"griddepcontrol.wait", "griddepcontrol.launch_dependents"} <= set(row)


@pytest.mark.slow
def test_every_kernel_of_training_and_reading_compiles_for_sm_90(tmp_path):
    found = compiled([*TRAINING, READING], tmp_path)
    training, reading = (
        [row for row in found if row["launch"] in launches] for launches in (TRAINING, [READING])
    )
    assert {row["kernel"] for row in training} == TRAINING_KERNELS
    products = {kind for row in training if row["kernel"] == "range_forward" for kind in row["ptx"]}
    assert any("wgmma" in kind or "mma.sync" in kind for kind in products)
    assert {row["kernel"] for row in reading} >= READING_KERNELS
