"""Record a trace from a dense transformers causal LM, as if its attention went to compressed
entries.

A dense model has no CSA layers, so its attention is pooled the way that a DeepSeek-V4 model is
built:

- the query's 128 newest tokens are its sliding window, and their probability is ``window_mass``;
- every older token's probability counts for its entry (token // 4), so that nothing counts twice;
  an entry that the window's edge divides has the tokens outside the window only;
- heads are averaged, and a row holds the ``topk`` heaviest entries of that layer and step;
- there is no learned sink: ``sink_mass`` is 0, and what the first token draws is seen on entry 0.

What fell on entries beyond the top k is in no row. Such a trace has no index keys and no hidden
states, since there is no lightning indexer to make them: policies that need them refuse it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmsim.errors import FmsimError
from fmsim.trace.format import ENTRY_TOKENS, ModelInfo, Trace, TraceHeader
from fmsim.trace.recorder import TraceRecorder

WINDOW_TOKENS = 128
PROMPT_QUERIES = 1024
CHUNK_TOKENS = 512  # read at once while nothing is recorded
RECORDED_TOKENS = (
    64  # read at once while attention is materialised: [heads, 64, context] of one layer at a time
)
ATTENTION = "fmsim_pooled"


def pool(
    probs: torch.Tensor, first: int, window: int = WINDOW_TOKENS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of n queries at positions ``first``... : probs [heads, n, S] -> (entry mass [n, S
    // 4], window mass [n]).

    Entries that the query may not see yet, or that lie in its window, get 0. S must be the
    context's length, first + n.
    """
    mean = probs.float().mean(0)
    positions = torch.arange(first, first + len(mean), device=mean.device)[:, None]
    recent = torch.arange(mean.shape[1], device=mean.device)[None, :] > positions - window
    older = torch.where(recent, 0, mean)
    entries = mean.shape[1] // ENTRY_TOKENS
    return older[:, : entries * ENTRY_TOKENS].unflatten(1, (entries, ENTRY_TOKENS)).sum(
        -1
    ), torch.where(recent, mean, 0).sum(-1)


class Watcher:
    """Stands in for the attention of every layer; records pooled attention of the queries it is
    told to.
    """

    def __init__(self) -> None:
        self.keep: Callable[[int, int, torch.Tensor, torch.Tensor], None] | None = None

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """query [1, heads, n, d], key and value [1, kv_heads, S, d] -> output [1, n, heads, d];
        causal, the queries newest.
        """
        for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
            if options.get(name) is not None:
                raise FmsimError(
                    f"trace record --dense: this model's attention uses {name}, which is not plain"
                    " softmax attention; give another"
                )
        heads, tokens, context = query.shape[1], query.shape[2], key.shape[2]
        first = context - tokens
        group = heads // key.shape[1]
        key, value = key[0].repeat_interleave(group, 0), value[0].repeat_interleave(group, 0)
        causal = torch.ones(tokens, context, dtype=torch.bool, device=query.device).tril(first)
        if self.keep is None:
            output = torch.nn.functional.scaled_dot_product_attention(
                query[0], key, value, causal, scale=scaling
            )
        else:
            scores = (query[0] @ key.mT).float() * (
                query.shape[-1] ** -0.5 if scaling is None else scaling
            )
            probs = scores.masked_fill_(~causal, -torch.inf).softmax(-1)
            self.keep(module.layer_idx, first, *pool(probs, first))
            output = probs.to(value.dtype) @ value
        return output.transpose(0, 1)[None].contiguous(), None


def watch(model: Any) -> Watcher:
    """Route the attention of a transformers causal LM through a new Watcher."""
    from transformers import AttentionInterface

    watcher = Watcher()
    AttentionInterface.register(ATTENTION, watcher)
    model.set_attn_implementation(ATTENTION)
    return watcher


def record_dense(
    model: Any,
    tokens: Sequence[int],
    steps: int,
    *,
    name: str,
    prompt_text: str,
    sha256: str | None = None,
    topk: int = 64,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Trace:
    """Read ``tokens`` with a causal LM ``model``; its last ``steps`` tokens are decode steps, each
    the text's own next token.

    ``name`` and ``sha256`` say which weights, ``prompt_text`` which text. ``progress`` is told of
    tokens. Raises FmsimError where the model cannot read that many tokens, or its attention is not
    plain causal softmax.
    """
    prompt_tokens = len(tokens) - steps
    longest = getattr(model.config, "max_position_embeddings", len(tokens))
    if not 0 < prompt_tokens < len(tokens) <= longest:
        raise FmsimError(
            f"{name}: {len(tokens)} tokens of text for {steps} steps after a prompt; the model"
            f" reads {longest} at most: give a text longer than --steps, and a smaller --context if"
            " it is too long"
        )
    layers, queries = model.config.num_hidden_layers, min(PROMPT_QUERIES, prompt_tokens)
    header = TraceHeader(
        geometry=geometry(model.config, topk),
        model=ModelInfo(name=name, sha256=sha256, dtype=str(model.dtype).removeprefix("torch.")),
        source="dense_pooled",
        prompt_kind="continuation",
        prompt_text=prompt_text,
        prompt_tokens=prompt_tokens,
        prompt_mass_queries=queries,
        seed=0,
        device=str(model.device),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    recorder = TraceRecorder(header, steps, layers, topk)
    reading = _Reading(model, watch(model), progress)
    reading.read(tokens[: prompt_tokens - queries], CHUNK_TOKENS)
    reading.watcher.keep = lambda layer, first, mass, window_mass: recorder.prompt_mass(
        layer, mass.sum(0).cpu().numpy()
    )
    before = reading.read(tokens[prompt_tokens - queries : prompt_tokens], RECORDED_TOKENS)[-1:]

    def keep(layer: int, first: int, mass: torch.Tensor, window_mass: torch.Tensor) -> None:
        best = mass.topk(min(topk, mass.shape[1]), dim=1)
        ids = torch.where(best.values > 0, best.indices, -1)
        recorder.step(
            first - prompt_tokens,
            layer,
            ids.cpu().numpy(),
            best.values.cpu().numpy(),
            window_mass.cpu().numpy(),
            0.0,
        )

    reading.watcher.keep = keep
    logits = torch.cat([before, reading.read(tokens[prompt_tokens:], RECORDED_TOKENS)])[:-1]
    recorder.header = header.model_copy(
        update={"quality": _quality(logits, tokens[prompt_tokens:])}
    )
    return recorder.finish(np.array(tokens), np.ones(steps, bool))


def _quality(logits: torch.Tensor, tokens: Sequence[int]) -> dict[str, float]:
    """How well the model foretold the text it was made to read: logits [n, vocabulary] of
    ``tokens``.
    """
    wanted = torch.tensor(tokens, device=logits.device)
    loss = torch.nn.functional.cross_entropy(logits.float(), wanted)
    return {
        "nll_per_token": round(float(loss), 4),
        "greedy_agrees": round(float((logits.argmax(-1) == wanted).float().mean()), 4),
    }


class _Reading:
    """A model with its KV cache, fed piece by piece."""

    def __init__(self, model: Any, watcher: Watcher, progress: Callable[[int], None]):
        from transformers import DynamicCache

        self.model, self.watcher, self.progress = model, watcher, progress
        self.cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], chunk: int) -> torch.Tensor:
        """Read ``tokens``, ``chunk`` at once: logits [n, vocabulary]; those of a prompt that nobody
        asks about are left out.
        """
        logits = [torch.empty(0, self.model.config.vocab_size, device=self.model.device)]
        for begin in range(0, len(tokens), chunk):
            part = torch.tensor([list(tokens[begin : begin + chunk])], device=self.model.device)
            wanted = part.shape[1] if self.watcher.keep else 1
            logits.append(
                self.model(
                    part, past_key_values=self.cache, use_cache=True, logits_to_keep=wanted
                ).logits[0]
            )
            self.progress(part.shape[1])
        return torch.cat(logits)


def geometry(config: Any, topk: int) -> dict[str, Any]:
    """The trace header's description of a dense model: every layer stands as a CSA layer."""
    layers = config.num_hidden_layers
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "layer_types": ["full_attention"] * layers,
        "csa_layers": list(range(layers)),
        "compress_rates": {"full_attention": ENTRY_TOKENS},
        "window": WINDOW_TOKENS,
        "n_heads": config.num_attention_heads,
        "head_dim": (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        ),
        "index_topk": topk,
    }


def load_dense(place: Path, device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer) of a transformers directory or a GGUF file."""
    return load_model(place, device), load_tokenizer(place)


def load_model(place: Path, device: str = "cpu") -> Any:
    """The causal LM of a transformers directory or a GGUF file, from this disk only; float32 on a
    CPU, else bfloat16.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return _loaded(place, "AutoModelForCausalLM", dtype=dtype).to(device).eval()


def load_tokenizer(place: Path) -> Any:
    """The tokenizer of a transformers directory or a GGUF file, from this disk only."""
    return _loaded(place, "AutoTokenizer")


def _loaded(place: Path, kind: str, **options: Any) -> Any:
    import transformers

    if not place.exists():
        raise FmsimError(f"{place}: no such model; give a transformers directory or a .gguf file")
    is_file = not place.is_dir()
    if is_file:
        options["gguf_file"] = place.name
    try:
        return getattr(transformers, kind).from_pretrained(
            place.parent if is_file else place, local_files_only=True, **options
        )
    except ImportError as error:
        extra = "gguf" if is_file else "model"
        raise FmsimError(f"{place}: {error}; pip install 'fmsim[{extra}]'") from error
    except (OSError, ValueError) as error:
        hint = "; GGUF files need pip install 'fmsim[gguf]'" if is_file else ""
        raise FmsimError(
            f"{place}: transformers cannot load it: {str(error).splitlines()[0]}{hint}"
        ) from error


def weights_sha256(place: Path) -> str:
    """Over the GGUF file, or over a directory's safetensors files in the order of their names."""
    digest = hashlib.sha256()
    for path in [place] if place.is_file() else sorted(place.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
