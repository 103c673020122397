"""The memory indexer's network, for inference: numpy or torch arrays, no torch import.

One retriever a CSA layer (arXiv 2606.09079, section 3): x is the layer's attention input at the
query token,

    a = RMSNorm(x Wa^T)
    q = a Wb^T as heads;  RoPE on q's last dims;  optionally a Walsh-Hadamard transform
    w = x Wp^T / sqrt(heads * head_dim)
    logit(entry) = sum_h w_h relu(q_h . key);  score = sigmoid(logit)

Entries' keys already carry RoPE (at the entry's first token) and, in DeepSeek-V4, the Hadamard
transform.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from fmsim.errors import FmsimError

ENTRIES_PER_BLOCK = 4096  # a block's [entries, heads] products stay in the processor's cache


@dataclass(frozen=True)
class Yarn:
    """YaRN's stretch of the rotary frequencies (arXiv 2309.00071), without its magnitude factor."""

    factor: float
    original_tokens: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class ScorerConfig:
    """What the weights' shapes do not say: how queries are rotated and transformed to meet the
    keys.
    """

    rope_dims: int
    rope_theta: float
    yarn: Yarn | None = None
    hadamard: bool = False
    norm_eps: float = 1e-6

    @classmethod
    def from_geometry(cls, geometry: dict[str, Any]) -> ScorerConfig:
        """The config whose queries meet the index keys of a trace with this header ``geometry``.

        Needs ``rope_dims`` and ``compress_rope``, the model's RoPE parameters in transformers'
        words (``rope_theta``; with ``rope_type`` "yarn" also ``factor`` and
        ``original_max_position_embeddings``). ``index_hadamard`` is optional. Raises FmsimError
        naming what is missing or not supported.
        """
        try:
            rope_dims, rope = int(geometry["rope_dims"]), geometry["compress_rope"]
            kind, theta, yarn = rope.get("rope_type", "default"), float(rope["rope_theta"]), None
            if kind == "yarn":
                betas = float(rope.get("beta_fast") or 32.0), float(rope.get("beta_slow") or 1.0)
                yarn = Yarn(
                    float(rope["factor"]), int(rope["original_max_position_embeddings"]), *betas
                )
        except KeyError as missing:
            raise FmsimError(
                f"trace header: the geometry lacks {missing}, which the indexer needs; record it"
                " again"
            ) from None
        if kind not in ("default", "yarn"):
            raise FmsimError(
                f"trace header: geometry compress_rope: rope_type {kind!r} is not supported by the"
                " memory indexer"
            )
        return cls(rope_dims, theta, yarn, bool(geometry.get("index_hadamard", False)))


PUBLISHED = ScorerConfig(rope_dims=64, rope_theta=160_000.0, yarn=Yarn(16.0, 65_536), hadamard=True)
"""DeepSeek-V4-Flash's, which FlashMemory's checkpoints assume and do not state."""


class LayerWeights(NamedTuple):
    """One retriever, float32: ``wq_a`` [rank, hidden], ``q_norm`` [rank], ``wq_b`` [heads *
    head_dim, rank], ``weights_proj`` [heads, hidden].
    """

    wq_a: Any
    q_norm: Any
    wq_b: Any
    weights_proj: Any

    @property
    def hidden_size(self) -> int:
        return self.wq_a.shape[1]

    @property
    def heads(self) -> int:
        return self.weights_proj.shape[0]

    @property
    def head_dim(self) -> int:
        return self.wq_b.shape[0] // self.heads


def inverse_frequencies(config: ScorerConfig) -> np.ndarray:
    """Angle per position of each rotated pair, float64 [rope_dims / 2]."""
    pairs = np.arange(config.rope_dims // 2)
    plain = config.rope_theta ** -(2.0 * pairs / config.rope_dims)
    if config.yarn is None:
        return plain
    yarn = config.yarn

    def pair_that_turns(rotations: float) -> float:
        """The pair that turns ``rotations`` times within the original length."""
        turns = math.log(yarn.original_tokens / (rotations * 2 * math.pi))
        return config.rope_dims * turns / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), config.rope_dims - 1)
    stretched = np.clip((pairs - low) / max(high - low, 1e-3), 0.0, 1.0)
    return plain * (1 - stretched) + plain / yarn.factor * stretched


def rotation(config: ScorerConfig, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of each position's angles, float32 [..., rope_dims / 2]; angles are float64,
    for 1M positions.
    """
    angles = np.asarray(positions, dtype=np.float64)[..., None] * inverse_frequencies(config)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def hadamard_matrix(size: int) -> np.ndarray:
    """Normalised Walsh-Hadamard matrix in Sylvester order, float32 [size, size]; size is a power of
    two.
    """
    if size & (size - 1):
        raise FmsimError(
            f"memory indexer: a Hadamard transform needs a power of two, not head_dim {size}"
        )
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return (matrix / math.sqrt(size)).astype(np.float32)


def queries(weights: LayerWeights, config: ScorerConfig, hidden, position: int):
    """The scoring vectors of one query token: q [heads, head_dim] and w [heads] (scale factor
    folded in), float32.

    ``hidden`` float32 [hidden_size] is the layer's attention input (after its RMSNorm),
    ``position`` its absolute position, 0 for the first token.
    """
    xp = array_namespace(hidden)
    latent = weights.wq_a @ hidden
    latent = latent / xp.sqrt(xp.mean(latent * latent) + config.norm_eps) * weights.q_norm
    query = xp.reshape(weights.wq_b @ latent, (weights.heads, weights.head_dim))
    cos, sin = (_like(part, hidden) for part in rotation(config, np.asarray(position)))
    still = weights.head_dim - config.rope_dims
    even, odd = query[:, still::2], query[:, still + 1 :: 2]
    turned = xp.stack((even * cos - odd * sin, even * sin + odd * cos), axis=-1)
    query = xp.concat(
        (query[:, :still], xp.reshape(turned, (weights.heads, config.rope_dims))), axis=1
    )
    if config.hadamard:
        query = query @ _like(hadamard_matrix(weights.head_dim), hidden)
    scale = (weights.heads * weights.head_dim) ** -0.5
    return query, (weights.weights_proj @ hidden) * scale


def logits(query, head_weights, keys):
    """``sum_h w_h relu(q_h . key)`` of every key: [heads, D], [heads], [E, D] -> float32 [E].

    In blocks of entries, but on a GPU, where each would be launches of its own.
    """
    xp = array_namespace(query)
    block = max(1, keys.shape[0]) if getattr(keys, "is_cuda", False) else ENTRIES_PER_BLOCK
    zero = _like(np.zeros((), dtype=np.float32), query)
    transposed = xp.permute_dims(query, (1, 0))
    blocks = [
        xp.maximum(keys[start : start + block] @ transposed, zero) @ head_weights
        for start in range(0, max(keys.shape[0], 1), block)
    ]
    return xp.concat(blocks, axis=0)


def layer_logits(
    layers: Sequence[LayerWeights],
    config: ScorerConfig,
    hidden: Sequence,
    position: int,
    keys: Sequence,
):
    """Logits of every layer, from its hidden [hidden_size] and its keys [E, D]: float32 [layers,
    E].
    """
    xp = array_namespace(hidden[0])
    scored = [
        logits(*queries(weights, config, hidden[n], position), keys[n])
        for n, weights in enumerate(layers)
    ]
    return xp.stack(scored, axis=0)


def served_logits(weights: LayerWeights, config: ScorerConfig, served, hidden, position: int, keys):
    """One layer's keys [E, D] scored for each of L layers that attend: float32 [L, E].

    As `logits`, but that the heads are weighed by each row of ``served`` [L, heads, hidden_size]
    in the place of ``weights_proj``: the products of queries and keys are the same for all.
    """
    xp = array_namespace(hidden)
    query, _ = queries(weights, config, hidden, position)
    head_weights = (served @ hidden) * (weights.heads * weights.head_dim) ** -0.5
    return xp.permute_dims(logits(query, xp.permute_dims(head_weights, (1, 0)), keys), (1, 0))


def combine(scored, how: str):
    """One logit an entry of [L, E]: the layers' ``max`` (a union of their sets) or ``mean``."""
    xp = array_namespace(scored)
    return xp.max(scored, axis=0) if how == "max" else xp.mean(scored, axis=0)


def sigmoid(values: Any) -> Any:
    """The score of a logit."""
    xp = array_namespace(values)
    return 0.5 + 0.5 * xp.tanh(0.5 * values)  # overflows nowhere


def logit(score: float) -> float:
    """The logit of a score in (0, 1).

    Thresholds are compared as logits: scores near 1 are all alike in float32.
    """
    return math.log(score / (1.0 - score))


def _like(array: np.ndarray, other):
    """A numpy array as an array of ``other``'s library, type and device."""
    xp = array_namespace(other)
    return xp.asarray(array, dtype=other.dtype, device=other.device)
