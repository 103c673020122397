"""Lightning indexers beside the layers of a frozen dense model (DeepSeek-V3.2, arXiv 2512.02556,
section 2.1; entries of one token).

A layer's index score of query t and token s is the memory indexer's formula with keys of its own,

    I(t, s) = sum_h w_h(t) relu(q_h(t) . k(s)),   k = RoPE(LayerNorm(x Wk))

and is trained as in the dense warm-up: sum over t of KL(p(t) || softmax(I(t))), p the attention
summed over heads and divided by its sum.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fmsim.errors import FmsimError
from fmsim.experiments.witness.frozen import Choose, FrozenAttention, before
from fmsim.files import replacing
from fmsim.indexer.checkpoint import Checkpoint
from fmsim.indexer.network import Retriever, rotated
from fmsim.indexer.scorer import LayerWeights, ScorerConfig, rotation

METADATA_KEY = "fmsim_witness"


@dataclass(frozen=True)
class IndexerShape:
    """Heads of a query, dims of each and of a key, how many of them are rotated, and the queries'
    bottleneck.
    """

    heads: int = 8
    width: int = 32
    rope_dims: int = 16
    rank: int = 96


class LightningIndexer(nn.Module):
    """One layer's. On a GPU it learns from products in bfloat16, and selects by float32's."""

    def __init__(self, hidden_size: int, shape: IndexerShape, config: ScorerConfig) -> None:
        super().__init__()
        self.config = config
        self.queries = Retriever(hidden_size, shape.heads, shape.width, shape.rank, config)
        self.key = nn.Linear(hidden_size, shape.width, bias=False)
        self.norm = nn.LayerNorm(shape.width)
        nn.init.normal_(self.key.weight, std=hidden_size**-0.5)

    def keys(self, states: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """states [S, hidden], cosine and sine [S, rope_dims / 2] -> float32 [S, width]."""
        return rotated(self.norm(self.key(states.float())), turns, self.config.rope_dims)

    def forward(self, states: Tensor, turns: tuple[Tensor, Tensor], keys: Tensor) -> Tensor:
        """Index scores [n, S] of the queries' states [n, hidden] and keys [S, width]."""
        learns = torch.is_grad_enabled()
        with torch.autocast(keys.device.type, torch.bfloat16, keys.is_cuda and learns):
            return self.queries(states.float(), turns, keys).float()


class LightningIndexers(nn.Module):
    """One for each of ``layers`` layers; ``rope``: transformers' `rope_parameters`, which the model
    has too.
    """

    def __init__(
        self, layers: int, hidden_size: int, shape: IndexerShape, rope: dict[str, Any]
    ) -> None:
        super().__init__()
        self.hidden_size, self.shape, self.rope = hidden_size, shape, rope
        self.config = ScorerConfig.from_geometry(
            {"rope_dims": shape.rope_dims, "compress_rope": rope}
        )
        self.layers = nn.ModuleList(
            LightningIndexer(hidden_size, shape, self.config) for _ in range(layers)
        )
        self._turns: tuple[Tensor, Tensor] | None = None

    def turns(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the first ``tokens`` positions' angles."""
        if self._turns is None or len(self._turns[0]) < tokens:
            cos, sin = rotation(self.config, np.arange(tokens))
            self._turns = torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device)
        return self._turns[0][:tokens], self._turns[1][:tokens]

    def keys(self, attention: FrozenAttention) -> Tensor:
        """float32 [S, width], rotated."""
        states = attention.states
        return self.layers[attention.layer].keys(states, self.turns(len(states), states.device))

    def scores(self, attention: FrozenAttention, rows: Tensor, keys: Tensor) -> Tensor:
        """[n, W] of the queries ``rows`` [n] with the first W = rows[-1] + 1 keys."""
        turns = self.turns(len(attention.states), rows.device)
        return self.layers[attention.layer](
            attention.states[rows], (turns[0][rows], turns[1][rows]), keys[: int(rows[-1]) + 1]
        )

    def selector(self, topk: int) -> Any:
        """For `frozen.sparse`: each query's ``topk`` tokens of the highest scores."""

        def selector(attention: FrozenAttention) -> Choose:
            keys = self.keys(attention)
            return lambda rows: best(self.scores(attention, rows, keys), rows, topk)

        return selector

    def checkpoint(self) -> Checkpoint:
        """The queries' side, as a memory indexer's checkpoint: the indexer held for a window."""
        return Checkpoint(
            {
                number: LayerWeights(
                    *(
                        part.detach().float().cpu().numpy()
                        for part in (
                            layer.queries.wq_a.weight,
                            layer.queries.q_norm_weight,
                            layer.queries.wq_b.weight,
                            layer.queries.weights_proj.weight,
                        )
                    )
                )
                for number, layer in enumerate(self.layers)
            },
            self.config,
            training={"of": "lightning indexers beside a frozen dense model"},
        )

    def save(self, path: Path, training: dict[str, Any]) -> None:
        """Weights in float16, and how they came about."""
        about = {
            "layers": len(self.layers),
            "hidden_size": self.hidden_size,
            "shape": asdict(self.shape),
            "rope": self.rope,
            "training": training,
        }
        tensors = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        with replacing(path) as beside:
            save_file(tensors, beside, metadata={METADATA_KEY: json.dumps(about)})

    @classmethod
    def load(cls, path: Path, device: str) -> LightningIndexers:
        """What `save` wrote; FmsimError for another file."""
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()[METADATA_KEY])
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        except (OSError, KeyError, TypeError) as error:
            raise FmsimError(f"{path}: not lightning indexers of a witness: {error!r}") from None
        shape = IndexerShape(**about["shape"])
        found = cls(about["layers"], about["hidden_size"], shape, about["rope"])
        found.load_state_dict(tensors)
        return found.to(device)


def best(scores: Tensor, rows: Tensor, topk: int) -> Tensor:
    """bool [n, W]: for each query of ``rows`` the ``topk`` tokens, not after it, of the highest
    scores [n, W]; all of them where there are fewer.
    """
    seen = before(rows)
    count = min(topk, scores.shape[1])
    places = scores.masked_fill(~seen, -torch.inf).topk(count, dim=1).indices
    return torch.zeros_like(seen).scatter_(1, places, True) & seen


def divergence(scores: Tensor, target: Tensor, seen: Tensor) -> Tensor:
    """KL(target || softmax of ``scores`` over ``seen``), mean over queries, in nats; all [n, W],
    target's rows sum to 1 and are 0 where not seen.
    """
    log_shares = scores.masked_fill(~seen, -torch.inf).log_softmax(-1).masked_fill(~seen, 0.0)
    return (torch.xlogy(target, target) - target * log_shares).sum(-1).mean()


def plain_divergence(scores: np.ndarray, probabilities: np.ndarray, rows: np.ndarray) -> float:
    """`divergence`, one query and token at a time: scores [n, W], probabilities [heads, n, W] of
    the attention, positions [n].
    """
    total = 0.0
    for place, row in enumerate(rows):
        summed = [sum(head[place][s] for head in probabilities) for s in range(row + 1)]
        target = [value / sum(summed) for value in summed]
        highest = max(scores[place][: row + 1])
        whole = sum(np.exp(scores[place][s] - highest) for s in range(row + 1))
        for s, share in enumerate(target):
            found = np.exp(scores[place][s] - highest) / whole
            total += share * np.log(share / found) if share > 0 else 0.0
    return total / len(rows)
