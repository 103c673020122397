"""Products of float8 rows with float8 weights as in `linear`, but through tensor descriptors (TMA),
by one warp that only asks for blocks of rows and weights, while four multiply what has come. It is
written in Gluon, the language below Triton's, where a program's warps can differ.

Where blocks of outputs and rows are fewer than a GPU holds programs, several share a block's
inputs. Each leaves what it summed up for the others in memory, waits for theirs, and adds up its
part of the block's rows over all of them, in a fixed order. So many share a block at most that all
programs of a launch fit the GPU at a time: none waits for one that cannot begin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmsim.exec.kernels import arrivals, tuning
from fmsim.exec.kernels.lang import (
    TensorDescriptor,
    cdiv,
    gl,
    gluon,
    let_next_begin,
    mbarrier,
    multiprocessors,
    next_power_of_2,
    overlapped,
    tl,
    tma,
    wait_for_previous,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from fmsim.exec.kernels.norms.rounded_rows import Float8Rows
from fmsim.exec.kernels.weights import BLOCK

FEWEST_ROWS = 32  # of a block: a matrix instruction has 8 at least, and so has a quarter
OUTPUTS = 64  # of a block: what a warpgroup multiplies at a time, and within one scale's block
WARPS = 4  # that multiply
ASKING_REGISTERS = 24  # of a thread that only asks
# of shared memory: a multiprocessor's, and of each program that it holds beside blocks and scales
SHARED_BYTES, RESERVED = 228 * 1024, 1024 + 256


def described_linear(
    rows: Float8Rows,
    weight: Tensor,
    scale: Tensor,
    groups: int = 1,
    tune: tuning.DescribedLinearTuning | None = None,
) -> Tensor:
    """``rows`` [..., groups * in] times ``weight`` [out, in] with ``scale``, as `linear` -> [...,
    out] in the rows' type. ``in`` is a multiple of 128, out / groups of 64. On Hopper only.

    Weights are read beside the launch before, which must not have made them.
    """
    (outputs, inputs), count = weight.shape, rows.count
    tune = tune or tuning.DescribedLinearTuning()
    assert inputs % BLOCK == 0 and outputs // groups % OUTPUTS == 0, "blocks are whole"
    assert weight.is_contiguous() and scale.is_contiguous()
    block_rows = min(tune.block_rows, max(FEWEST_ROWS, next_power_of_2(count)))
    row_blocks = cdiv(count, block_rows)
    blocks, turns = outputs // OUTPUTS * row_blocks, inputs // BLOCK
    splits = _splits(blocks, turns, tune, multiprocessors(weight.device))
    out = torch.empty(*rows.leading, outputs, dtype=rows.dtype, device=weight.device)
    parts, arrived = out, scale
    if splits > 1:
        size = splits * blocks * OUTPUTS * block_rows
        parts = torch.empty(size, dtype=torch.float32, device=weight.device)
        arrived = arrivals.arrivals(weight.device)
    lines = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    _described_linear[(splits * blocks,)](
        TensorDescriptor.from_tensor(rows.codes, [block_rows, BLOCK], lines),
        TensorDescriptor.from_tensor(weight, [OUTPUTS, BLOCK], lines),
        rows.scales,
        scale,
        parts,
        arrived,
        out,
        rows.scales.stride(0),
        count,
        row_blocks,
        OUTPUTS=outputs,
        TURNS=turns,
        GROUPS=groups,
        BLOCK=BLOCK,
        NEAR_ROWS=tune.near_rows,
        STAGES=tune.stages,
        SPLITS=splits,
        REGISTERS=ASKING_REGISTERS,
        num_warps=WARPS,
        maxnreg=tune.registers,
        **overlapped(weight),
    )
    return out


def _splits(
    blocks: int, turns: int, tune: tuning.DescribedLinearTuning, multiprocessors: int
) -> int:
    """In how many parts to cut the ``turns`` of each of the ``blocks``: equal ones, and no more
    than fit the GPU at a time.
    """

    def fits(splits: int) -> bool:
        shared = tune.stages * (OUTPUTS + tune.block_rows) * BLOCK
        shared += turns // splits * tune.block_rows * 4 + RESERVED
        resident = min(tune.resident, SHARED_BYTES // shared)
        return turns % splits == 0 and blocks * splits <= resident * multiprocessors

    splits = tune.splits
    while splits > 1 and not fits(splits):
        splits //= 2
    return splits


# compiled once for a kind of rows, however many there are
@gluon.jit(do_not_specialize=["scale_stride", "rows", "row_blocks"])
def _described_linear(
    x,
    weight,
    x_scale,
    scale,
    parts,
    arrived,
    out,
    scale_stride,
    rows,
    row_blocks,
    OUTPUTS: gl.constexpr,
    TURNS: gl.constexpr,
    GROUPS: gl.constexpr,
    BLOCK: gl.constexpr,
    NEAR_ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    SPLITS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """One program: a block of outputs of a block of rows, over one of SPLITS parts of the inputs.

    Blocks of the same outputs and NEAR_ROWS blocks of rows follow one another, so that they find
    the weights in the L2.
    """
    ROWS: gl.constexpr = x.block_shape[0]
    BLOCK_OUTPUTS: gl.constexpr = weight.block_shape[0]
    OUTPUT_BLOCKS: gl.constexpr = OUTPUTS // BLOCK_OUTPUTS
    SHARE: gl.constexpr = TURNS // SPLITS
    split, block = gl.program_id(0) % SPLITS, gl.program_id(0) // SPLITS
    near = block // (NEAR_ROWS * OUTPUT_BLOCKS) * NEAR_ROWS
    of_near = gl.minimum(row_blocks - near, NEAR_ROWS)
    number = block % (NEAR_ROWS * OUTPUT_BLOCKS)
    first_row = (near + number % of_near) * ROWS
    start = number // of_near * BLOCK_OUTPUTS
    first = split * SHARE
    of_group = start // (OUTPUTS // GROUPS) * TURNS + first  # of the rows' blocks of inputs
    weights = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_OUTPUTS, BLOCK], weight.layout)
    values = gl.allocate_shared_memory(x.dtype, [STAGES, ROWS, BLOCK], x.layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    factors = gl.allocate_shared_memory(gl.float32, [SHARE, 1, ROWS], plain)
    # of a stage: whether its blocks have come, and whether they have been multiplied
    come = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(come.index(stage), count=1)
        mbarrier.init(done.index(stage), count=1)
    x_scale += of_group * scale_stride + first_row
    scale += start // BLOCK * TURNS + first
    stages = weights, values, come, done
    column, of_rows = first * BLOCK, of_group * BLOCK
    sums = gl.warp_specialize(
        [
            (_multiply, (stages, factors, x_scale, scale, scale_stride, SHARE)),
            (_ask, (stages, weight, x, start, column, first_row, of_rows, SHARE)),
        ],
        [1],
        [REGISTERS],
    )[0]
    if SPLITS == 1:
        _store(sums, out, first_row, start, rows, OUTPUTS)
    else:
        parts += block.to(gl.int64) * (SPLITS * BLOCK_OUTPUTS * ROWS)
        _add_up(sums, parts, arrived + block, out, first_row, start, split, rows, OUTPUTS, SPLITS)


@gluon.jit
def _ask(stages, weight, x, start, column, first_row, of_rows, TURNS: gl.constexpr):
    """One warp asks for the blocks of all turns; for weights before the rows are there."""
    weights, values, come, done = stages
    STAGES: gl.constexpr = weights.shape[0]
    BLOCK: gl.constexpr = weights.shape[2]
    BYTES: gl.constexpr = (weights.shape[1] + values.shape[1]) * BLOCK
    AHEAD: gl.constexpr = min(STAGES, TURNS)
    for turn in gl.static_range(AHEAD):
        mbarrier.expect(come.index(turn), BYTES)
        tma.async_copy_global_to_shared(
            weight, [start, column + turn * BLOCK], come.index(turn), weights.index(turn)
        )
    wait_for_previous()
    for turn in gl.static_range(AHEAD):
        tma.async_copy_global_to_shared(
            x, [first_row, of_rows + turn * BLOCK], come.index(turn), values.index(turn)
        )
    for turn in range(AHEAD, TURNS):
        stage = turn % STAGES
        mbarrier.wait(done.index(stage), turn // STAGES - 1 & 1)
        mbarrier.expect(come.index(stage), BYTES)
        tma.async_copy_global_to_shared(
            weight, [start, column + turn * BLOCK], come.index(stage), weights.index(stage)
        )
        tma.async_copy_global_to_shared(
            x, [first_row, of_rows + turn * BLOCK], come.index(stage), values.index(stage)
        )


@gluon.jit
def _multiply(stages, factors, x_scale, scale, scale_stride, TURNS: gl.constexpr):
    """The others multiply what has come: a turn's product gets its scales in float32, for the
    matrix units add float8's products up in fewer bits. -> ([outputs, rows],)
    """
    weights, values, come, done = stages
    STAGES: gl.constexpr = weights.shape[0]
    OUTPUTS: gl.constexpr = weights.shape[1]
    ROWS: gl.constexpr = values.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    # the weights are the left operand: many, they fill the matrix units
    units: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, ROWS, 32])
    line: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, WARPS], [1, 0])
    wait_for_previous()
    let_next_begin()
    x_scale += gl.arange(0, ROWS, gl.SliceLayout(0, line))[None, :]
    scales = ()
    for turn in gl.static_range(TURNS):
        scales += (gl.load(x_scale + turn * scale_stride) * gl.load(scale + turn),)
    for turn in gl.static_range(TURNS):
        factors.index(turn).store(scales[turn])
    tl.debug_barrier()
    sums = gl.zeros([OUTPUTS, ROWS], gl.float32, units)
    for turn in range(TURNS):
        stage = turn % STAGES
        mbarrier.wait(come.index(stage), turn // STAGES & 1)
        product = warpgroup_mma(
            weights.index(stage),
            values.index(stage).permute((1, 0)),
            gl.zeros([OUTPUTS, ROWS], gl.float32, units),
            use_acc=False,
            is_async=True,
        )
        product = warpgroup_mma_wait(0, deps=[product])
        mbarrier.arrive(done.index(stage), count=1)
        sums += product * factors.index(turn).load(units)
    return (sums,)


@gluon.jit
def _add_up(
    sums,
    parts,
    arrived,
    out,
    first_row,
    start,
    split,
    rows,
    OUTPUTS: gl.constexpr,
    SPLITS: gl.constexpr,
):
    """Leave ``sums`` of others' shares of the rows in ``parts``, and add up the ``split``-th.

    A share lies there as the matrix units have it: a thread's pairs beside its neighbours'.
    """
    BLOCK_OUTPUTS: gl.constexpr = sums.shape[0]
    SHARE: gl.constexpr = sums.shape[1] // SPLITS
    SIZE: gl.constexpr = BLOCK_OUTPUTS * SHARE
    units: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, SHARE, 32])
    output = gl.arange(0, BLOCK_OUTPUTS, gl.SliceLayout(1, units))[:, None]
    row = gl.arange(0, SHARE, gl.SliceLayout(0, units))[None, :]
    place = output % 8 * 8 + output // 16 * 64 + output // 8 % 2 * (BLOCK_OUTPUTS * 4)
    place = place + row % 8 + row // 8 * (BLOCK_OUTPUTS * 8)
    shares = gl.minimum((rows - first_row + SHARE - 1) // SHARE, SPLITS)
    all_shares = _shares(sums, SPLITS)
    own = gl.convert_layout(all_shares[0], units, assert_trivial=True)
    for to in gl.static_range(SPLITS):
        share = gl.convert_layout(all_shares[to], units, assert_trivial=True)
        own = gl.where(split == to, share, own)
        if (to != split) & (to < shares):
            gl.store(parts + (to * SPLITS + split) * SIZE + place, share)
    tl.debug_barrier()  # all threads' sums are there before one of them says so
    before = gl.atomic_add(arrived, 1, sem="acq_rel")
    if split < shares:
        while before < SPLITS - 1:
            before = gl.atomic_add(arrived, 0, sem="acquire") - 1
        parts += split * (SPLITS * SIZE)
        total = gl.zeros([BLOCK_OUTPUTS, SHARE], gl.float32, units)
        for part in gl.static_range(SPLITS):
            others = split != part + place * 0
            more = gl.load(parts + part * SIZE + place, others, 0.0, cache_modifier=".cg")
            total += gl.where(split == part, own, more)
        _store(total, out, first_row + split * SHARE, start, rows, OUTPUTS)
        if gl.atomic_add(arrived, 1, sem="relaxed") == SPLITS + shares - 1:
            gl.store(arrived, 0)  # as it was


@gluon.jit
def _shares(sums, COUNT: gl.constexpr):
    """[outputs, rows] -> COUNT runs of rows, [outputs, rows / COUNT] each."""
    if COUNT == 1:
        return (sums,)
    else:
        halves = gl.permute(gl.reshape(sums, [sums.shape[0], 2, sums.shape[1] // 2]), (0, 2, 1))
        low, high = gl.split(halves)
        return _shares(low, COUNT // 2) + _shares(high, COUNT // 2)


@gluon.jit
def _store(sums, out, first_row, start, rows, OUTPUTS: gl.constexpr):
    BLOCK_OUTPUTS: gl.constexpr = sums.shape[0]
    LANES: gl.constexpr = BLOCK_OUTPUTS // 4
    lines: gl.constexpr = gl.BlockedLayout(
        [4, 1], [LANES, 32 // LANES], [1, gl.num_warps()], [0, 1]
    )
    output = start + gl.arange(0, BLOCK_OUTPUTS, gl.SliceLayout(1, lines))[:, None]
    row = first_row + gl.arange(0, sums.shape[1], gl.SliceLayout(0, lines))[None, :]
    values = gl.convert_layout(sums.to(out.dtype.element_ty), lines)
    gl.store(out + row.to(gl.int64) * OUTPUTS + output, values, mask=row < rows)
