"""A calibration's kernel table, made by hand."""

from fmsim.hw.spec import KernelTable

BATCHES = (1, 8, 64)


def kernel_table() -> KernelTable:
    """Times in ms that grow with batch and context, of no device."""
    by_batch = lambda ms: {batch: ms * (1 + batch / 64) for batch in BATCHES}
    return KernelTable(
        csa_context_ms={1024: 0.08, 131_072: 0.09, 1_048_576: 0.11},
        csa_batch_ms=by_batch(0.08),
        hca_context_ms={1024: 0.05, 131_072: 0.055, 1_048_576: 0.08},
        hca_batch_ms=by_batch(0.05),
        moe_batch_ms=by_batch(0.03),
        hyper_connections_batch_ms=by_batch(0.024),
        all_reduce_batch_ms={1: 0.0},
        router_batch_ms=by_batch(0.006),
        head_batch_ms=by_batch(0.05),
    )
