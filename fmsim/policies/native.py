"""The model's own indexer, held for a window."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from fmsim.indexer import checkpoint, native
from fmsim.indexer.checkpoint import Checkpoint
from fmsim.policies.base import Context
from fmsim.policies.lsa import LSA


class Native(LSA):
    """Keep what the model's own lightning indexer scores highest at a window's start.

    Source: the native indexer of DeepSeek-V4 (transformers' `DeepseekV4Indexer`) in the place of
    the trained one of arXiv 2606.09079: what an indexer that knows only the present token is worth
    for a window. Each layer goes by its own scores, without a threshold. All index keys stay on the
    GPU. The model's weights are read; they must be those that the trace was recorded from.
    """

    name = "native"
    evidence = "current_query"
    decision_scope = "layer"

    class Params(LSA.Params):
        checkpoint: Path | None = Field(
            None, description="folder of the model that the trace is of; by default nano's"
        )
        scope: Literal["per_layer"] = Field("per_layer", description="each layer its own set")
        sees: Literal["all"] = Field("all", description="it scores all entries in every layer")
        page_rank: Literal["max"] = Field("max", description="pages go by their best entry")

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        self.floor = None

    def _load(self) -> Checkpoint:
        return native.of_model(self.params.checkpoint or checkpoint.SHIPPED.parent)
