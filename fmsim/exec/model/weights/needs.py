"""What a model directory will take, told before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DeepseekV4Config

from fmsim.errors import FmsimError
from fmsim.exec.model.cache import Cache
from fmsim.exec.model.config import read_config
from fmsim.exec.model.weights.loader import empty_model, extra_names
from fmsim.exec.model.weights.shards import Shards
from fmsim.units import gib


@dataclass(frozen=True)
class ModelNeeds:
    """Bytes of one decode, by where they lie, and what is there; ``skipped`` tensors are of
    multi-token prediction and not loaded.
    """

    device: str
    weight_bytes: int  # on the device, in the type that they are decoded in
    prompt_bytes: int  # on the device: what prompts and their continuations keep
    largest_bytes: int  # on the host: the largest stored tensor, read one at a time
    device_free_bytes: int
    host_free_bytes: int
    skipped: int

    def lines(self) -> list[str]:
        """For the user."""
        on_device = self.weight_bytes + self.prompt_bytes
        there = "GPU" if self.device.startswith("cuda") else "host"
        found = [
            f"weights {gib(self.weight_bytes)} and caches {gib(self.prompt_bytes)}:"
            f" {gib(on_device)} on the {there}, where {gib(self.device_free_bytes)} are free"
        ]
        if self.device.startswith("cuda"):
            found.append(
                f"on the host {gib(self.largest_bytes)} for the largest tensor while it is read,"
                f" and the policy's mirror; {gib(self.host_free_bytes)} are free"
            )
        if self.skipped:
            found.append(f"{self.skipped} tensors of multi-token prediction are not loaded")
        return found


def needs(
    directory: Path,
    device: str,
    lengths: Sequence[int],
    dtype: torch.dtype = torch.float32,
    beyond_positions: bool = False,
) -> ModelNeeds:
    """Of a decode of requests of ``lengths`` tokens each, prompt and continuation together.

    Raises FmsimError for a directory that cannot be loaded, or a request that is longer than the
    model's positions, unless ``beyond_positions``.
    """
    config = read_config(directory)
    if not beyond_positions:
        check_positions(directory, config, max(lengths))
    model = empty_model(directory, dtype)
    shards = Shards(directory)
    host_free = _host_free_bytes()
    on_gpu = device.startswith("cuda")
    return ModelNeeds(
        device=device,
        weight_bytes=sum(tensor.nbytes for tensor in model.state_dict().values()),
        prompt_bytes=sum(_cache_bytes(config, length, dtype) for length in lengths),
        largest_bytes=max(tensor.nbytes for tensor in model.state_dict().values()),
        device_free_bytes=torch.cuda.mem_get_info()[0] if on_gpu else host_free,
        host_free_bytes=host_free,
        skipped=len(extra_names(shards, config)),
    )


def check_positions(directory: Path, config: DeepseekV4Config, tokens: int) -> None:
    """Raise FmsimError where the model has fewer positions than ``tokens``."""
    if tokens > config.max_position_embeddings:
        raise FmsimError(
            f"{directory}: {tokens:,} tokens, but config.json has max_position_embeddings"
            f" {config.max_position_embeddings:,}; shorten --context or --steps, or say"
            " --beyond-positions"
        )


def _cache_bytes(config: DeepseekV4Config, length: int, dtype: torch.dtype) -> int:
    cache = Cache.allocate(config, 1, length, "meta", dtype)
    states = [state for layer in cache.layers for state in (layer.kv, layer.index) if state]
    return sum(state.entries.nbytes for state in states)


def _host_free_bytes() -> int:
    """Memory that the host has for new programs; 0 where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
        line = next(line for line in text.splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return 0
