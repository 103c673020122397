"""The bytes of entries and keys: against the format's definition, the geometry's sizes and numpy's
float8.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device

from fmsim.exec.kernels.lang import tl, triton
from fmsim.exec.kernels.layout import (
    KEY,
    LATENT,
    alignment,
    decode,
    encode,
    float8_codes,
    plain,
    power_of_two_exponent,
    read_entries,
    scale_exponent,
    write_entries,
)
from fmsim.geometry import PRESETS
from fmsim.trace import float8

LAYOUTS = [LATENT, KEY, plain(torch.float32, 32), plain(torch.bfloat16, 64)]


def test_sizes_are_the_geometrys():
    flash = PRESETS["v4-flash"]
    assert LATENT.entry_bytes == flash.kv_entry_bytes == 584
    assert KEY.entry_bytes == flash.index_key_bytes == 132
    assert LATENT.width == flash.head_dim and KEY.width == flash.index_head_dim


def test_a_key_is_its_codes_and_its_scale():
    """The largest value is 7: 7 / 448 = 2^-6, so the codes are those of 64 times the values, and
    the scale is 2^-6.
    """
    row = torch.zeros(1, 128)
    row[0, :3] = torch.tensor([7.0, -1.0, 0.03])
    values, scales = encode(row, KEY)
    expected = float8.encode(np.array([448.0, -64.0, 1.92]))
    assert values[0, :3].tolist() == expected.tolist() == [0x7E, 0xE8, 0x3F]
    assert scales.view(torch.float32).item() == 2.0**-6
    assert decode(values, scales, KEY)[0, :3].tolist() == [7.0, -1.0, 1.875 / 64]


def test_a_page_of_64_is_the_deployed_one():
    """64 x 576 bytes of values, then 64 x 8 of scales; padding at the end (37,440 bytes) is left
    alone.
    """
    pool = torch.full((2, 37_440), 0xAA, dtype=torch.uint8)
    assert LATENT.per_page(pool) == 64
    row = torch.ones(1, 512)
    write_entries(pool, LATENT, torch.tensor([64 + 5]), row)
    one, page = (
        float8.encode(np.ones(1) * 256)[0],
        pool[1],
    )  # 1 fits 448 with the scale 2^-8, biased exponent 119
    assert (page[5 * 576 : 5 * 576 + 448] == one).all()
    assert (page[5 * 576 + 448 : 6 * 576].view(torch.bfloat16) == 1).all()
    assert page[64 * 576 + 5 * 8 : 64 * 576 + 6 * 8].tolist() == [119] * 7 + [0]
    assert int((pool != 0xAA).sum()) == 576 + 8
    assert torch.equal(read_entries(pool, LATENT, torch.tensor([69])), row)


@settings(max_examples=50, deadline=None)
@given(layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 2**32), power=st.integers(-12, 12))
def test_encoding_errs_by_half_a_step(layout, seed, power):
    rows = torch.randn(5, layout.width, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    found = decode(*encode(rows, layout), layout)
    # half a step, relative
    step = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}.get(layout.dtype, 2.0**-4)
    # half of e4m3's 2^-9, at 448 = 2^8.8
    smallest = 2.0**-18 * rows.abs().amax() if layout.scale_bytes else 0.0
    floor = 2.0**-13 * 2.0**-18 if layout.scale_bytes else 0.0
    assert ((found - rows).abs() <= rows.abs() * step + smallest + floor).all()


@given(st.floats(0, 2.0**100, width=32))
def test_the_scale_is_the_smallest_power_of_two_that_fits(largest):
    largest = max(largest, 2.0**-13)
    exponent = int(power_of_two_exponent(torch.tensor([largest]))) - 127
    assert largest / 2.0**exponent <= 448 < largest / 2.0 ** (exponent - 1)


@triton.jit
def _codes(x, codes, exponents, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(codes + i, float8_codes(value))
    tl.store(exponents + i, scale_exponent(tl.abs(value)))


@triton.jit
def _decoded(codes, x, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x + i, tl.load(codes + i).to(tl.float8e4nv, bitcast=True).to(tl.float32))


@on_each_device
def test_float8_in_triton_is_torchs_and_numpys(device):
    """Every code, every midpoint of two codes and both its neighbours; then random numbers of every
    size.
    """
    positive = float8.VALUES[:0x7F].astype(np.float64)  # every finite one, ascending
    middle = torch.from_numpy(((positive[:-1] + positive[1:]) / 2).astype(np.float32))
    around = torch.cat(
        [middle, torch.nextafter(middle, middle * 0), torch.nextafter(middle, middle * 2)]
    )
    random = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.linspace(
        -14, 7, 4096
    )
    x = torch.cat(
        [torch.from_numpy(float8.VALUES[:0x7F]), around, -around, random, torch.tensor([0.0, -0.0])]
    ).clamp(-448, 448)
    x = torch.nn.functional.pad(x, (0, 8192 - len(x))).to(device)
    codes, exponents = (
        torch.zeros(8192, dtype=torch.uint8, device=device),
        torch.zeros(8192, dtype=torch.int32, device=device),
    )
    _codes[(1,)](x, codes, exponents, 8192)
    assert torch.equal(codes, x.to(torch.float8_e4m3fn).view(torch.uint8))
    assert np.array_equal(codes.cpu().numpy(), float8.encode(x.cpu().numpy()))
    assert torch.equal(exponents, power_of_two_exponent(x.abs()))
    every = torch.tensor(
        [code for code in range(256) if code not in float8.NAN_CODES] + [0, 0],
        dtype=torch.uint8,
        device=device,
    )
    found = torch.full((256,), float("nan"), device=device)
    _decoded[(1,)](every, found, 256)
    assert torch.equal(found, every.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(
    ("layout", "per_page", "first", "expected"),
    [(KEY, 1, 0, 4), (KEY, 1, 3, 4), (KEY, 64, 1, 16), (LATENT, 1, 1, 8), (LATENT, 64, 1, 16)],
)
def test_kernels_are_told_no_more_alignment_than_there_is(layout, per_page, first, expected):
    pool, window = layout.new_pool(5, per_page)[first:], layout.new_pool(2, 128)
    assert alignment(pool) == alignment(window, pool) == expected
    assert all(page.data_ptr() % expected == 0 for page in pool)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_page", [1, 4, 64])
def test_a_write_touches_its_slots_alone(layout, per_page):
    generator = torch.Generator().manual_seed(per_page)
    rows = torch.randn(3 * per_page, layout.width, generator=generator)
    pool = layout.new_pool(3, per_page)
    write_entries(pool, layout, torch.arange(3 * per_page), rows)
    before, kept = pool.clone(), [slot for slot in range(3 * per_page) if slot != per_page]
    write_entries(pool, layout, torch.tensor([per_page, -1]), torch.ones(2, layout.width))
    assert torch.equal(
        read_entries(pool, layout, torch.tensor(kept)),
        read_entries(before, layout, torch.tensor(kept)),
    )
    assert torch.equal(
        read_entries(pool, layout, torch.tensor([per_page])), torch.ones(1, layout.width)
    )
