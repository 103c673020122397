"""Every kernel of training gives what plain torch gives, values and gradients."""

import pytest
import torch
from kernel_pools import on_each_device

pytest.importorskip("triton", reason="Triton is not installed: it exists for Linux only")

from fmsim.exec.whole import attention, device, fused, index_scores
from fmsim.exec.whole.sinkhorn import sinkhorn

T, R, D = 37, 4, 24  # tokens, streams, width: none a multiple of a block


def made(*shape, positive=False):
    number = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return number.abs() + 0.1 if positive else number


def turns(like):
    angles = 9 * made(T, 3).to(like.device)
    return angles.cos(), angles.sin()


def visible(batch, tokens):
    return ((torch.arange(tokens) + 1) // 4).int().expand(batch, tokens).contiguous()


def chosen(batch, tokens, count):
    generator = torch.Generator().manual_seed(0)
    seen = visible(batch, tokens).flatten().tolist()
    rows = [torch.randperm(n, generator=generator)[:count].sort().values for n in seen]
    padded = [torch.nn.functional.pad(row, (0, count - len(row)), value=-1) for row in rows]
    return torch.stack(padded).int().view(batch, tokens, count)


Q, KV, SINKS, ENTRIES = made(2, 50, 6, 16), made(2, 50, 16), made(6), made(2, 12, 16)
IDS, SEEN = chosen(2, 50, 5), visible(2, 50)


def in_range(q, kv, sinks, entries):
    return attention.attend(q, kv, 8, sinks, entries, SEEN.to(q.device))[0]


def of_chosen(q, kv, sinks, entries):
    return attention.attend(q, kv, 8, sinks, entries, None, IDS.to(q.device))[0]


CASES = {
    "mixes": (lambda s, f: fused.mixes(s, f, 1e-6), made(T, R, D), made(24, R * D)),
    "read": (fused.read, made(T, R, D), made(T, R)),
    "leave": (fused.leave, made(T, R, D), made(T, D), made(T, R), made(T, R, R)),
    "norm": (lambda x, w: fused.norm_rotate(x, w, 1e-6), made(T, D), made(D)),
    "norm, turned": (lambda x, w: fused.norm_rotate(x, w, 1e-6, turns(x)), made(T, D), made(D)),
    "norm of heads": (lambda x: fused.norm_rotate(x, None, 1e-6, turns(x)), made(T, 5, D)),
    "turned back": (lambda x: fused.norm_rotate(x, None, None, turns(x), True), made(T, 5, D)),
    "gated": (lambda g, s: fused.gated(8 * g, s, 3.0), made(T, 5, 20), made(T, 5)),
    "window": (lambda q, kv, s: attention.attend(q, kv, 8, s)[0], Q, KV, SINKS),
    "range": (in_range, Q, KV, SINKS, ENTRIES),
    "chosen": (of_chosen, Q, KV, SINKS, ENTRIES),
    "scores": (
        lambda q, w, k: index_scores.index_scores(q, w, k, SEEN.to(q.device)),
        made(2, 50, 3, 16), made(2, 50, 3), made(2, 12, 16),
    ),
    "sinkhorn": (lambda m: sinkhorn(m, 6, 1e-6), made(70, 4, 4, positive=True)),
}  # fmt: skip


@on_each_device
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_gives_what_torch_gives(case, device, monkeypatch):
    function, *inputs = CASES[case]
    monkeypatch.setattr(fused, "NORM_PROGRAMS", 2)
    found = []
    for kernels in (True, False):
        monkeypatch.setattr("fmsim.exec.whole.device.runs_kernels", lambda tensor, on=kernels: on)
        given = [part.to(device).clone().requires_grad_() for part in inputs]
        out = function(*given)
        (out * made(*out.shape).to(device)).sum().backward()
        found.append([out.detach(), *(part.grad for part in given)])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


@on_each_device
def test_the_indexers_target_is_the_softmax_over_what_is_visible(device, monkeypatch):
    near, shares = made(2, 50, 6), []
    given = [part.to(device) for part in (Q, ENTRIES, SEEN, near)]
    for kernels in (True, False):
        monkeypatch.setattr("fmsim.exec.whole.device.runs_kernels", lambda tensor, on=kernels: on)
        shares.append(attention.attention_over_entries(*given))
    assert (shares[0] - shares[1]).abs().max() < 1e-6
    assert (shares[0][:, 0] == 0).all() and (shares[0].sum(-1) < 1).all()


def test_the_interpreter_runs_kernels_where_there_is_no_gpu():
    assert device.runs_kernels(torch.zeros(1))
