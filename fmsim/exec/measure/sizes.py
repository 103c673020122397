"""What a calibration measures: contexts, batches and shapes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepSize:
    """A request whose bookkeeping is timed: entries of its context, slots of each group, and how
    many such requests decode together.
    """

    entries: int
    slots: int
    batch: int = 1


@dataclass(frozen=True)
class Sizes:
    """What to measure.

    Contexts in tokens, from one on at which a CSA layer finds its top 512 entries; ``gathers`` maps
    the bytes of a row to numbers of rows.
    """

    contexts: tuple[int, ...] = (
        4096,
        16_384,
        20_480,  # here the top-k has begun to leave groups out beforehand
        65_536,
        131_072,
        262_144,
        524_288,
        1_048_576,
    )
    # beside some between, where kernels change their ways and the last before: attention at 4 and
    # 16 requests, experts at 32, products after 16, 32, 48, 64, 96 and 128 rows, hyper-connections
    # after 8, 16, 24 and 33
    batches: tuple[int, ...] = (
        *(1, 2, 3, 4, 6, 8, 9, 12, 15, 16, 17, 24, 25, 31, 32, 33, 34),
        *(48, 49, 64, 65, 96, 97, 128, 129, 160),
    )
    # attention of several requests at longer contexts, likewise: top-k after 24, index scores from
    # 48 on too
    crowds: tuple[int, ...] = (
        *(3, 4, 8, 9, 15, 16, 24, 25, 32, 33),
        *(48, 49, 64, 65, 96, 97, 128),
    )
    # the third is the last at which top-k reads all groups' scores at once
    crowd_contexts: tuple[int, ...] = (20_480, 65_536, 131_072, 524_288)
    some_batches: tuple[int, ...] = (1, 8, 32, 128)  # of what a kernel adds to a module
    page_entries: tuple[int, ...] = (1, 4, 16)  # a page, beside those of 64
    # with these, and of a layer that selects among so many residents, in pages of so many
    paged_batches: tuple[int, ...] = (1, 8, 15, 16, 32, 33, 48, 49, 64, 65, 128)
    residents: tuple[int, ...] = (1024, 4096, 16_384)
    resident_pages: tuple[int, ...] = (1, 16, 64)
    staged: tuple[int, ...] = (0, 8, 64, 256)  # pages of one entry that a request loads in a layer
    staged_entries: int = 65_536  # of the request that loads them
    # the same of layers that load in most steps, by entries a page
    fetched: dict[int, tuple[int, ...]] = field(
        default_factory=lambda: {
            1: (0, 8, 64, 256),
            4: (0, 32, 256),
            16: (0, 16, 192),
            64: (0, 8, 64, 160),
        }
    )
    fetched_entries: int = 16_384
    # a layer of more than 16 requests makes its queries in another way
    fetching_batches: tuple[int, ...] = (1, 8, 16, 17, 32, 128)
    gathers: dict[int, tuple[int, ...]] = field(
        default_factory=lambda: {
            132: (512, 32_768),
            584: (32, 512, 4096, 32_768, 131_072),
            2336: (128, 4096, 32_768),
            37_376: (8, 96, 384, 2000),
        }
    )
    # bytes of a row that a decision recalls: keys and entries, in pages of one and of 64
    recalled_rows: tuple[int, ...] = (132, 584, 8448, 37_376)
    within_bytes: int = 2**28  # that are copied from one place of the GPU's memory to another
    beside_rows: int = 32_768  # of a gather beside a decode
    kernel_shapes: tuple[tuple[int, int], ...] = ((1, 131_072), (8, 32_768))
    # the first one, one of more entries, one of more slots, one of more requests
    steps: tuple[StepSize, StepSize, StepSize, StepSize] = (
        StepSize(8192, 1024),
        StepSize(65_536, 1024),
        StepSize(65_536, 16_384),
        StepSize(8192, 1024, 32),
    )
    # of decisions, whose lists are as long as the slots: the second and the third, of more requests
    decisions: tuple[StepSize, StepSize] = (
        StepSize(65_536, 1024, 32),
        StepSize(65_536, 16_384, 32),
    )
    # of steps that load misses: requests together, and entries of each, with the slots of `steps`
    loading_batches: tuple[int, ...] = (1, 32)
    loading_entries: tuple[int, ...] = (8192, 65_536)
    step_groups: int = 6  # residency groups, as the shipped traces have
    step_topk: int = 512
    busy_s: float = 0.008  # of a step without a model, so that the host gets ahead
    copy_bytes: int = 2**32
    link_bytes: int = 2**30
    host_bytes: int = 2**31
    matmul: int = 8192
    row_share: float = 0.4  # of free memory, that layers in a row may take

    @property
    def loading(self) -> tuple[StepSize, ...]:
        """Of steps that load misses."""
        slots = self.steps[0].slots
        return tuple(
            StepSize(entries, slots, batch)
            for batch in self.loading_batches
            for entries in self.loading_entries
        )
