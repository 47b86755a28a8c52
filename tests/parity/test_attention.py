"""Packed attention against a masked reference in plain loops, and the CUDA kernel against the CPU path."""

from __future__ import annotations

import pytest
import torch

from dsmoe_vl.config.model import ModelConfig
from dsmoe_vl.model import attention
from dsmoe_vl.model.attention import SegmentLayout, segment_attention
from dsmoe_vl.model.layers import RMSNorm
from dsmoe_vl.model.rotary import Rotary
from dsmoe_vl.model.rotation import rotate


def _reference(q, k, v, lengths, causal):
    out, start = [], 0
    repeat = q.shape[1] // k.shape[1]
    for length in lengths:
        rows = slice(start, start + length)
        for head in range(q.shape[1]):
            scores = q[rows, head] @ k[rows, head // repeat].T / q.shape[-1] ** 0.5
            if causal:
                scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
            out.append(scores.softmax(-1) @ v[rows, head // repeat])
        start += length
    blocks = [torch.stack(out[i : i + q.shape[1]], dim=1) for i in range(0, len(out), q.shape[1])]
    return torch.cat(blocks)


@pytest.mark.parametrize("with_kernel", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[5], [7, 7, 7], [20, 30], [3, 40, 1, 17, 40, 9, 100], [1, 1]])
def test_matches_reference_forward_and_backward(lengths, causal, with_kernel, monkeypatch):
    torch.manual_seed(0)
    if not with_kernel:
        monkeypatch.setattr(attention, "has_attention", lambda x: False)
    elif not attention.has_attention(torch.ones(1)):
        pytest.skip("no C compiler, or several threads: attention's kernel not checked")
    total = sum(lengths)
    inputs = [torch.randn(total, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    cumulative = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    ours = segment_attention(*inputs, SegmentLayout(cumulative, max(lengths)), causal)
    theirs = _reference(*inputs, lengths, causal)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((theirs * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the variable-length CUDA kernel was not checked")
@pytest.mark.parametrize("causal", [True, False])
def test_cuda_kernel_matches_cpu_path(causal):
    torch.manual_seed(0)
    lengths = [3, 40, 1, 17, 40, 9, 130]
    inputs = [torch.randn(sum(lengths), heads, 64) for heads in (4, 2, 2)]
    cumulative = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        moved = [x.to(device, dtype).requires_grad_() for x in inputs]
        layout = SegmentLayout(cumulative.to(device), max(lengths))
        out = segment_attention(*moved, layout, causal)
        results.append([x.float().cpu() for x in (out, *torch.autograd.grad(out.float().square().sum(), moved))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-2, atol=6e-2)


def test_rms_norm_equals_pytorch():
    torch.manual_seed(0)
    x, norm = torch.randn(5, 3, 16, requires_grad=True), RMSNorm(16)
    torch.nn.init.normal_(norm.weight)
    ours, theirs = norm(x), torch.nn.functional.rms_norm(x, (16,), norm.weight, norm.eps)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (x, norm.weight)),
        torch.autograd.grad((theirs * weight).sum(), (x, norm.weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rotation_depends_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    rotary = Rotary(ModelConfig(width=16, heads=1, kv_heads=1))

    def score(at_q, at_k):
        turned = [rotate(x, rotary(torch.tensor([p]))) for x, p in ((q, at_q), (k, at_k))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(score(3, 1), score(3, 2))
