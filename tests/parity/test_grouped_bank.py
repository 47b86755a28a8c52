"""The experts as a GPU computes them, on a CPU, against the experts operator by operator."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from dsmoe_vl.moe.experts import Experts
from dsmoe_vl.moe.grouped_bank import ROWS_OF_A_GROUP, Groups, grouped_bank
from dsmoe_vl.moe.rows import Assignments
from dsmoe_vl.moe.swiglu import swiglu, swiglu_gradients
from tests.distributed.ranks import cpu_environment
from tests.parity.test_expert_bank import EXPERTS, WIDTH, ByOperator, both, choices


@pytest.mark.parametrize(("tokens", "top_k"), [(33, 3), (33, 1), (1, 2)])
@pytest.mark.parametrize("trains", ["everything", "weights", "rows and gates", "rows"])
def test_values_and_gradients(tokens, top_k, trains):
    module = both()[0]
    assignments = Assignments.of(choices(tokens, top_k), EXPERTS)
    x, gates, direction = torch.randn(tokens, WIDTH), torch.rand(tokens * top_k), torch.randn(tokens, WIDTH)
    gates[: tokens // 2 * top_k : top_k] = 0  # as of a dropped assignment
    x.requires_grad_(trains != "weights"), gates.requires_grad_("gates" in trains or trains == "everything")
    module.requires_grad_(trains in ("everything", "weights"))
    found = []
    for out in (
        module(x, gates, assignments),
        grouped_bank(x, gates, (module.w1, module.w2, module.w3), assignments),
    ):
        inputs = [value for value in (x, gates, *module.parameters()) if value.requires_grad]
        found.append([out, *torch.autograd.grad((out * direction).sum(), inputs)])
    for one, other in zip(*found, strict=True):
        assert other.dtype == one.dtype
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_bfloat16():
    torch.manual_seed(0)
    experts, found = ByOperator(EXPERTS, 16, 24), []  # the product wants rows of 16 bytes
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assignments = Assignments.of(choices(60, 3), EXPERTS)
    x, gates = torch.randn(60, 16), torch.rand(180)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [value.detach().to(dtype).requires_grad_() for value in (x, gates, *experts.parameters())]
        out = grouped_bank(*inputs[:2], tuple(inputs[2:]), assignments)
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for one, other in zip(*found, strict=True):
        assert other.dtype == torch.bfloat16
        torch.testing.assert_close(other.float(), one, rtol=0.05, atol=0.03 * float(one.detach().abs().max()))


def test_groups_start_where_the_kernel_wants_them():
    counts = torch.tensor([5, 0, 17, 8, 3])
    groups = Groups.of(counts, 33)
    assert groups.ends.tolist() == [8, 8, 32, 40, 48] and groups.size == 33 + 5 * ROWS_OF_A_GROUP
    starts = [0, 8, 8, 32, 40]
    rows = [
        place for start, count in zip(starts, counts.tolist(), strict=True) for place in range(start, start + count)
    ]
    assert groups.places.tolist() == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_against_autograd(dtype):
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(13, 37).to(dtype).requires_grad_() for _ in range(3))
    scale = torch.rand(13, requires_grad=True)
    out = F.silu(gate.float()) * up * scale.unsqueeze(1)
    theirs = [out, *torch.autograd.grad((out * grad).sum(), (gate, up, scale))]
    ours = swiglu_gradients(grad.detach(), gate.detach(), up.detach(), scale.detach())
    torch.testing.assert_close(swiglu(gate.detach(), up.detach(), scale.detach()), theirs[0].to(dtype))
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(other, one.to(other.dtype))


KERNELS = """
import torch
from dsmoe_vl.moe import swiglu_kernels
from dsmoe_vl.moe.swiglu import swiglu, swiglu_gradients
torch.manual_seed(0)
for rows, width in ((1, 1), (3, 7), (17, 64), (5, 1024), (2, 1500)):
    for dtype in (torch.float32, torch.bfloat16):
        gate, up, grad = (torch.randn(rows, width).to(dtype) for _ in range(3))
        scale = torch.rand(rows)
        torch.testing.assert_close(swiglu_kernels.forward(gate, up, scale), swiglu(gate, up, scale))
        pairs = zip(swiglu_kernels.backward(grad, gate, up, scale), swiglu_gradients(grad, gate, up, scale))
        for ours, plain in pairs:
            torch.testing.assert_close(ours, plain)
print(swiglu_kernels.forward(torch.empty(0, 8), torch.empty(0, 8), torch.empty(0)).shape)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no Triton: its kernels of SwiGLU were not checked"
)
def test_kernels_in_the_interpreter():
    environment = cpu_environment() | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", KERNELS], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "torch.Size([0, 8])"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: experts as one function were not checked on CUDA")
def test_cuda_matches_cpu():
    torch.manual_seed(0)
    experts, found = Experts(EXPERTS, 64, 128), []
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assignments = Assignments.of(choices(200, 3), EXPERTS)
    x, gates = torch.randn(200, 64), torch.rand(600)
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        module = experts.to(device, dtype)
        inputs = [value.detach().to(device, dtype).requires_grad_() for value in (x, gates)]
        out = module(*inputs, Assignments(*(value.to(device) for value in assignments)))
        grads = torch.autograd.grad(out.float().square().sum(), [*inputs, *module.parameters()])
        found.append([value.float().cpu() for value in (out, *grads)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=5e-2, atol=5e-2 * float(one.abs().max()))
