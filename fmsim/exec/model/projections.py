"""Projections beyond `nn.Linear`: with float8 weights, in groups, and several of one input joined
into one product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fmsim.exec.kernels.norms.norm_rope import norm_rope
from fmsim.exec.kernels.norms.rms_norm import rms_norm
from fmsim.exec.kernels.norms.rounded_rows import Activations, wide_rows
from fmsim.exec.kernels.products import one_row
from fmsim.exec.kernels.products.in_turns import HeadTurn
from fmsim.exec.kernels.products.linear import are_rounded, grouped_product
from fmsim.exec.kernels.products.linear import linear as multiply
from fmsim.exec.kernels.products.mixing import Due
from fmsim.exec.kernels.weights import BLOCK, dequantise, scale_shape


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A projection without a bias, as all of DeepSeek-V4 are."""
    return nn.Linear(inputs, outputs, bias=False)


class Float8Linear(nn.Module):
    """`nn.Linear` without a bias, its ``weight`` float8_e4m3fn [out, in] with ``scale`` float32
    [ceil(out / 128), ceil(in / 128)].

    With ``float8_rows`` more than a few rows are rounded to float8 first, as DeepSeek's release
    does (`kernels.products.linear`). On a GPU a kernel reads the float8 weights; elsewhere they are
    widened at each call.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        float8_rows: bool = False,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.float8_rows = float8_rows
        self.register_buffer(
            "weight",
            torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn, device=device),
        )
        self.register_buffer(
            "scale", torch.empty(scale_shape(self.weight.shape), dtype=torch.float32, device=device)
        )

    def forward(self, x: Activations) -> Tensor:
        return multiply(x, self.weight, self.scale, float8_rows=self.float8_rows)


Projection = nn.Linear | Float8Linear


def takes_float8(rows: int, *projections: Projection, groups: int = 1) -> bool:
    """Whether all the projections round so many rows: then who makes them may do it once."""
    return all(
        isinstance(projection, Float8Linear)
        and projection.float8_rows
        and are_rounded(rows, projection.weight, groups)
        for projection in projections
    )


def normed(x: Tensor, norm: nn.Module, *projections: Projection) -> Activations:
    """``norm`` (`model.RMSNorm`) of x [..., in], as the projections take it."""
    if takes_float8(x.shape[:-1].numel(), *projections):
        return rms_norm(x, norm, rounded=True)
    return norm(x)


def grouped(x: Activations, projection: Projection, groups: int) -> Tensor:
    """x [..., groups * in] -> [..., out]: group g of the projection's rows [out, in] times the g-th
    slice of x.
    """
    if isinstance(projection, Float8Linear):
        return multiply(x, projection.weight, projection.scale, groups, projection.float8_rows)
    return grouped_product(x, projection.weight.to(x.dtype), groups)


def wide_weight(projection: Projection) -> Tensor:
    """float32 [out, in]."""
    weight = projection.weight.detach()
    return (
        dequantise(weight, projection.scale)
        if isinstance(projection, Float8Linear)
        else weight.float()
    )


class Joined:
    """Several projections of one input: one product for each type of weight.

    Call it with the input for their outputs, in order, as views; with a norm, of what it makes of
    the input.

    Made from projections whose weights it moves into one tensor, of which theirs become views; made
    again, it finds them there. A CUDA graph that was captured before the move would read where they
    no longer are.
    """

    def __init__(self, projections: Sequence[Projection]):
        kinds: dict[tuple, list[int]] = {}
        for number, projection in enumerate(projections):
            # its last scale would be shared with the next
            alone = isinstance(projection, Float8Linear) and projection.out_features % BLOCK
            kinds.setdefault((projection.weight.dtype, number if alone else None), []).append(
                number
            )
        self.products = [
            (numbers, joined([projections[number] for number in numbers]))
            for numbers in kinds.values()
        ]
        self.sizes = [projection.out_features for projection in projections]

    def __call__(
        self, x: Activations, norm: nn.Module | None = None, due: Due | None = None
    ) -> list[Tensor]:
        """``due`` gates are worked out beside one row's, where no norm comes before."""
        wide = wide_rows(x)
        alone = all(one_row.takes(wide, whole.weight) for _, whole in self.products)
        if norm is not None and not alone:
            x = wide = rms_norm(wide, norm)
        outs = (
            self._of_one_row(wide, norm, due)
            if alone
            else [
                whole(x) if isinstance(whole, Float8Linear) else one_row.product(wide, whole.weight)
                for _, whole in self.products
            ]
        )
        found: dict[int, Tensor] = {}
        for (numbers, _), out in zip(self.products, outs, strict=True):
            sizes = [self.sizes[number] for number in numbers]
            found |= zip(numbers, out.split(sizes, -1), strict=True)
        return [found[number] for number in range(len(self.sizes))]

    def turned(self, x: Activations, norm: nn.Module | None, turn: HeadTurn) -> Tensor:
        """Of one projection, after a norm as `__call__`: its outputs [B, H, C] in heads, after
        RoPE.
        """
        [(_, whole)] = self.products
        head = turn.head
        if isinstance(x, Tensor) and one_row.turns(x, whole.weight, head):
            out = one_row.one_row_triton(x, whole.weight, whole.scale, norm=norm, turn=turn)
            return out.view(-1, whole.out_features // head, head)
        [out] = self(x, norm)
        return norm_rope(out.view(-1, whole.out_features // head, head), turn[:2])

    def _of_one_row(self, x: Tensor, norm: nn.Module | None, due: Due | None) -> list[Tensor]:
        """Two in one launch, where no norm comes before."""
        weights = [whole.weight for _, whole in self.products]
        scales = [getattr(whole, "scale", None) for _, whole in self.products]
        if len(weights) == 2 and norm is None:
            return one_row.two_rows_triton(x, weights, scales, due=due)
        # a launch alongside may write where the gates beside the first one still read
        together = due is None or due.empty
        return [
            one_row.one_row_triton(x, *of, norm=norm, alongside=together and number > 0, due=due)
            for number, of in enumerate(zip(weights, scales, strict=True))
        ]


def joined(projections: Sequence[Projection]) -> Projection:
    """One projection with all their rows.

    They must be of one type, and all but the last float8 ones of whole scale blocks.
    """
    first, outputs = projections[0], sum(projection.out_features for projection in projections)
    if isinstance(first, Float8Linear):
        whole = Float8Linear(first.in_features, outputs, "meta", first.float8_rows)
        whole.scale = _one_tensor([projection.scale for projection in projections])
        whole.weight = _one_tensor([projection.weight for projection in projections])
    else:
        whole = nn.Linear(first.in_features, outputs, bias=False, device="meta")
        whole.weight = nn.Parameter(
            _one_tensor([projection.weight for projection in projections]), requires_grad=False
        )
    return whole


def _one_tensor(parts: Sequence[Tensor]) -> Tensor:
    """Matrices of one width -> all their rows in one tensor.

    The parts become views of it, unless they are already.
    """
    first, rows = parts[0], [len(part) for part in parts]
    width, start = first.shape[1], first.storage_offset()
    places = [start + sum(rows[:number]) * width for number in range(len(parts))]
    storage = first.untyped_storage().data_ptr()
    together = all(
        part.untyped_storage().data_ptr() == storage and part.storage_offset() == place
        for part, place in zip(parts, places, strict=True)
    )
    if not together:
        with torch.inference_mode(first.is_inference()), torch.no_grad():
            whole = first.new_empty(sum(rows), width)
            for part, view in zip(parts, whole.split(rows), strict=True):
                view.copy_(part)
                part.data = view
    return torch.empty(0, dtype=first.dtype, device=first.device).set_(
        first.untyped_storage(), first.storage_offset(), (sum(rows), width), (width, 1)
    )
