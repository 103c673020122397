"""One launch of every kernel at DeepSeek-V4-Flash's shapes and at nano's, on tensors whose content
does not matter.
"""

import torch
from transformers import DeepseekV4Config

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.attention.flash_mla import listed_triton
from fmsim.exec.kernels.attention.rows import Rows
from fmsim.exec.kernels.attention.sparse_attention import sparse_attention_triton
from fmsim.exec.kernels.experts.mixture import mixture_of_experts_triton
from fmsim.exec.kernels.experts.router import route_triton, routed_triton
from fmsim.exec.kernels.experts.tiles import OwnPairs
from fmsim.exec.kernels.layout import KEY, LATENT, plain
from fmsim.exec.kernels.norms.norm_rope import norm_rope_triton
from fmsim.exec.kernels.norms.rms_norm import rms_norm_triton
from fmsim.exec.kernels.norms.rounded_rows import round_rows_triton
from fmsim.exec.kernels.pages.block_tables import enter_slots_triton
from fmsim.exec.kernels.pages.compress import Append, Pooling, append_triton
from fmsim.exec.kernels.pages.gather import copy_rows_triton
from fmsim.exec.kernels.pages.late_entries import bring_entries_triton
from fmsim.exec.kernels.pages.late_pages import (
    copy_late_triton,
    take_back_triton,
    wait_for_copy_triton,
)
from fmsim.exec.kernels.pages.staging import keep_triton, stage_triton
from fmsim.exec.kernels.products.described_linear import described_linear
from fmsim.exec.kernels.products.few_rows import few_rows_triton
from fmsim.exec.kernels.products.hyper_connection import Pending, enter_triton, read_out_triton
from fmsim.exec.kernels.products.in_turns import HeadTurn
from fmsim.exec.kernels.products.linear import linear_triton
from fmsim.exec.kernels.products.one_row import one_row_triton, two_rows_triton
from fmsim.exec.kernels.selection.greedy import likeliest_triton
from fmsim.exec.kernels.selection.index_score import index_scores_triton, index_weights_triton
from fmsim.exec.kernels.selection.memory_score import memory_scores_triton
from fmsim.exec.kernels.selection.top_k import top_k_triton
from fmsim.exec.kernels.weights import scale_shape
from fmsim.exec.model.experts import Experts, Router, SwiGLU
from fmsim.exec.model.hyper_connection import HyperConnection, HyperHead
from fmsim.exec.model.norm_rope import RMSNorm

BATCH, PAGES = 2, 32
NANO = plain(torch.bfloat16, 64)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def whole(*shape: int) -> torch.Tensor:
    return zeros(*shape, dtype=torch.int32)


def pool_of(layout, per_page):
    """Of PAGES, but behind another page, as a later layer's is."""
    return layout.new_pool(1 + PAGES, per_page)[1:]


def scores(layout, heads, dtype, per_page=64):
    def launch():
        pool = pool_of(layout, per_page)
        index_scores_triton(
            zeros(BATCH, heads, layout.width, dtype=dtype),
            zeros(BATCH, heads),
            pool,
            layout,
            whole(BATCH, PAGES),
            whole(BATCH),
        )

    return launch


def memory_scores(layers=3, heads=128):
    def launch():
        memory_scores_triton(
            zeros(layers, BATCH, heads, KEY.width).to(torch.float8_e4m3fn),
            zeros(layers, BATCH, heads),
            [KEY.new_pool(PAGES, 64) for _ in range(layers)],
            KEY,
            [whole(BATCH, PAGES) for _ in range(layers)],
            whole(BATCH),
        )

    return launch


def selection(preselect, entries=262_144):
    return lambda: top_k_triton(
        zeros(BATCH, entries), whole(BATCH), 512, zeros(BATCH, entries // 32) if preselect else None
    )


def attention(layout, heads, dtype, per_page=64, tune=None, rounded=False, known=False):
    def launch():
        rows = Rows(
            layout,
            layout.new_pool(BATCH, 128),
            whole(BATCH),
            pool_of(layout, per_page),
            whole(BATCH, PAGES),
            whole(BATCH, 512),
        )
        sparse_attention_triton(
            zeros(BATCH, heads, layout.width, dtype=dtype),
            rows,
            zeros(heads),
            1.0,
            want_masses=True,
            rounded=rounded,
            known=known,
            tune=tune,
        )

    return launch


def appends(*which):
    """Each of a layout, a rate and a number of series."""

    def launch():
        made, one = [], torch.bfloat16
        for layout, rate, series in which:
            width = series * layout.width
            pooling = Pooling(rate, series, zeros(rate, width), zeros(layout.width), 1e-6)
            new, turn = zeros(BATCH, 1, width, dtype=one), zeros(BATCH, 1, 8)
            pool, table = layout.new_pool(PAGES, 64), whole(BATCH, PAGES)
            ring = pooling.new_ring(BATCH, one)
            made.append(Append(new, new, pooling, ring, (turn, turn), pool, layout, table))
        append_triton(made, whole(BATCH), alongside=True)

    return launch


def rows(row_bytes):
    def launch():
        source, target = (
            zeros(21, 64, row_bytes, dtype=torch.uint8),
            zeros(21, 32, row_bytes, dtype=torch.uint8),
        )
        copy_rows_triton(source, target, whole(21, 8), whole(21, 8), whole(21))

    return launch


def connection(width, first=False, iterations=2, rounded=False, tokens=BATCH):
    """Sinkhorn's iterations are unrolled: two of them, not V4's 20, take a tenth of the time."""

    def launch():
        config = DeepseekV4Config(hidden_size=width, hc_sinkhorn_iters=iterations)
        module, streams = HyperConnection(config), zeros(tokens, 1, 4, width, dtype=torch.bfloat16)
        pending = Pending(module, streams[:, :, 0], zeros(tokens, 1, 4), zeros(tokens, 1, 4, 4))
        enter_triton(streams, None if first else pending, module, RMSNorm(width, 1e-6), rounded)

    return launch


def stream_head(width):
    def launch():
        config = DeepseekV4Config(hidden_size=width)
        module, streams = HyperConnection(config), zeros(BATCH, 1, 4, width, dtype=torch.bfloat16)
        pending = Pending(module, streams[:, :, 0], zeros(BATCH, 1, 4), zeros(BATCH, 1, 4, 4))
        read_out_triton(streams, pending, HyperHead(config), RMSNorm(width, 1e-6))

    return launch


def turned(heads, width, pairs, **how):
    turn = zeros(BATCH, pairs), zeros(BATCH, pairs)
    return lambda: norm_rope_triton(zeros(BATCH, heads, width, dtype=torch.bfloat16), turn, **how)


def normed(width, rounded=False):
    return lambda: rms_norm_triton(
        zeros(BATCH, 1, width, dtype=torch.bfloat16), RMSNorm(width, 1e-6), rounded
    )


def experts(tokens, dtype=torch.bfloat16, count=24, hidden=4096, width=2048, top_k=6, part=None):
    def launch():
        config = DeepseekV4Config(
            n_routed_experts=count, hidden_size=hidden, moe_intermediate_size=width
        )
        with torch.device("meta"):
            routed, shared = Experts(config).to(dtype), SwiGLU(config).to(dtype)
            if dtype == torch.float8_e4m3fn:
                routed.gate_up_scale, routed.down_scale = zeros(1), zeros(1)
                for linear in shared.children():
                    linear.scale = zeros(1)
            x = zeros(
                tokens, hidden, dtype=torch.float32 if dtype == torch.float32 else torch.bfloat16
            )
            chosen, weights = zeros(tokens, top_k, dtype=torch.int64), zeros(tokens, top_k)
            mixture_of_experts_triton(x, chosen, weights, routed, shared, part=part)

    return launch


def product(outputs, inputs, rows=1, groups=1, float8_rows=False):
    def launch():
        weight = zeros(outputs, inputs, dtype=torch.uint8).view(torch.float8_e4m3fn)
        linear_triton(
            zeros(rows, 1, groups * inputs, dtype=torch.bfloat16),
            weight,
            zeros(*scale_shape(weight.shape)),
            groups,
            float8_rows,
        )

    return launch


def described_product(outputs, inputs, rows, groups, splits):
    def launch():
        weight = zeros(outputs, inputs, dtype=torch.uint8).view(torch.float8_e4m3fn)
        x = round_rows_triton(zeros(rows, 1, groups * inputs, dtype=torch.bfloat16))
        tune = tuning.DescribedLinearTuning(splits=splits)
        described_linear(x, weight, zeros(*scale_shape(weight.shape)), groups, tune)

    return launch


def row_product(outputs, inputs, groups=1, dtype=torch.float8_e4m3fn):
    def launch():
        weight = zeros(outputs, inputs, dtype=dtype)
        float8 = dtype == torch.float8_e4m3fn
        one_row_triton(
            zeros(1, 1, groups * inputs, dtype=torch.bfloat16),
            weight,
            zeros(*scale_shape(weight.shape)) if float8 else None,
            groups,
        )

    return launch


def few_rows(outputs, inputs):
    return lambda: few_rows_triton(
        *(zeros(rows, inputs, dtype=torch.bfloat16) for rows in (2, outputs))
    )


def turned_product(outputs, inputs, head):
    def launch():
        turn = HeadTurn(zeros(1, 32), zeros(1, 32), head)
        weight = zeros(outputs, inputs, dtype=torch.float8_e4m3fn)
        scale = zeros(*scale_shape(weight.shape))
        one_row_triton(zeros(1, inputs, dtype=torch.bfloat16), weight, scale, turn=turn)

    return launch


def gates_due(width, iterations=2):
    """Worked out by the product of one weight, of two, and alone."""

    @torch.no_grad()
    def launch():
        config = DeepseekV4Config(hidden_size=width, hc_sinkhorn_iters=iterations)
        module, norm = HyperConnection(config), RMSNorm(width, 1e-6)
        router = Router(config, hashed=False).bfloat16()
        router.due = module.due
        x, weight = (
            zeros(1, 1, width, dtype=torch.bfloat16),
            zeros(256, width, dtype=torch.bfloat16),
        )
        for product in (
            lambda: routed_triton(x[0], zeros(1, dtype=torch.int64), router),
            lambda: one_row_triton(x, weight, due=module.due),
            lambda: two_rows_triton(x, (weight, weight), (None, None), due=module.due),
            module.due.finish,
        ):
            streams = zeros(1, 1, 4, width, dtype=torch.bfloat16)
            enter_triton(streams, None, module, norm, then=weight)
            product()

    return launch


def two_products(first, second, inputs):
    def launch():
        weights = zeros(first, inputs, dtype=torch.float8_e4m3fn), zeros(second, inputs)
        weights = weights[0], weights[1].bfloat16()
        scales = zeros(*scale_shape(weights[0].shape)), None
        two_rows_triton(zeros(1, 1, inputs, dtype=torch.bfloat16), weights, scales)

    return launch


def routing(count, hashed=False, top_k=6):
    config = DeepseekV4Config(n_routed_experts=count, hidden_size=8, num_experts_per_tok=top_k)
    return lambda: route_triton(
        zeros(BATCH, count, dtype=torch.bfloat16),
        zeros(BATCH, dtype=torch.int64),
        Router(config, hashed),
    )


def routing_one(hashed):
    config = DeepseekV4Config(n_routed_experts=256, hidden_size=4096, num_experts_per_tok=6)
    x, tokens = zeros(1, 4096, dtype=torch.bfloat16), zeros(1, dtype=torch.int64)
    return lambda: routed_triton(x, tokens, Router(config, hashed).bfloat16())


def stage():
    long = torch.int64
    pages, fetched = zeros(BATCH, 512, dtype=long), zeros(BATCH, 512, dtype=torch.bool)
    stage_triton(
        *(zeros(rows, 584, dtype=torch.uint8) for rows in (64, 32)),
        pages,
        fetched,
        zeros(BATCH, dtype=long),
        zeros(BATCH, dtype=long),
        whole(BATCH, 1025),
        zeros(dtype=long),
    )


def kept():
    long, moves = torch.int64, zeros(21, BATCH, 512, dtype=torch.int64)
    first, slot_page = zeros(21, dtype=long), zeros(21, BATCH, dtype=long)
    pool = zeros(64, 584, dtype=torch.uint8)
    keep_triton(pool, first, slot_page, moves, moves, whole(21, BATCH, 1025))


def block_tables():
    enter_slots_triton(whole(21, 1025)[:, None], whole(1, BATCH), whole(21, BATCH, 1025))


def late_entries():
    mirror, pool = LATENT.new_pool(PAGES, 64), LATENT.new_pool(PAGES, 64)
    on_the_way = whole(PAGES)
    first_page = zeros(BATCH, dtype=torch.int64)
    ids, blocks = whole(BATCH, 512), whole(BATCH, PAGES + 1)
    bring_entries_triton(ids, blocks, on_the_way, first_page, mirror, pool, LATENT)


def late_pages(row_bytes):
    def launch():
        source, target = (zeros(2, 64, row_bytes, dtype=torch.uint8) for _ in range(2))
        lists, waiting = zeros(2, 8, dtype=torch.int64), whole(2, 65)
        copy_late_triton(source, target, lists, lists, whole(2), waiting, 3)
        take_back_triton(waiting, lists)
        wait_for_copy_triton(whole(1), whole(1))

    return launch


def listed():
    layout = LATENT
    listed_triton(
        Rows(
            layout,
            layout.new_pool(BATCH, 128),
            whole(BATCH),
            layout.new_pool(PAGES, 64),
            whole(BATCH, PAGES),
            whole(BATCH, 512),
        )
    )


LAUNCHES = {
    "index_scores": scores(KEY, 64, torch.bfloat16),
    "index_scores, float8 queries": scores(KEY, 64, torch.float8_e4m3fn),
    "index_scores, single entries": scores(KEY, 64, torch.bfloat16, per_page=1),
    "index_weights": lambda: index_weights_triton(zeros(BATCH, 1, 64, dtype=torch.bfloat16), 0.1),
    "index_scores, nano": scores(plain(torch.bfloat16, 32), 4, torch.bfloat16),
    "memory_scores": memory_scores(),
    "top_k": selection(False),
    "top_k, few entries": selection(False, 4096),
    "top_k, preselected": selection(True),
    "sparse_attention": attention(LATENT, 64, torch.bfloat16),
    "sparse_attention, known": attention(LATENT, 64, torch.float16, known=True),
    "sparse_attention, rounded": attention(LATENT, 64, torch.bfloat16, rounded=True),
    "sparse_attention, some": attention(LATENT, 64, torch.bfloat16, tune=tuning.ATTENTION_OF_SOME),
    "sparse_attention, many": attention(LATENT, 64, torch.bfloat16, tune=tuning.ATTENTION_OF_MANY),
    "sparse_attention, single entries": attention(LATENT, 64, torch.bfloat16, per_page=1),
    "sparse_attention, nano": attention(plain(torch.bfloat16, 64), 6, torch.bfloat16),
    "append, sliding": appends((LATENT, 1, 1)),
    "append, csa": appends((LATENT, 1, 1), (LATENT, 4, 2), (KEY, 4, 2)),
    "append, hca": appends((LATENT, 1, 1), (LATENT, 128, 1)),
    "append, nano": appends((NANO, 1, 1), (NANO, 4, 2)),
    "likeliest": lambda: likeliest_triton(zeros(BATCH, 129_280, dtype=torch.bfloat16)),
    "hyper_connection": connection(4096),
    "hyper_connection, rounded": connection(4096, rounded=True),
    "hyper_connection, one": connection(4096, rounded=True, tokens=1),
    "hyper_connection, first": connection(4096, first=True),
    "hyper_connection, pro": connection(7168, iterations=20),  # as it ships
    "hyper_connection, nano": connection(384),
    "hyper_connection, head": stream_head(4096),
    "norm_rope": turned(64, 512, 32, eps=1e-6),
    "norm_rope, output": turned(64, 512, 32, inverse=True),
    "norm_rope, rounded": turned(64, 512, 32, inverse=True, rounded=True),
    "norm_rope, index queries": turned(64, 128, 32),
    "norm_rope, nano": turned(6, 64, 8, eps=1e-6),
    "rms_norm": normed(1024),
    "rms_norm, rounded": normed(1024, rounded=True),
    "rms_norm, pro": normed(1536),
    "route": routing(256),
    "route, hashed": routing(256, hashed=True),
    "route, pro": routing(384),
    "route, with its product": routing_one(False),
    "route, hashed, with its product": routing_one(True),
    "route, nano": routing(4, top_k=2),
    "experts, one": experts(1),
    "experts, few": experts(4),
    "experts, many": experts(64),
    "experts, some of many": experts(64, part=OwnPairs(24, 32, 32)),
    "experts, float8, one": experts(1, torch.float8_e4m3fn),
    "experts, float8, few": experts(4, torch.float8_e4m3fn),
    "experts, float8, many": experts(64, torch.float8_e4m3fn),
    "experts, pro": experts(8, count=384, hidden=7168, width=3072),
    "experts, nano": experts(1, torch.float32, 4, 384, 160, 2),
    "experts, nano, few": experts(4, torch.float32, 4, 384, 160, 2),
    "linear, of the input": product(1536, 4096),
    "linear, of the latent": product(40_960, 1024),
    "linear, of the latent, 64 rows": product(40_960, 1024, rows=64),
    "linear, grouped": product(8192, 4096, groups=8),
    "linear, grouped, 64 rows": product(8192, 4096, rows=64, groups=8),
    "linear, output": product(4096, 8192),
    "linear, output, 128 rows": product(4096, 8192, rows=128),
    "linear, a prompt": product(4096, 8192, rows=1024),
    "linear, float8 rows, 64": product(40_960, 1024, rows=64, float8_rows=True),
    "linear, float8 rows, 128": product(4096, 8192, rows=128, float8_rows=True),
    "linear, float8 rows, grouped": product(8192, 4096, rows=256, groups=8, float8_rows=True),
    "linear, float8 rows, a prompt": product(4096, 8192, rows=1024, float8_rows=True),
    "linear, described": described_product(8192, 4096, rows=256, groups=8, splits=1),
    "linear, described, split": described_product(1536, 4096, rows=128, groups=1, splits=4),
    "linear, odd": product(200, 136),
    "linear, odd, many rows": product(200, 136, rows=77),
    "one_row, of the latent": row_product(40_960, 1024),
    "one_row, grouped": row_product(8192, 4096, groups=8),
    "one_row, output": row_product(4096, 8192),
    "one_row, compressors": row_product(2624, 4096, dtype=torch.bfloat16),
    "one_row, two": two_products(1536, 2624, 4096),
    "one_row, turned": turned_product(8192, 1024, 128),
    "few_rows": few_rows(2624, 4096),
    "gates_due": gates_due(4096),
    "one_row, odd": row_product(200, 136),
    "copy_rows, entries": rows(584),
    "stage": stage,
    "keep": kept,
    "block_tables": block_tables,
    "late_entries": late_entries,
    "late_pages, entries": late_pages(584),
    "late_pages, pages": late_pages(37_376),
    "listed": listed,
    "copy_rows, pages": rows(37_376),
}
