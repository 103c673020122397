"""Pages that come late, and slots that are taken back: kernels against their references, and these
against what was listed.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device

from fmsim.exec.kernels.late_pages import (
    copy_late_reference,
    copy_late_triton,
    take_back_reference,
    take_back_triton,
)

PAGES, SLOTS, NUMBER = 20, 12, 5


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
    for copy_late, take_back in (
        (copy_late_reference, take_back_reference),
        (copy_late_triton, take_back_triton),
    ):
        flags = waiting.clone().to(device)
        target = torch.zeros(groups, SLOTS, row_bytes, dtype=torch.uint8, device=device)
        take_back(flags, taken.to(device))
        moves = [part.to(device) for part in (pages, slots, counts)]
        copy_late(source.to(device), target, *moves, flags, NUMBER)
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
