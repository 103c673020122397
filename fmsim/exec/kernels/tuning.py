"""Every size that a GPU decides, in one place: the best of sweeps by benchmarks/tune_kernels.py.

On an H100 (benchmarks/results/tune-kernels.json); of attention, of float8 products of more than
FEW_ROWS rows and of float8 experts of many tokens on an H200 (tune-kernels-h200.json).

What they trade: larger blocks read in longer runs and hold more registers and shared memory; more
programs fill the GPU's multiprocessors at small batches and leave more partial results to combine.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# entries that share one maximum in the pre-selection: 8,192 maxima at 262,144 entries
MAXIMA_ENTRIES = 32


class IndexScoresTuning(NamedTuple):
    # rows of one matrix product, no more than lie in a page of 32 and more; a multiple of
    # MAXIMA_ENTRIES
    block_entries: int = 128
    # over batch and splits: four on each of 132 multiprocessors, all that their registers hold at a
    # time
    programs: int = 528
    # at most, neighbours that one program takes in turn: their pages' numbers lie in one sector of
    # a line, and what is written of them in whole ones
    run_blocks: int = 8
    fewest_runs: int = 2  # of a program
    warps: int = 4
    stages: int = 3


class TopKTuning(NamedTuple):
    whole: int = 4096  # scores, at most, that one program holds, none left out beforehand
    whole_warps: int = 16
    maxima_groups: int = 128  # whose maxima one program takes, where none are given
    bound_keys: int = 4  # times k: the maxima among which the bound is sought
    bound_turns: int = 4  # times as many values as they, that a program reads at once
    # over batch and sections: two on each of 132 multiprocessors, all that the last search's
    # registers leave room for; of few rows one, whose sections then have more places
    programs: int = 264
    programs_of_few: int = 128
    few_rows: int = 24
    sections: int = 64  # of one sequence at most, a program each
    fewest_sections: int = 2  # unless rows are more than programs
    fewest_groups: int = 16  # of a section
    # times k: of so few maxima too many reach the bound. Where sections are many and have few
    # places, it is sought among scores instead
    few_groups: int = 2
    many_sections: int = 8
    few_at_once: int = 512  # of few groups, whose scores a program takes at a time
    groups_at_once: int = 64  # of more, which are listed first where a section has more
    listed_groups: int = 1024  # whose maxima it takes at a time
    warps: int = 8
    # set aside, of a sequence, that each program of the last search holds: as many of each section;
    # where one has more, some more, or many; where one has more than of those, the search is among
    # all of the groups' scores, of which a program holds a chunk
    held: int = 2048
    some_held: int = 4096
    many_held: int = 8192
    chunk: int = 4096
    last_warps: int = 4
    most_rows: int = 1024  # of a launch


class AttentionTuning(NamedTuple):
    """In place."""

    # 16 x 512 float32 of output a program; the other heads' programs find the entries in the L2
    block_heads: int = 16
    block_rows: int = 32
    programs: int = 264  # over batch, head blocks and splits
    warps: int = 4
    # one where a program has a block of rows or two: they would only pass through shared memory
    stages: int = 1


class GatheredAttentionTuning(NamedTuple):
    gather_rows: int = 16  # that one program finds and widens
    block_heads: int = 64
    block_rows: int = 64
    # of heads and of rows at most: one block of queries and two of rows fit a multiprocessor's
    # shared memory
    block_bytes: int = 65_536
    programs: int = 132  # over batch, head blocks and splits
    warps: int = 8
    stages: int = 2


class CompressTuning(NamedTuple):
    # at a time: an entry of 128 tokens takes eight turns, each as long as memory's latency
    block_tokens: int = 16
    warps: int = 4


class GatherTuning(NamedTuple):
    # of 8 bytes: a row of 584 bytes takes one segment, longer rows several
    segment_words: int = 128
    # a multiple of segment_words; one program has (stages - 1) tiles on the way
    tile_words: int = 2048
    # a layer waits for a miss; beside them a decode step's products would slow down by 15%
    programs: int = 32
    warps: int = 4
    stages: int = 4


class LateTuning(NamedTuple):
    """Of what a decision recalls late."""

    tile_words: int = 8192  # of 8 bytes, that a program has on the way
    warps: int = 8


class StagingTuning(NamedTuple):
    """Of two kernels that no sweep has."""

    # as GatherTuning's; what a program has on the way
    segment_words: int = 128
    tile_words: int = 2048
    # over batch and places of a selection, of what comes over the link, and of what stays within
    # the GPU; a program has at most so many places
    programs: int = 128
    programs_within: int = 528
    most_places: int = 512
    warps: int = 4


class HyperConnectionTuning(NamedTuple):
    # of one stream, a tile: with four streams of 4,096 channels 128 programs read the weights of
    # one token
    block_channels: int = 128
    # over tiles and runs of tokens: from nine tokens on a program takes several and reads its
    # weights once
    programs: int = 1056
    project_warps: int = 4
    enter_warps: int = 8
    # of a single token: of all streams, a tile; and of its block's input, a multiple of 128
    tile_channels: int = 32
    input_channels: int = 1024


class LinearTuning(NamedTuple):
    block_outputs: int = 64  # of one program; a divisor of 128
    block_inputs: int = 128  # a turn: a row's run of bytes; a divisor of 128, of float8 rows 128
    block_rows: int = 16  # at most
    # over blocks of outputs and of rows and splits of the inputs: four on each of 132
    # multiprocessors
    programs: int = 528
    # four with 64 outputs are a warpgroup, whose products find float8 in shared memory in pairs of
    # bytes; two take whole lines
    warps: int = 2
    stages: int = 4
    # of a program's loop: no fewer are worth a part of the columns
    fewest_turns: int = 8
    near_rows: int = 16  # blocks of rows whose programs follow one another


class DescribedLinearTuning(NamedTuple):
    """Of float8 rows and weights that come through descriptors."""

    block_rows: int = 64  # at most
    stages: int = 4
    # of a thread on average, and programs that fit a multiprocessor with them and their stages
    registers: int = 80
    resident: int = 3
    # of the inputs at most, a program each, where that many fit; a power of two
    splits: int = 4
    near_rows: int = 16  # blocks of rows whose programs follow one another


class OneRowTuning(NamedTuple):
    block_bytes: int = 32_768  # of weights that a program holds: 256 bytes a thread
    warps: int = 4
    most_inputs: int = 8192
    # of float8: its products take nearly as long as its bytes, so a program reads the next rows
    # while it multiplies these
    turn_bytes: int = 8192
    programs: int = 500  # at least, of several turns each


class FewRowsTuning(NamedTuple):
    """From no sweep."""

    most_rows: int = 2
    most_inputs: int = 8192
    block_values: int = 8192  # of weights, that a program holds
    warps: int = 4


class NormRopeTuning(NamedTuple):
    block_values: int = 1024  # of whole heads, that one program turns
    warps: int = 4


class ExpertsTuning(NamedTuple):
    gate_rows: int  # of weights, that a program multiplies, gates and what they gate together
    down_rows: int
    block_depth: int  # of a row at a time; of float8 a divisor of 128, whose products share a scale
    warps: int
    stages: int
    # tokens of one expert in a program, at most: 8, or 16 and more; 1, for a single token:
    # multiplied without matrix units
    token_tile: int = 16
    sum_columns: int = 512  # of a token, that one program adds up over its experts


HYPER_CONNECTION, NORM_ROPE = HyperConnectionTuning(), NormRopeTuning()
ONE_ROW, FEW = OneRowTuning(), FewRowsTuning()
INDEX_SCORES, MEMORY_SCORES = (
    IndexScoresTuning(),
    IndexScoresTuning(programs=396),
)  # 128 heads leave registers for three on a multiprocessor
# of float8 queries: registers for five
FLOAT8_INDEX_SCORES = IndexScoresTuning(programs=660)
# from here on twice as many programs: the second half begins where others end
SCORED_REQUESTS = 48
# of float8 queries, a few layers at once
FLOAT8_MEMORY_SCORES = IndexScoresTuning(programs=264)
TOP_K, COMPRESS, GATHER = TopKTuning(), CompressTuning(), GatherTuning()
# of a recall beside a decode: they take 10 GB/s, and a whole step slows down by 4%, on eight by 5
# to 7%
GATHER_BESIDE = GatherTuning(programs=4)
# of a copy within the GPU: nothing has to be on the way for long, and rows that pass through
# shared memory take twice the time
COPY_WITHIN = GatherTuning(tile_words=1024, programs=528, stages=1)
STAGING, LATE = StagingTuning(), LateTuning()
ATTENTION, ATTENTION_OF_SOME = (
    AttentionTuning(),
    AttentionTuning(block_heads=64, block_rows=64, programs=132, warps=8),
)
ATTENTION_OF_MANY = GatheredAttentionTuning()
SOME_REQUESTS, MANY_REQUESTS = (
    4,
    16,
)  # from here on; between them each entry is decoded once for all heads, but still in place
# from here on FlashMLA is faster (kernels-h200.md), and at fewer where so many rows in all are
# attended to (kernels-by-batch-h200.json)
FLASH_MLA_REQUESTS = 16
FEWER_REQUESTS, FEWER_ROWS = 4, 10_240
FEW_ROWS = 16  # a matrix instruction's
LINEAR = LinearTuning()
# by rows at most: of float16, and of float8
LINEAR_OF_SOME = LinearTuning(block_outputs=64, block_rows=64, programs=396, warps=4, stages=3)
LINEAR_OF_MANY = LinearTuning(block_outputs=64, block_rows=128, programs=132, warps=4, stages=3)
LINEAR_OF_PROMPTS = LinearTuning(block_outputs=128, block_rows=256, programs=132, warps=8, stages=3)
FLOAT8_LINEAR_OF_SOME = LinearTuning(
    block_outputs=64, block_rows=64, programs=396, warps=4, stages=4
)
FLOAT8_LINEAR_OF_MANY = LinearTuning(
    block_outputs=64, block_rows=128, programs=264, warps=4, stages=3
)
# by the names that float8_ways.json has
DESCRIBED_LINEAR = {
    "described, 32 rows": DescribedLinearTuning(block_rows=32, registers=64, resident=4),
    "described, 64 rows": DescribedLinearTuning(),
    "described, 64 rows, 3 stages": DescribedLinearTuning(stages=3, registers=64, resident=4),
    "described, 128 rows": DescribedLinearTuning(block_rows=128, registers=120, resident=2),
}
SOME_ROWS, MANY_ROWS = 64, 256  # at most
FLOAT8_SOME_ROWS = 192  # of float8, at most
FLOAT32_ROWS = 32  # of a block: they take twice the shared memory
LATE_LAUNCHES = 6  # of what a decision recalls late: as many times layers may go on before its end
LATE_ENTRIES = 16  # that come before their page: of a program, which most often finds none
BLOCK_TABLE_PAGES = 2048  # that a program enters, of one request in one layer
# at a time; beyond, one grouped product over all experts is a prompt's way, unless they are float8
MOST_EXPERT_TOKENS = 256
MANY_EXPERT_TOKENS = 32  # from here on many experts have more than 16 tokens
# Of the experts, for one token, for few and for many. Float32 comes from no sweep.
EXPERTS_OF_ONE = ExpertsTuning(
    gate_rows=8, down_rows=8, block_depth=1024, warps=4, stages=2, token_tile=1
)
EXPERTS_OF_FEW = ExpertsTuning(gate_rows=64, down_rows=64, block_depth=128, warps=4, stages=4)
EXPERTS_OF_MANY = ExpertsTuning(
    gate_rows=64, down_rows=64, block_depth=128, warps=4, stages=3, token_tile=32
)
FLOAT8_EXPERTS_OF_ONE = ExpertsTuning(
    gate_rows=32, down_rows=32, block_depth=128, warps=2, stages=4, token_tile=8
)
# a warpgroup would read float8 in pairs of bytes
FLOAT8_EXPERTS_OF_FEW = ExpertsTuning(
    gate_rows=64, down_rows=64, block_depth=128, warps=2, stages=6, token_tile=8
)
FLOAT8_EXPERTS_OF_MANY = ExpertsTuning(
    gate_rows=64, down_rows=64, block_depth=128, warps=4, stages=3, token_tile=32
)
FLOAT32_EXPERTS_OF_ONE = ExpertsTuning(
    gate_rows=16, down_rows=16, block_depth=128, warps=4, stages=3, token_tile=1
)
FLOAT32_EXPERTS = ExpertsTuning(gate_rows=32, down_rows=32, block_depth=32, warps=4, stages=3)


def attention(batch: int, heads: int, packed: bool) -> AttentionTuning | GatheredAttentionTuning:
    """For entries that lie ``packed`` as float8, or plain."""
    if heads < ATTENTION_OF_MANY.block_heads or batch < SOME_REQUESTS:
        return ATTENTION
    if batch >= MANY_REQUESTS:
        return ATTENTION_OF_MANY
    return ATTENTION_OF_SOME if packed else ATTENTION


def flash_mla(batch: int, count: int) -> bool:
    """Whether FlashMLA is faster for ``count`` rows of each request."""
    fewer = batch >= FEWER_REQUESTS and batch * count >= FEWER_ROWS
    return fewer or batch >= FLASH_MLA_REQUESTS


def experts(tokens: int, dtype: torch.dtype, scaled: bool) -> ExpertsTuning:
    """For ``tokens`` of ``dtype``, and weights that are float8 where ``scaled``."""
    if dtype == torch.float32:
        one, few, many = FLOAT32_EXPERTS_OF_ONE, FLOAT32_EXPERTS, FLOAT32_EXPERTS
    elif scaled:
        one, few, many = FLOAT8_EXPERTS_OF_ONE, FLOAT8_EXPERTS_OF_FEW, FLOAT8_EXPERTS_OF_MANY
    else:
        one, few, many = EXPERTS_OF_ONE, EXPERTS_OF_FEW, EXPERTS_OF_MANY
    return one if tokens == 1 else few if tokens < MANY_EXPERT_TOKENS else many


def index_scores(batch: int, dtype: torch.dtype) -> IndexScoresTuning:
    """For queries of ``dtype``."""
    tune = FLOAT8_INDEX_SCORES if dtype == torch.float8_e4m3fn else INDEX_SCORES
    return tune._replace(programs=2 * tune.programs) if batch >= SCORED_REQUESTS else tune


def linear(rows: int, dtype: torch.dtype, float8_rows: bool) -> LinearTuning:
    """For ``rows`` of ``dtype``, which are rounded where ``float8_rows``."""
    if float8_rows:
        return FLOAT8_LINEAR_OF_SOME if rows <= FLOAT8_SOME_ROWS else FLOAT8_LINEAR_OF_MANY
    if rows <= FEW_ROWS:
        return LINEAR
    some, many, prompts = LINEAR_OF_SOME, LINEAR_OF_MANY, LINEAR_OF_PROMPTS
    tune = some if rows <= SOME_ROWS else many if rows <= MANY_ROWS else prompts
    if dtype == torch.float32:
        return tune._replace(block_rows=min(tune.block_rows, FLOAT32_ROWS))
    return tune


def late_programs(row_bytes: int) -> int:
    """Of what a decision recalls late: entries come as fast by 12, and steps are less slow beside
    them; layers wait for keys (bursts-tries-h200.json).
    """
    return 12 if row_bytes >= 512 else 32
