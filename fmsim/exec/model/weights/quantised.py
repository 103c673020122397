"""Which weights of a model are float8, and modules that hold them so."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from fmsim.exec.kernels.weights import quantise, scale_shape
from fmsim.exec.model.experts import Experts
from fmsim.exec.model.projections import Float8Linear

# Matrices that the release has in bfloat16: transformers keeps these of a float8 checkpoint
# (`_keep_in_fp32_modules`), and the head.
NOT_FLOAT8 = re.compile(r"(compressor|indexer)\.(kv|gate)_proj$|scorer\.weights_proj$|lm_head$")


def published_float8(module: nn.Module) -> list[str]:
    """Names in ``module`` of what the release has in float8: projections of the attention, the
    indexer's queries, shared and routed experts.

    (Routed experts are released in 4 bits, with scales for 32 values; float8 with scales for 128 x
    128 is the nearest that is held here.)
    """
    return [
        name
        for name, part in module.named_modules()
        if isinstance(part, (nn.Linear, Experts)) and not NOT_FLOAT8.search(name)
    ]


def has_float8_rows(config: DeepseekV4Config) -> bool:
    """Whether a model's activations are float8 beside its float8 weights, as in the release."""
    quantised = getattr(config, "quantization_config", None) or {}
    return quantised.get("activation_scheme") == "dynamic"


def hold_float8(module: nn.Module, names: Collection[str], float8_rows: bool = False) -> None:
    """Make the named `nn.Linear`s `Float8Linear`s, and `Experts` hold float8 and scales, on their
    devices; what they hold is then to be filled.

    ``float8_rows``: as `Float8Linear` has it; experts' rows stay as they are.
    """
    for name in names:
        part = module.get_submodule(name)
        if isinstance(part, Experts):
            for kind in ("gate_up", "down"):
                weight = getattr(part, f"{kind}_proj")
                setattr(
                    part,
                    f"{kind}_proj",
                    nn.Parameter(
                        torch.empty_like(weight, dtype=torch.float8_e4m3fn), requires_grad=False
                    ),
                )
                setattr(
                    part,
                    f"{kind}_scale",
                    torch.empty(
                        scale_shape(weight.shape), dtype=torch.float32, device=weight.device
                    ),
                )
        else:
            parent, _, last = name.rpartition(".")
            setattr(
                module.get_submodule(parent),
                last,
                Float8Linear(part.in_features, part.out_features, part.weight.device, float8_rows),
            )


def float8_weights(module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Every float8 matrix [out, in] of ``module`` and its scales, those of experts one by one."""
    for part in module.modules():
        if isinstance(part, Float8Linear):
            yield part.weight, part.scale
        elif isinstance(part, Experts) and part.down_scale is not None:
            yield from zip(part.gate_up_proj.detach(), part.gate_up_scale, strict=True)
            yield from zip(part.down_proj.detach(), part.down_scale, strict=True)


def fill_float8(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Normal numbers of variance 1 / fan-in, quantised, in place and on their device."""
    for weight, scale in float8_weights(module):
        numbers = (
            torch.randn(weight.shape, device=weight.device, generator=generator)
            * weight.shape[1] ** -0.5
        )
        for held, made in zip((weight, scale), quantise(numbers), strict=True):
            held.copy_(made)
