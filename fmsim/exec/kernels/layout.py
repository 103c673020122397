"""How entries and index keys lie in memory, for torch and for Triton.

A *pool* is uint8 [pages, page bytes]. A page of P entries holds the P entries' values one after
another, then their scales, as the deployed engine's pages of 64 do; with P = 1 an entry is one
contiguous row. An entry's place in a pool is its *slot*, ``page * P + number in the page``. Three
layouts of an entry:

- ``LATENT``, 584 bytes: 448 float8 e4m3 and 64 bfloat16 rotated values, then 8 bytes of scales: one
  power of two (ue8m0) for each 64 of the float8 values, and a zero byte;
- ``KEY``, 132 bytes: 128 float8 e4m3 values, then a float32 scale (a power of two too, so that
  scaling never rounds);
- ``plain(dtype, width)``: unscaled values, as small models keep them.

A layer's pool of single entries may start at an address not divisible by 16. Triton would assume no
alignment then, and read single bytes. So kernels get the `alignment` of pages, ALIGN.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fmsim.exec.kernels.lang import COMPILED, tl, triton

CHUNK = 64  # float8 values of a latent that share one scale
TINY = 1.0 / 2**13  # amounts below it are scaled as if they were it: a scale must not underflow


class Layout(NamedTuple):
    """``kind`` is what kernels switch on.

    Sizes of one entry: ``width`` in elements, the others in bytes.
    """

    kind: str
    width: int
    value_bytes: int
    scale_bytes: int
    dtype: torch.dtype = torch.uint8  # of the values of a plain entry

    @property
    def entry_bytes(self) -> int:
        return self.value_bytes + self.scale_bytes

    def new_pool(
        self, pages: int, per_page: int, device: torch.device | str = "cpu", pinned: bool = False
    ) -> Tensor:
        """A zeroed pool of ``pages`` pages of ``per_page`` entries; ``pinned`` in host memory that
        a GPU can read.
        """
        return torch.zeros(
            pages, per_page * self.entry_bytes, dtype=torch.uint8, device=device, pin_memory=pinned
        )

    def per_page(self, pool: Tensor) -> int:
        """Entries a page. A page may be padded at its end by less than an entry."""
        return pool.shape[1] // self.entry_bytes


def alignment(*pools: Tensor) -> int:
    """Bytes of which all pages' addresses are multiples, at most the 16 that a thread loads."""
    return math.gcd(16, *chain.from_iterable((pool.data_ptr(), pool.stride(0)) for pool in pools))


LATENT = Layout("latent", 512, 448 + 2 * CHUNK, 8)
KEY = Layout("key", 128, 128, 4)


def plain(dtype: torch.dtype, width: int) -> Layout:
    return Layout("plain", width, width * dtype.itemsize, 0, dtype)


# ----------------------------------------------------------------------------------------- in torch


def power_of_two_exponent(largest: Tensor) -> Tensor:
    """Biased exponent, int32, of the smallest power of two that brings ``largest`` (float32, >= 0)
    within +-448.

    448 is 1.75 x 2^8, so the exponent is the number's own less 8, and one more where its mantissa
    is above 1.75.
    """
    bits = largest.clamp(min=TINY).view(torch.int32)
    return (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(torch.int32)


def power(exponent: Tensor) -> Tensor:
    """The float32 of a biased exponent."""
    return (exponent.to(torch.int32) << 23).view(torch.float32)


def encode(rows: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """float [n, width] -> the entries' bytes, uint8: values [n, value_bytes] and scales [n,
    scale_bytes].
    """
    rows = rows.float()
    if layout.kind == "plain":
        return rows.to(layout.dtype).view(torch.uint8), rows.new_empty(
            len(rows), 0, dtype=torch.uint8
        )
    if layout.kind == "key":
        exponent = power_of_two_exponent(rows.abs().amax(1))
        codes = (rows * power(254 - exponent)[:, None]).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8), torch.stack([power(exponent)], 1).view(torch.uint8)
    still, rotated = rows[:, :-CHUNK].unflatten(1, (-1, CHUNK)), rows[:, -CHUNK:]
    exponent = power_of_two_exponent(still.abs().amax(2))
    codes = (still * power(254 - exponent)[..., None]).to(torch.float8_e4m3fn).flatten(1)
    scales = torch.nn.functional.pad(exponent.to(torch.uint8), (0, 1))
    return (
        torch.cat(
            (codes.view(torch.uint8), rotated.to(torch.bfloat16).contiguous().view(torch.uint8)), 1
        ),
        scales,
    )


def decode(values: Tensor, scales: Tensor, layout: Layout) -> Tensor:
    """The bytes that ``encode`` makes, any leading shape -> float32 [..., width]."""
    if layout.kind == "plain":
        return values.contiguous().view(layout.dtype).float()
    if layout.kind == "key":
        return values.view(torch.float8_e4m3fn).float() * scales.contiguous().view(torch.float32)
    codes, rotated = (
        values[..., :448].view(torch.float8_e4m3fn).float(),
        values[..., 448:].contiguous().view(torch.bfloat16),
    )
    still = codes.unflatten(-1, (-1, CHUNK)) * power(scales[..., :7])[..., None]
    return torch.cat((still.flatten(-2), rotated.float()), -1)


def _places(pool: Tensor, layout: Layout, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Index of every value byte and every scale byte of the entries in the flattened pool."""
    per_page = layout.per_page(pool)
    page, number = slots.long() // per_page * pool.shape[1], slots.long() % per_page
    values = (page + number * layout.value_bytes)[..., None] + torch.arange(
        layout.value_bytes, device=pool.device
    )
    scales = (page + per_page * layout.value_bytes + number * layout.scale_bytes)[..., None]
    return values, scales + torch.arange(layout.scale_bytes, device=pool.device)


def read_entries(pool: Tensor, layout: Layout, slots: Tensor) -> Tensor:
    """float32 [..., width] of the entries in ``slots`` (int, any shape; -1 gives some entry, for
    the caller to mask).
    """
    values, scales = _places(pool, layout, slots.clamp(min=0))
    flat = pool.reshape(-1)
    return decode(flat[values], flat[scales], layout)


def write_entries(pool: Tensor, layout: Layout, slots: Tensor, rows: Tensor) -> None:
    """Encode rows [n, width] into distinct ``slots`` [n]; slot -1 is left out."""
    places = _places(pool, layout, slots[slots >= 0])
    flat = pool.view(-1)
    for place, coded in zip(places, encode(rows[slots >= 0], layout), strict=True):
        flat[place] = coded


def slots_of(table: Tensor, ids: Tensor, per_page: int) -> Tensor:
    """Slots [B, n] of entries ``ids`` [B, n] by the block table [B, pages]; -1 where the id or its
    page is -1.
    """
    page = table.long().gather(1, ids.clamp(min=0).long() // per_page)
    return torch.where((ids >= 0) & (page >= 0), page * per_page + ids % per_page, -1)


# ---------------------------------------------------------------------------------------- in Triton


@triton.jit
def load_keys(
    start,
    number,
    valid,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    PER_PAGE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Index keys by their page's uint8 pointer (one, or [N]) and number in it [N]: unscaled values
    [N, WIDTH] and scales float32 [N]; 0 where not valid.
    """
    lane = tl.arange(0, WIDTH)
    if KIND == "key":
        places = (start + number * WIDTH)[:, None] + lane[None, :]
        places = tl.multiple_of(places, (1, ALIGN))
        codes = tl.load(places, mask=valid[:, None], other=0)
        places = (start + PER_PAGE * WIDTH + number * 4).to(tl.pointer_type(tl.float32))
        return codes.to(tl.float8e4nv, bitcast=True), tl.load(places, mask=valid, other=0.0)
    else:
        typed = start.to(tl.pointer_type(KIND))
        values = tl.load(
            (typed + number * WIDTH)[:, None] + lane[None, :], mask=valid[:, None], other=0.0
        )
        return values, valid.to(tl.float32)


@triton.jit
def product_operand(x):
    """What the matrix units take: float32 as it is, all else as float16.

    The hardware turns float8 into float16, and a bfloat16 between 6e-5 and 65504 fits it exactly;
    queries and latents are normalised, so theirs do. (Triton's interpreter multiplies no bfloat16.)
    """
    if x.dtype == tl.float32:
        return x
    else:
        return x.to(tl.float16)


@triton.jit
def load_latents(
    values, scales, valid, KIND: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr
):
    """Entries by uint8 pointers [N] to their values and scales: [N, WIDTH], float16 or the plain
    type; 0 where not valid.

    Of a latent, all but the last 64 values, which are 0 here: `load_rotated` has them.
    """
    if KIND == "latent":
        chunk = tl.arange(0, WIDTH // 64)[None, :, None]
        lane = tl.arange(0, 64)[None, None, :]
        places = tl.multiple_of(values[:, None, None] + (chunk * 64 + lane), (1, 1, ALIGN))
        coded = valid[:, None, None] & (chunk < WIDTH // 64 - 1)
        codes = tl.load(places, mask=coded, other=0)
        places = scales[:, None] + tl.arange(0, WIDTH // 64)[None, :]
        places = tl.multiple_of(places, (1, min(ALIGN, WIDTH // 64)))
        exponent = tl.load(places, mask=valid[:, None], other=0).to(tl.int32)
        # a power of two, so that scaling float16 rounds no more than float32
        scale = (exponent << 23).to(tl.float32, bitcast=True).to(tl.float16)
        return tl.reshape(
            codes.to(tl.float8e4nv, bitcast=True).to(tl.float16) * scale[:, :, None],
            [values.shape[0], WIDTH],
        )
    else:
        typed = values.to(tl.pointer_type(KIND))
        return tl.load(
            typed[:, None] + tl.arange(0, WIDTH)[None, :], mask=valid[:, None], other=0.0
        )


@triton.jit
def load_rotated(values, valid, WIDTH: tl.constexpr, ALIGN: tl.constexpr):
    """The last 64 values of latents, [N, 64] float16; 0 where not valid."""
    rotated = (values + (WIDTH - 64)).to(tl.pointer_type(tl.bfloat16))
    places = tl.multiple_of(rotated[:, None] + tl.arange(0, 64)[None, :], (1, ALIGN))
    return product_operand(tl.load(places, mask=valid[:, None], other=0.0))


@triton.jit
def float8_codes(x):
    """float32 within +-448 -> uint8 e4m3 codes, to the nearest, ties to even: by arithmetic, since
    the interpreter's cast is off.

    Normal numbers round in the bits, where a carry moves the exponent up; below 2^-6 adding 2^14
    leaves multiples of 2^-9.
    """
    bits = x.to(tl.uint32, bitcast=True)
    sign, size = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(tl.abs(x) < 0.015625, small, normal)
    return (tl.minimum(code, 0x7E) | sign).to(tl.uint8)


@triton.jit
def to_float8(x):
    """float32 within +-448 -> float8 e4m3, to the nearest, ties to even."""
    if COMPILED:
        return x.to(tl.float8e4nv)
    else:
        return float8_codes(x).to(tl.float8e4nv, bitcast=True)


@triton.jit
def scale_exponent(largest):
    """`power_of_two_exponent` in Triton."""
    bits = tl.maximum(largest, 1.0 / 8192).to(tl.int32, bitcast=True)
    return (bits >> 23) - 8 + tl.where((bits & 0x7FFFFF) > 0x600000, 1, 0)


@triton.jit
def store_entry(values, scales, x, KIND: tl.constexpr, WIDTH: tl.constexpr):
    """Encode one entry, float32 [WIDTH], at uint8 pointers to its values and its scales."""
    if KIND == "latent":
        last: tl.constexpr = WIDTH // 64 - 1
        x = tl.reshape(x, [WIDTH // 64, 64])
        number = tl.arange(0, WIDTH // 64)
        chunk, lane = number[:, None], tl.arange(0, 64)[None, :]
        exponent = scale_exponent(tl.max(tl.abs(x), 1))
        codes = float8_codes(x * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None])
        tl.store(values + (chunk * 64 + lane), codes, mask=chunk < last)
        rotated = (values + last * 64).to(tl.pointer_type(tl.bfloat16))
        tl.store(rotated + (chunk * 0 + lane), x.to(tl.bfloat16), mask=chunk == last)
        tl.store(scales + number, tl.where(number < last, exponent, 0).to(tl.uint8))
    elif KIND == "key":
        exponent = scale_exponent(tl.max(tl.abs(x), 0))
        codes = float8_codes(x * ((254 - exponent) << 23).to(tl.float32, bitcast=True))
        tl.store(values + tl.arange(0, WIDTH), codes)
        tl.store(
            scales.to(tl.pointer_type(tl.float32)), (exponent << 23).to(tl.float32, bitcast=True)
        )
    else:
        tl.store(values.to(tl.pointer_type(KIND)) + tl.arange(0, WIDTH), x.to(KIND))


_TRITON_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def triton_type(dtype: torch.dtype):
    return getattr(tl, _TRITON_TYPES[dtype])


def triton_kind(layout: Layout):
    """What the functions above take as KIND: the layout's name, or the type of a plain entry's
    values.
    """
    return triton_type(layout.dtype) if layout.kind == "plain" else layout.kind
