"""The kernels for CPUs against PyTorch's operators in float64, and what happens without them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from dsmoe_vl.cpu_kernels import library, operators
from dsmoe_vl.model.attention import Attention, SegmentLayout
from dsmoe_vl.model.layers import RMSNorm, SwiGLU
from dsmoe_vl.model.rotation import rotate
from tests.distributed.ranks import cpu_environment

pytestmark = pytest.mark.skipif(library.library() is None, reason="no C compiler: the kernels for CPUs not checked")
EPS = 1e-6


def same(ours, theirs, inputs, scale=1.0):
    """Values and gradients equal those in float64 to float32's precision."""
    torch.manual_seed(1)
    grad = torch.randn(ours.shape)
    found = torch.autograd.grad(ours, inputs, grad)
    expected = torch.autograd.grad(theirs, inputs, grad.double())
    for a, b in zip((ours, *found), (theirs, *expected), strict=True):
        assert a.dtype == torch.float32
        size = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-6, atol=2e-6 * max(size, 0.1) * scale)


@pytest.mark.parametrize("shape", [(1, 8), (64, 192), (65, 7), (300, 128), (3, 5, 16), (0, 8), (2, 1)])
def test_rms_norm(shape):
    torch.manual_seed(0)
    x, weight = (3 * torch.randn(shape)).requires_grad_(), torch.randn(shape[-1], requires_grad=True)
    theirs = F.rms_norm(x.double(), weight.shape, weight.double(), EPS)
    same(operators.rms_norm(x, weight, EPS), theirs, (x, weight), scale=shape[0] ** 0.5)


@pytest.mark.parametrize("shape", [(1, 2), (5, 14), (64, 512), (3, 5, 34), (0, 8)])
def test_swiglu(shape):
    torch.manual_seed(0)
    x = (4 * torch.randn(shape)).requires_grad_()
    gate, up = x.double().chunk(2, dim=-1)
    same(operators.swiglu(x), F.silu(gate) * up, (x,))
    parts = [part.clone() for part in x.chunk(2, dim=-1)]
    assert operators.silu_product(*parts).equal(operators.swiglu(x))
    same(operators.silu_product(*parts), F.silu(gate) * up, (x,))


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize(
    ("rows", "heads", "keys", "width"), [(1, 1, 1, 2), (65, 6, 2, 32), (130, 4, 4, 6), (0, 2, 1, 8)]
)
def test_heads(rows, heads, keys, width, with_norm):
    torch.manual_seed(0)
    packed = torch.randn(rows, heads + 2 * keys, width, requires_grad=True)
    weights = [torch.randn(width, requires_grad=True) if with_norm else None for _ in range(2)]
    angles = 10 * torch.randn(rows, 1, width // 2)
    turn = torch.polar(torch.full_like(angles, 1.1), angles)
    ours = operators.rotated_heads(packed, *weights, turn, heads, EPS)
    queries, keys_, values = packed.double().split((heads, keys, keys), dim=1)

    def turned(x, weight):
        x = x if weight is None else F.rms_norm(x, weight.shape, weight.double(), EPS)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn.to(torch.cdouble)).flatten(-2)

    theirs = torch.cat((turned(queries, weights[0]), turned(keys_, weights[1]), values), dim=1)
    same(ours, theirs, [x for x in (packed, *weights) if x is not None], scale=max(1, rows * heads) ** 0.5)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (65, 33), (200, 256)])
def test_rows_of_experts(rows, width, monkeypatch):
    """And the operators that take the kernels' place, in the same buffers."""
    torch.manual_seed(0)
    gate, up, grad = (2 * torch.randn(rows, width) for _ in range(3))
    scale = torch.rand(rows)
    wide = [x.double().requires_grad_() for x in (gate, up, scale)]
    value = F.silu(wide[0]) * wide[1] * wide[2].unsqueeze(1)
    expected = [value.detach(), *torch.autograd.grad(value, wide, grad.double())]
    plain = F.silu(gate.double()) * up.double()
    for threads in (operators._THREADS, 0):
        monkeypatch.setattr(operators, "_THREADS", threads)
        assert operators.has_kernels(gate) == bool(threads)
        ours = operators.swiglu_rows(gate, up, torch.empty_like(gate))
        torch.testing.assert_close(ours.double(), plain, rtol=2e-6, atol=1e-7)
        hidden, found = grad.clone(), [torch.empty_like(gate), torch.empty_like(up), torch.empty_like(scale)]
        operators.swiglu_rows_gradients(hidden, gate, up, scale, *found)
        *found, of_scale = hidden, *found
        for a, b in zip(found, expected[:-1], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-5)
        # A sum is known to the rounding of its terms: here both, ours and PyTorch's, are off by up to 4e-5.
        terms = (grad.double() * plain).abs().sum(1)
        assert ((of_scale - expected[-1]).abs() <= torch.finfo(torch.float32).eps * terms).all()


def test_what_is_not_finite_stays_so():
    """A step whose loss is not finite is skipped: a kernel must not hide it."""
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(3, 8)
        x[1, 2] = value
        normal = operators.rms_norm(x, torch.ones(8), EPS)
        active = operators.swiglu(x)
        turned = operators.rotated_heads(
            x.view(3, 4, 2), torch.ones(2), torch.ones(2), torch.ones(3, 1, 1, dtype=torch.complex64), 2, EPS
        )
        for out in (normal, active, turned):
            assert not out[1].isfinite().all() and out[[0, 2]].isfinite().all()


def test_large_numbers_are_those_of_pytorch():
    gate = torch.tensor([-200.0, -90.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 90.0, 200.0, 1e30])
    x = torch.cat((gate, torch.ones_like(gate))).unsqueeze(0)
    torch.testing.assert_close(operators.swiglu(x)[0], F.silu(gate), rtol=1e-6, atol=1e-30)


def test_small_numbers_are_kept():
    """A library that was compiled for fast arithmetic would round them to zero in the whole process."""
    operators.swiglu(torch.ones(1, 2))
    assert (torch.tensor([2e-40]) * 0.5).item() > 0


def attention_in_float64(packed, lengths, heads, causal):
    parts = []
    for rows in packed.double().split(lengths):
        keys = (rows.shape[1] - heads) // 2
        q, k, v = rows.transpose(0, 1).split((heads, keys, keys))
        k, v = (x.repeat_interleave(heads // keys, dim=0) for x in (k, v))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("lengths", "heads", "keys", "width"),
    [
        ([1], 1, 1, 1),
        ([64] * 3, 4, 4, 32),
        ([14, 26, 26], 6, 2, 32),
        ([0, 5, 0, 47, 48, 49, 0], 6, 3, 20),
        ([6, 12, 200], 8, 1, 7),
        ([31, 33], 2, 2, 80),
        ([513], 2, 1, 64),
        ([0], 2, 1, 8),
    ],
)
def test_attention(lengths, heads, keys, width, causal):
    torch.manual_seed(0)
    packed = (1.5 * torch.randn(sum(lengths), heads + 2 * keys, width)).requires_grad_()
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    ours = operators.attention(packed, bounds, heads, causal)
    same(ours, attention_in_float64(packed, lengths, heads, causal), (packed,), scale=4)


def test_attention_of_large_scores_and_of_what_is_not_finite():
    torch.manual_seed(0)
    packed, bounds = torch.randn(24, 3, 16), torch.tensor([0, 8, 16, 24], dtype=torch.int32)
    packed[:8] *= 60  # scores of thousands: one key takes all
    packed.requires_grad_()
    out = operators.attention(packed, bounds, 1, True)
    torch.testing.assert_close(out.double(), attention_in_float64(packed, [8] * 3, 1, True), rtol=1e-3, atol=1e-3)
    packed.data[11, 1, 3] = float("nan")  # a key, which the queries from there on see
    out = operators.attention(packed, bounds, 1, True)
    assert out.isnan().flatten(1).any(1).nonzero().flatten().tolist() == list(range(11, 16))
    (grad,) = torch.autograd.grad(out.sum(), packed)
    assert grad[:8].isfinite().all() and grad[16:].isfinite().all() and grad[11:16].isnan().any()


@pytest.mark.parametrize("bounds", [[0, 8], [1, 9], [0, 10]])
def test_attention_refuses_bounds_of_other_rows(bounds):
    with pytest.raises(AssertionError, match="segments of other rows"):
        operators.attention(torch.randn(9, 3, 4), torch.tensor(bounds, dtype=torch.int32), 1, True)


def test_what_is_not_contiguous(monkeypatch):
    torch.manual_seed(0)
    wide = torch.randn(9, 3, 16)
    weight = torch.ones(16)
    torch.testing.assert_close(operators.rms_norm(wide[:, 1], weight, EPS), F.rms_norm(wide[:, 1], (16,), weight, EPS))
    x = torch.randn(16, 9, requires_grad=True)
    (ours,) = torch.autograd.grad(operators.swiglu(x.t()).t().sum(0), x, torch.ones(9))
    monkeypatch.setattr(operators, "_THREADS", 0)
    gate, up = x.t().chunk(2, dim=-1)
    (theirs,) = torch.autograd.grad((F.silu(gate) * up).t().sum(0), x, torch.ones(9))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("qk_norm", ["head", "width", "none"])
def test_modules_are_the_same_with_and_without(qk_norm, monkeypatch):
    torch.manual_seed(0)
    attention = Attention(24, 3, 1, causal=True, head_width=8, qk_norm=qk_norm)
    feed_forward, norm = SwiGLU(24, 40), RMSNorm(24)
    for parameter in (*attention.parameters(), *feed_forward.parameters(), *norm.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    layout = SegmentLayout(torch.tensor([0, 4, 11, 13], dtype=torch.int32), 7)
    angles = torch.randn(13, 1, 4)
    inputs = [torch.randn(13, 24, requires_grad=True)]
    inputs += [*attention.parameters(), *feed_forward.parameters(), *norm.parameters()]
    results = []
    for threads in (operators._THREADS, 0):
        monkeypatch.setattr(operators, "_THREADS", threads)
        x = inputs[0]
        out = feed_forward(norm(x + attention(norm(x), torch.polar(torch.ones_like(angles), angles), layout)))
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_half_precision_and_many_threads_are_left_to_pytorch():
    assert not operators.has_kernels(torch.ones(1, dtype=torch.bfloat16))
    assert not operators.has_kernels(torch.ones(1, device="meta"))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(operators._THREADS + 1)
        assert not operators.has_kernels(torch.ones(1))
    finally:
        torch.set_num_threads(before)


TRY = """
import torch
from dsmoe_vl.cpu_kernels import library, operators
print(operators.has_kernels(torch.ones(1)))
print(operators.has_kernels(torch.ones(1)))
print(library._compiled() if library.library() else "")
"""


def attempt(**environment):
    return subprocess.run(
        [sys.executable, "-c", TRY], env=cpu_environment() | environment, capture_output=True, text=True, timeout=120
    )


def test_without_a_compiler_it_is_said_once():
    found = attempt(CC="no-such-compiler")
    assert found.stdout.split() == ["False", "False"] and found.returncode == 0
    assert found.stderr.count("PyTorch's own operators run, which are slower: no C compiler (no-such-compiler)") == 1


def test_a_compiler_that_fails_is_quoted(tmp_path):
    bad = tmp_path / "cc"
    bad.write_text("#!/bin/sh\necho 'cc: unknown option' >&2\nexit 1\n")
    bad.chmod(0o755)
    found = attempt(CC=str(bad), TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert "False" in found.stdout and "slower: cc: unknown option" in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cc"]


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    found = attempt(TORCH_EXTENSIONS_DIR=str(tmp_path / "file" / "below"), TMPDIR=str(tmp_path))
    assert found.stdout.split()[:2] == ["True", "True"] and not found.stderr.count("slower")


def test_it_is_compiled_once(tmp_path):
    first, second = attempt(TORCH_EXTENSIONS_DIR=str(tmp_path)), attempt(TORCH_EXTENSIONS_DIR=str(tmp_path))
    (built,) = tmp_path.iterdir()
    assert built.name.endswith(".so") and str(built) in first.stdout and str(built) in second.stdout


def test_rotations_alone_agree():
    """`rotate`, which evaluation with a cache uses, and the kernel."""
    torch.manual_seed(0)
    packed, angles = torch.randn(5, 4, 8), torch.randn(5, 1, 4)
    turn = torch.polar(torch.ones_like(angles), angles)
    ours = operators.rotated_heads(packed, None, None, turn, 2, EPS)
    torch.testing.assert_close(ours[:, :3], rotate(packed[:, :3], turn))
