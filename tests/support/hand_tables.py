"""Kernel tables and a link made by hand, in round numbers."""

from fmsim.hw.deployment import Deployment
from fmsim.hw.spec import Figure, Gather

FIXED_S, ROWS_PER_S, LINK_PER_S = 10e-6, 50e9, 60e9


def round_link(hw, row_bytes):
    """The hardware with a link of 60 GB/s, whose gathers take 10 us and then run at 50 GB/s."""
    rates = {
        rows: rows * row_bytes / (FIXED_S + rows * row_bytes / ROWS_PER_S) for rows in (64, 65_536)
    }
    link = hw.link.model_copy(
        update={
            "bandwidth_bytes_per_s": Figure(value=LINK_PER_S, source="made by hand"),
            "gathers": (Gather(row_bytes=row_bytes, source="made by hand", bytes_per_s=rates),),
        }
    )
    return hw.model_copy(update={"link": link})


def flat(ms):
    """A time that does not depend on the size."""
    return {"at": [1, 2**40], "ms": [ms, ms]}


def attention(ms):
    """By batch 1 and 16, at 512 and 1,024 tokens; what 2,048 tokens add; a token of the others."""
    return {
        "context": [512, 1024],
        "batch": [1, 16],
        "short_ms": [[ms / 2, ms], [ms, 2 * ms]],
        "grown_at": [1024, 2048],
        "grown_ms": [0.0, ms / 4],
    }


def table(all_to_all_ms):
    """What `fmsim.hw.tables.load_table` gives, of V4-Flash."""
    kinds = {"csa": 1.0, "hca": 0.5}
    ways = {"1": flat(0.5), "2": flat(0.5), "8": flat(0.5)}
    prefill = {"chunk": [1024, 2048], "start": [0, 4096]}
    grids = {"csa": [[1.0, 2.0], [2.0, 4.0]], "hca": [[0.5, 1.0], [1.0, 2.0]]}
    return {
        "engine": "by hand",
        "all_reduce": {"2": flat(0.25), "8": flat(0.5)},
        "all_gather": {"4": flat(0.2), "8": flat(0.3)},
        "reduce_scatter": {"8": flat(0.4)},
        "models": {
            "v4-flash": {
                "attention": {
                    kind: {tp: attention(ms) for tp in ("1", "2", "8")} | {"token_ns": 1000 * ms}
                    for kind, ms in kinds.items()
                },
                "router": flat(0.2),
                "experts": {"fp8": {split: {"even": flat(1.0)} for split in ("tp8", "ep8")}},
                "shared_expert": {tp: flat(3.0) for tp in ways},
                "hyper_connections": flat(0.1),
                "head": {tp: flat(7.0) for tp in ways},
                "all_to_all": flat(all_to_all_ms),
                "prefill": {kind: {"8": prefill | {"ms": grid}} for kind, grid in grids.items()},
            }
        },
    }


def tabled(hw, monkeypatch, all_to_all_ms=0.6, **deployment):
    """The hardware with the table above, every kernel twice as slow."""
    monkeypatch.setattr("fmsim.hw.modules.load_table", lambda gpu, engine: table(all_to_all_ms))
    factor = Figure(value=2.0, source="made by hand")
    slower = hw.model_copy(update={"kernel_factor": factor, "topk_context_ms": None})
    return slower.deployed(Deployment(weights="fp8", **deployment))
