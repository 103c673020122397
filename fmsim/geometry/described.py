"""A model described layer by layer: what a user writes for a model that fmsim does not know."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fmsim.errors import FmsimError
from fmsim.geometry.base import Geometry
from fmsim.geometry.layers import LayerSpec, check_references


class Described(BaseModel, Geometry):
    """Layer specs, and the figures that time and weights need.

    In a file an entry of ``layers`` may say ``repeat: 20`` for as many layers that are alike.
    ``weights_total_bytes`` are of all weights; where it is not given, one byte a parameter.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    family: str = "described"
    specs: tuple[LayerSpec, ...] = Field(min_length=1, alias="layers")
    hidden_size: int = Field(gt=0)
    n_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    index_n_heads: int = Field(0, ge=0)
    index_head_dim: int = Field(0, ge=0)
    vocabulary: int = Field(0, ge=0)
    dense_mlps: int = Field(0, ge=0)  # layers without routed experts
    parameters: int = Field(gt=0)
    parameters_of_a_token: int | None = Field(None, gt=0)
    expert_parameters: int = Field(0, ge=0)  # of the routed experts, of all `parameters`
    weights_total_bytes: float | None = Field(None, gt=0)
    table_bytes: float = Field(0.0, ge=0)  # of tables that tokens look up, all of them together
    max_positions: int | None = Field(None, gt=0)

    @field_validator("specs", mode="before")
    @classmethod
    def _repeated(cls, given: Any) -> Any:
        if not isinstance(given, (list, tuple)):
            return given
        layers: list[Any] = []
        for entry in given:
            if not isinstance(entry, Mapping):
                layers.append(entry)
                continue
            repeat = entry.get("repeat", 1)
            if type(repeat) is not int or not 1 <= repeat <= 1000:
                raise ValueError(f"repeat is {repeat!r}; give a whole number from 1 to 1000")
            rest = {key: value for key, value in entry.items() if key != "repeat"}
            layers += [rest] * repeat
        return layers

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_references(self.specs)
        if not any(layer.pages for layer in self.specs):
            raise ValueError("there is no sparse layer with entries, so nothing to page")
        return self

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        return self.specs

    @property
    def shared_parameters(self) -> int:
        """Everything but the routed experts."""
        return self.parameters - self.expert_parameters

    @property
    def active_parameters(self) -> int:
        if self.parameters_of_a_token is None:
            raise FmsimError(
                f"{self.name}: it is not known how many parameters a token uses, so no step time"
                " can be computed; describe the model with `parameters_of_a_token`"
            )
        return self.parameters_of_a_token

    def weight_bytes(self, n_gpus: int) -> float:
        return (self.weights_total_bytes or self.parameters) / n_gpus

    @cached_property
    def window_tokens(self) -> int:
        return max(layer.window_tokens for layer in self.layers)

    def _values(self, name: str) -> list[int]:
        """Different ones of the layers that page, ascending."""
        return sorted({getattr(layer, name) for layer in self.layers if layer.pages})

    def _same(self, name: str) -> int:
        """What all layers that page have in common; FmsimError where they differ."""
        values = self._values(name)
        if len(values) == 1:
            return values[0]
        raise FmsimError(
            f"{self.name}: its sparse layers have {name} of {' and '.join(map(str, values))}, and"
            " fmsim counts with one; `fmsim model show` has sizes and what fits"
        )

    def check_replayable(self) -> None:
        rates = self._values("entry_tokens")
        if len(rates) > 1:
            raise FmsimError(
                f"{self.name}: its sparse layers have entries of"
                f" {' and '.join(map(str, rates))} tokens, and a trace has entries of one length;"
                f" without a trace, `fmsim run --model {self.name}` has footprints, walls and the"
                " full cache's time, and `fmsim plan` policies"
            )

    def on_gpu(self, tensor_parallel: int) -> Described:
        parts = self.kv_parts(tensor_parallel)
        if parts == 1:
            return self
        heads = [layer.kv_heads for layer in self.layers]
        layers = tuple(
            layer.model_copy(
                update={
                    "entry_bytes": -(-layer.entry_bytes // parts),
                    "window_bytes": -(-layer.window_bytes // parts),
                    "kv_heads": -(-held // parts),
                }
            )
            for layer, held in zip(self.layers, heads, strict=True)
        )
        split = {"layers": layers, "n_heads": -(-self.n_heads // parts)}
        return Described.model_validate(self.model_dump(by_alias=True) | split)

    @cached_property
    def csa_rate(self) -> int | float:
        if len(self._values("entry_tokens")) == 1:
            return self._same("entry_tokens")
        return self.n_csa / sum(n / rate for rate, n in self._rates.items())

    @cached_property
    def kv_entry_bytes(self) -> int:
        return self._same("entry_bytes")

    @cached_property
    def index_topk(self) -> int:
        return self._same("topk")

    @cached_property
    def index_key_bytes(self) -> int:
        return max(layer.key_bytes for layer in self.layers)

    @cached_property
    def hca_rate(self) -> int:
        rates = {layer.entry_tokens for layer in self.layers if layer.kind == "dense"}
        return rates.pop() if len(rates) == 1 else 1


def from_description(described: Mapping[str, Any], name: str = "") -> Described:
    """The geometry that a mapping of `Described`'s keys gives.

    Raises ValueError that names the key.
    """
    if not isinstance(described, Mapping):
        raise ValueError("it is not a mapping of keys")
    try:
        return Described.model_validate({"name": name or "described", **described})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the model"
        raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
