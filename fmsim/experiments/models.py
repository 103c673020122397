"""What a model keeps, and what of it fits each hardware preset: the figures of `fmsim model`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fmsim.geometry import PRESETS, Geometry, geometry_named
from fmsim.hw import hardware_names, load_hardware

CONTEXTS = (2**17, 2**19, 2**20)  # tokens: 128K, 512K, 1M


def listed() -> list[dict[str, Any]]:
    """One row a preset."""
    return [row(PRESETS[name]) | PRESETS.about(name) for name in PRESETS]


def hardware_listed() -> list[dict[str, Any]]:
    """One row a hardware preset."""
    every = ((name, load_hardware(name)) for name in hardware_names())
    return [
        {
            "name": name,
            "title": found.title,
            "gpus": found.n_gpus,
            "memory_bytes": found.hbm_bytes.value,
            "memory_bytes_per_s": found.hbm_bytes_per_s.value,
            "link_bytes_per_s": found.link.bandwidth_bytes_per_s.value,
        }
        for name, found in every
    ]


def row(geometry: Geometry) -> dict[str, Any]:
    """A model's figures in short; bytes are of one request."""
    return {
        "name": geometry.name,
        "family": geometry.family,
        "layers": geometry.n_layers,
        "paged_layers": geometry.n_csa,
        "selections": len(set(geometry.selection_map())),
        "bytes_per_token": geometry.bytes_per_token(),
        "window_bytes": geometry.window_bytes,
        "max_positions": geometry.max_positions,
        "weight_bytes": geometry.weight_bytes(1),
        "kv_bytes": {tokens: geometry.full_kv_bytes(tokens) for tokens in CONTEXTS},
    }


def shown(name: str) -> dict[str, Any]:
    """`row` of a preset or a file, its layers by kind, and how many requests with their whole
    cache fit each hardware preset.
    """
    geometry = geometry_named(name, where="model show")
    about = PRESETS.about(name) if name in PRESETS else {"title": geometry.name, "source": name}
    return row(geometry) | about | {"parts": parts(geometry), "fits": fits(geometry)}


def parts(geometry: Geometry) -> list[dict[str, Any]]:
    """Layers that are alike in one row: what they keep, and what a token adds in all of them."""
    alike = Counter(
        layer.model_copy(
            update={
                "shares": None if layer.shares is None else 0,
                "kv_of": None if layer.kv_of is None else 0,
            }
        )
        for layer in geometry.layers
    )
    return [
        {
            "layers": count,
            "kind": layer.kind,
            "entry_tokens": layer.entry_tokens or None,
            "entry_bytes": layer.entry_bytes,
            "key_bytes": layer.key_bytes,
            "topk": layer.topk or None,
            "selection": _selection(layer.kind, layer.shares is not None),
            "kv": "an earlier layer's" if layer.kv_of is not None else "own",
            "window_tokens": layer.window_tokens,
            "bytes_per_token": count * layer.bytes_per_token(),
        }
        for layer, count in alike.items()
    ]


def _selection(kind: str, shared: bool) -> str:
    if kind != "sparse":
        return "none"
    return "an earlier layer's" if shared else "own"


def fits(geometry: Geometry) -> list[dict[str, Any]]:
    """For each preset: what weights leave for KV on a GPU, and whole caches that go into it."""
    found = []
    for name in hardware_names():
        hw = load_hardware(name)
        found_pool = hw.kv_pool(geometry)
        pool = found_pool.value if found_pool else 0.0
        held = geometry.on_gpu(hw.placed.tp)
        requests = {}
        for tokens in CONTEXTS:
            one = held.full_gpu_bytes(tokens)
            known = geometry.max_positions is None or tokens <= geometry.max_positions
            requests[tokens] = int(pool // one) if known else None
        found.append(
            {
                "hardware": name,
                "gpus": hw.n_gpus,
                "weights": hw.placed.weights,
                "weight_bytes_per_gpu": hw.weight_bytes(geometry),
                "kv_pool_bytes": pool,
                "requests": requests,
            }
        )
    return found
