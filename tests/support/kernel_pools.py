"""What the tests of kernels and of the engine on a GPU share: the ways to run, and pools whose
pages lie in no order.
"""

from contextlib import contextmanager

import pytest
import torch

from fmsim.exec.kernels.layout import Layout, write_entries

# The interpreter where there is no GPU (conftest.py); the same test again, compiled, where there is
# one.
DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="a GPU is here: the kernels run compiled on it"
        ),
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                not torch.cuda.is_available(),
                reason="no CUDA device: the kernel ran in Triton's interpreter only",
            ),
        ],
    ),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)


@contextmanager
def no_waits():
    """Within it, on a GPU, whatever makes the host wait for the device raises."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def scattered_pool(
    rows: torch.Tensor, layout: Layout, per_page: int, missing: float, generator: torch.Generator
):
    """Entries [B, N, width] written to pages in random order -> (pool, block table int32 [B,
    pages], some pages -1).

    Bytes that belong to no entry are random, so reading them shows; so do pages that the table does
    not name.
    """
    batch, entries, _ = rows.shape
    pages = -(-entries // per_page)
    spare = 3
    pool = torch.randint(
        0,
        256,
        (batch * pages + spare, per_page * layout.entry_bytes),
        dtype=torch.uint8,
        generator=generator,
    )
    table = torch.randperm(len(pool), generator=generator)[: batch * pages].view(batch, pages)
    ids = torch.arange(entries)
    slots = table[:, ids // per_page] * per_page + ids % per_page
    write_entries(pool, layout, slots.flatten(), rows.flatten(0, 1))
    lost = torch.rand(table.shape, generator=generator) < missing
    return pool, table.masked_fill(lost, -1).to(torch.int32)


def behind(pages: int, pool: torch.Tensor, device: str) -> torch.Tensor:
    """``pool`` on a device, after so many other pages, as a later layer's lies: 16 need not divide
    its address.
    """
    return torch.cat((pool[:pages], pool)).to(device)[pages:]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected; nan where anything is."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def rounded_by_hand(x: torch.Tensor) -> torch.Tensor:
    """Each 128 values of a row [..., in] on the float8 numbers that a power of two brings within
    448."""
    parts = []
    for part in x.double().split(128, -1):
        largest = part.abs().amax(-1, keepdim=True).clamp(min=2.0**-13)
        unit = torch.exp2(torch.ceil(torch.log2(largest / 448)))
        parts.append((part / unit).float().to(torch.float8_e4m3fn).double() * unit)
    return torch.cat(parts, -1)
