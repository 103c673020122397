"""What traces of one prompt share, in a file of its own beside them: the prompt's index keys, its
tokens and the attention within it.

The file is named by its digest, `DIGEST.context`, and a trace's header says which it needs. Its
tensors are those of a trace, over the entries that the prompt closes: index_keys [Q, P, D],
index_key_scales [Q, 1], token_ids [prompt_tokens], prompt_mass [L, P].
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fmsim.errors import FmsimError
from fmsim.trace import float8
from fmsim.trace.format import PACKED_VERSION, Trace
from fmsim.trace.packed import rounded

CONTEXT_KEY = "fmsim_trace_context"  # the file's metadata entry, with the value "1"
NAME_DIGITS = 16  # of the digest


@dataclass(frozen=True, eq=False)
class SharedContext:
    """Arrays as in the file; None where the traces hold none."""

    index_keys: np.ndarray | None
    index_key_scales: np.ndarray | None
    token_ids: np.ndarray | None
    prompt_mass: np.ndarray | None


def context_path(trace_path: Path, digest: str) -> Path:
    """Where the context of a trace lies."""
    return trace_path.parent / f"{digest[:NAME_DIGITS]}.context"


def file_digest(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lightened(trace: Trace, keyed: Sequence[int] | None, mass_bits: int) -> Trace:
    """The trace as version 3 with index keys of the layers ``keyed`` alone (None for all that it
    has), and masses of ``mass_bits`` mantissa bits.

    Raises FmsimError where a layer has no keys.
    """
    header: dict[str, Any] = {"format_version": PACKED_VERSION}
    keys, scales = trace.index_keys, trace.index_key_scales
    if keyed is not None and keys is not None and scales is not None:
        absent = sorted(set(keyed) - set(trace.keyed))
        if absent or not keyed:
            raise FmsimError(
                f"{trace.path or 'trace'}: layers {absent} have no index keys; those of"
                f" {trace.keyed} are there"
            )
        rows = [trace.keyed.index(layer) for layer in sorted(set(keyed))]
        keys, scales = np.asarray(keys)[rows], np.asarray(scales)[rows]
        header["keyed"] = tuple(sorted(set(keyed)))
    return replace(
        trace,
        mass=None if trace.mass is None else rounded(np.asarray(trace.mass), mass_bits),
        index_keys=keys,
        index_key_scales=scales,
    ).with_header(**header)


def with_one_context(traces: Sequence[Trace]) -> tuple[SharedContext, list[Trace]]:
    """What ``traces`` of one prompt share, and the traces over just that.

    Of keys that were scaled differently those of the largest scale are taken for all, and each
    trace's own keys, of the entries that the decode closed, are rounded to that scale. Raises
    FmsimError where the traces are not of one prompt.
    """
    first = traces[0]
    prompt, entries = first.header.prompt_tokens, first.prompt_entries
    for other in traces[1:]:
        _check_same(first, other)
    scales = keys = None
    if first.index_keys is not None:
        found = [np.asarray(trace.index_key_scales) for trace in traces]
        if any(scale.shape[1] != 1 for scale in found):
            raise FmsimError("traces of one context need index keys of one scale a layer")
        scales = np.max(found, axis=0)
        largest = np.argmax(found, axis=0)[:, 0]
        keys = np.stack(
            [
                np.asarray(traces[which].index_keys)[row, :entries]
                for row, which in enumerate(largest)
            ]
        )
    tokens = None if first.token_ids is None else np.asarray(first.token_ids)[:prompt]
    mass = None if first.prompt_mass is None else np.asarray(first.prompt_mass)[:, :entries]
    shared = SharedContext(keys, scales, tokens, mass)
    return shared, [joined(_rest(trace, scales), shared) for trace in traces]


def _rest(trace: Trace, scales: np.ndarray | None) -> Trace:
    """The trace without what is shared."""
    keys = None
    if scales is not None and trace.index_keys is not None:
        own = np.asarray(trace.index_keys)[:, trace.prompt_entries :]
        decoded = float8.decode(own) * np.asarray(trace.index_key_scales)[:, :, None]
        same = np.asarray(trace.index_key_scales) == scales
        keys = np.where(same[:, :, None], own, float8.encode(decoded / scales[:, :, None]))
    tokens = trace.token_ids
    return replace(
        trace,
        index_keys=keys,
        index_key_scales=None,
        token_ids=None if tokens is None else np.asarray(tokens)[trace.header.prompt_tokens :],
        prompt_mass=None,
    )


def joined(rest: Trace, shared: SharedContext) -> Trace:
    """The whole trace of what is its own and what it shares. Raises ValueError where they do not
    fit each other.
    """
    keys, tokens, mass = rest.index_keys, rest.token_ids, rest.prompt_mass
    if keys is not None and shared.index_keys is not None:
        keys = np.concatenate((shared.index_keys, keys), axis=1)
    if tokens is not None and shared.token_ids is not None:
        tokens = np.concatenate((shared.token_ids, tokens), dtype=np.int32)
    if shared.prompt_mass is not None:
        prompt = np.asarray(shared.prompt_mass, np.float32)
        later = np.zeros((len(prompt), rest.total_entries - rest.prompt_entries), np.float32)
        mass = np.concatenate((prompt, later), axis=1)
    return replace(
        rest,
        index_keys=keys,
        index_key_scales=shared.index_key_scales,
        token_ids=tokens,
        prompt_mass=mass,
    )


def _check_same(first: Trace, other: Trace) -> None:
    """Raise FmsimError unless the two have read the same prompt and hold the same of it."""
    prompt, entries = first.header.prompt_tokens, first.prompt_entries
    if other.header.prompt_tokens != prompt:
        _refuse(first, other, "prompt_tokens")
    for name in ("geometry", "model", "keyed", "prompt_mass_queries", "entry_tokens"):
        if getattr(first.header, name) != getattr(other.header, name):
            _refuse(first, other, name)
    for name in ("token_ids", "prompt_mass", "index_keys"):
        if (getattr(first, name) is None) != (getattr(other, name) is None):
            _refuse(first, other, name)
    if first.token_ids is not None and other.token_ids is not None:
        one, two = (np.asarray(trace.token_ids)[:prompt] for trace in (first, other))
        if not np.array_equal(one, two):
            _refuse(first, other, "token_ids")
    if first.prompt_mass is not None and other.prompt_mass is not None:
        one, two = (np.asarray(trace.prompt_mass)[:, :entries] for trace in (first, other))
        if not np.array_equal(one, two):
            _refuse(first, other, "prompt_mass")
    if first.index_keys is not None:
        one, two = first.keys(entries), other.keys(entries)
        # one step of float8 apart at most, where their scales differ
        if (np.abs(one - two) > 0.13 * np.abs(one) + 1e-2 * np.abs(one).max()).any():
            _refuse(first, other, "index_keys")


def _refuse(first: Trace, other: Trace, name: str) -> NoReturn:
    raise FmsimError(
        f"{other.path or 'trace'}: {name}: is not {first.path or 'the first trace'}'s; only traces"
        " of one prompt and model share a context"
    )
