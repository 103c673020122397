"""Pages that come late, and slots that are taken back: kernels against their references, and these
against what was listed.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device

from fmsim.exec.kernels.pages.late_pages import (
    copy_late_reference,
    copy_late_triton,
    take_back,
    take_back_reference,
    take_back_triton,
    wait_for_copy,
    wait_for_copy_triton,
)

PAGES, SLOTS, NUMBER = 20, 12, 5
CYCLES = 50_000_000  # of a GPU, some 30 ms


@on_each_device
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    groups=st.integers(1, 3),
    row_bytes=st.sampled_from([132, 584, 8448, 74_752]),
    listed=st.integers(1, SLOTS),
    one_list=st.booleans(),
)
def test_pages_come_into_slots_that_still_wait_for_them(
    device, seed, groups, row_bytes, listed, one_list
):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(
        0, 256, (groups, PAGES, row_bytes), generator=generator, dtype=torch.uint8
    )
    lists = 1 if one_list else groups
    pages, slots = (
        torch.stack([torch.randperm(n, generator=generator)[:listed] for _ in range(lists)])
        for n in (PAGES, SLOTS)
    )
    pages[torch.rand(pages.shape, generator=generator) < 0.2] = -1
    slots[torch.rand(slots.shape, generator=generator) < 0.2] = -1
    pages, slots = (part.expand(groups, -1) for part in (pages, slots))
    counts = torch.randint(0, listed + 1, (groups,), generator=generator, dtype=torch.int32)
    waiting = torch.randint(NUMBER - 1, NUMBER + 1, (groups, SLOTS + 1), generator=generator).int()
    taken = torch.where(torch.rand(slots.shape, generator=generator) < 0.3, slots, -1)
    found = []
    for copy, take in (
        (copy_late_reference, take_back_reference),
        (copy_late_triton, take_back_triton),
    ):
        flags = waiting.clone().to(device)
        target = torch.zeros(groups, SLOTS, row_bytes, dtype=torch.uint8, device=device)
        take(flags, taken.to(device))
        moves = [part.to(device) for part in (pages, slots, counts)]
        copy(source.to(device), target, *moves, flags, NUMBER)
        found.append((target.cpu(), flags[:, :-1].cpu()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    for group in range(groups):
        came = dict(zip(*(part[group, : counts[group]].tolist() for part in (slots, pages))))
        for slot in range(SLOTS):
            number = 0 if slot in taken[group].tolist() else int(waiting[group, slot])
            comes = number == NUMBER and came.get(slot, -1) >= 0
            expected = source[group, came[slot]] if comes else torch.zeros(row_bytes).byte()
            assert torch.equal(found[0][0][group, slot], expected)
            assert int(found[0][1][group, slot]) == (0 if comes else number)


@on_each_device
def test_what_is_launched_waits_until_its_copy_has_come(device):
    """On a GPU, of a copy that comes beside it, a while later."""
    come, asked = (torch.full((1,), n, dtype=torch.int32, device=device) for n in (0, NUMBER))
    if device == "cuda":
        wait_for_copy(asked, asked)  # compiled, so that it is launched before the copy has come
        torch.cuda.synchronize()
        beside = torch.cuda.Stream()
        with torch.cuda.stream(beside):
            torch.cuda._sleep(CYCLES)
            come.fill_(NUMBER)
        wait_for_copy(come, asked)
        found = come.clone()
        assert not beside.query()  # the host did not wait
        assert found.tolist() == [NUMBER]
    else:
        wait_for_copy_triton(come.fill_(NUMBER), asked)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it waits for what runs beside it")
def test_a_slot_is_waited_for_while_its_page_is_copied():
    """Of slots that are being copied, or wait, or have come, none changes any more afterwards."""
    waiting = torch.tensor([[-NUMBER, NUMBER, 0, -NUMBER, NUMBER, 0]] * 2, device="cuda").int()
    slots = torch.tensor([[0, 1, -1, 2]] * 2, device="cuda")
    take_back(torch.zeros_like(waiting), slots)  # compiled
    copied, beside = torch.zeros(2, 1, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(beside):
        torch.cuda._sleep(CYCLES)
        copied.fill_(1.0)
        waiting[:, 0] = 0
    take_back(waiting, slots)
    found = copied.clone(), waiting.clone()
    assert not beside.query()  # the host did not wait
    assert found[0].tolist() == [[1.0], [1.0]]
    assert found[1][:, :-1].tolist() == [[0, 0, 0, -NUMBER, NUMBER]] * 2
