"""Rotations against rotation matrices, and the kernel against plain operators."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from dsmoe_vl.model.rotation import rotate, rotated
from tests.distributed.ranks import cpu_environment


def inputs(tokens=5, heads=3, width=8, dtype=torch.float32):
    torch.manual_seed(0)
    whole = torch.randn(tokens, heads + 2, width).to(dtype)  # of which rotated heads are a part
    angles = 10 * torch.randn(tokens, 1, width // 2)
    return whole[:, 1:-1], torch.polar(torch.full_like(angles, 1.1), angles)


@pytest.mark.parametrize("turn", [rotate, lambda x, rotation: rotated(x, torch.view_as_real(rotation), False)])
def test_pairs_turn_by_their_angles(turn):
    x, rotation = inputs()
    x = x.clone().requires_grad_()
    first, second = rotation.real, rotation.imag
    matrix = torch.stack((torch.stack((first, -second), -1), torch.stack((second, first), -1)), -2)
    expected = torch.einsum("thpij,thpj->thpi", matrix.expand(-1, 3, -1, -1, -1), x.unflatten(-1, (-1, 2))).flatten(-2)
    grad = torch.randn_like(expected)
    (theirs,) = torch.autograd.grad(expected, x, grad)
    found = turn(x, rotation)
    (ours,) = torch.autograd.grad(found, x, grad)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours, theirs)


def test_the_operator_is_well_formed():
    x, rotation = inputs()
    arguments = (x.clone().requires_grad_(), torch.view_as_real(rotation), False)
    torch.library.opcheck(rotated, arguments)


KERNEL = """
import torch
from dsmoe_vl.model import rotation_kernels
from dsmoe_vl.model.rotation import rotated
from tests.parity.test_rotation import inputs
for shape in ((1, 1, 2), (5, 3, 8), (3, 2, 24), (4, 1, 128)):
    for dtype in (torch.float32, torch.bfloat16):
        x, rotation = inputs(*shape, dtype)
        assert not x.is_contiguous() or shape[0] == 1
        parts = torch.view_as_real(rotation)
        for back in (False, True):
            torch.testing.assert_close(rotation_kernels.rotated(x, parts, back), rotated(x, parts, back))
turned = torch.randn(8, 3, 4).permute(2, 1, 0)  # features are not side by side
parts = torch.view_as_real(inputs(4)[1])
torch.testing.assert_close(rotation_kernels.rotated(turned, parts, False), rotated(turned, parts, False))
print(rotation_kernels.rotated(torch.empty(0, 2, 8), torch.empty(0, 1, 4, 2), False).shape)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no Triton: the kernel of rotations was not checked"
)
def test_the_kernel_in_the_interpreter():
    environment = cpu_environment() | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "torch.Size([0, 2, 8])"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the kernel of rotations was not checked on CUDA")
def test_the_kernel_on_cuda():
    x, rotation = inputs(64, 4, 64, torch.bfloat16)
    found = rotate(x.cuda().requires_grad_(), rotation.cuda())
    torch.testing.assert_close(found.detach().cpu(), rotate(x, rotation))
