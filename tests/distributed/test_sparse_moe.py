"""docs/sparse_moe.md: its examples run, and on two ranks give what one rank gives."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import torch

from dsmoe_vl import SparseMoE, auxiliary_loss
from dsmoe_vl.errors import ConfigError
from tests.distributed.ranks import REPOSITORY, run_ranks

PAGE = REPOSITORY / "docs" / "sparse_moe.md"


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def test_the_first_example(capsys):
    exec(examples()[0], {})
    counts = re.findall(r"\d+\.", capsys.readouterr().out)
    assert len(counts) == 12 and sum(float(count) for count in counts) == 8 * 16 * 2


def test_another_model_on_two_ranks_learns_as_on_one(tmp_path):
    pytest.importorskip("transformers", reason="transformers: the layer in another model was not tried")
    script = tmp_path / "example.py"
    script.write_text(examples()[1])
    built = os.environ.get("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "torch_extensions")))  # or it compiles a minute
    outputs = [run_ranks(script, [], world_size=ranks, TORCH_EXTENSIONS_DIR=built) for ranks in (1, 2)]
    losses = [[float(found) for found in re.findall(r"loss ([\d.]+)", output)] for output in outputs]
    assert len(losses[0]) == 20 and losses[0][-1] < 0.7 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("routing", ["token", "plain", "task", "isolated"])
@pytest.mark.parametrize("backend", ["dropless", "capacity"])
def test_every_mode(routing, backend):
    torch.manual_seed(0)
    layer = SparseMoE(16, 4, 3, num_modalities=2, routing=routing, backend=backend, ffn_width=24)
    x = torch.randn(5, 7, 16, requires_grad=True)
    tasks, modalities = torch.arange(5).remainder(3).unsqueeze(1), torch.arange(7) % 2
    real = torch.rand(5, 7) > 0.2
    out, stats = layer(x, tasks, modalities, real)
    assert out.shape == x.shape and stats.load.shape == (3, 2, 4)
    assert float(stats.load.sum() + stats.dropped) == 2 * int(real.sum())
    (out.square().sum() + auxiliary_loss(stats)).backward()
    assert all(parameter.grad is not None for parameter in layer.parameters()) and x.grad is not None


@torch.no_grad()
def test_the_auxiliary_loss_of_even_routing():
    layer = SparseMoE(8, 4, top_k=4)
    torch.nn.init.zeros_(layer.layer.router.weight)
    _, stats = layer(torch.randn(6, 8))
    assert float(auxiliary_loss(stats, balance=1.0, z=0.0)) == pytest.approx(1.0)
    assert float(auxiliary_loss(stats, balance=0.0, z=1.0)) == pytest.approx(float(torch.tensor(4.0).log() ** 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 5}, r"SparseMoE\(top_k=5\): there are only num_experts=4"),
        ({"num_experts": 0}, r"SparseMoE\(num_experts=0\): must be at least 1"),
        ({"routing": "hash"}, r"SparseMoE\(routing='hash'\): must be one of token, plain"),
        ({"backend": "dense"}, r"SparseMoE\(backend='dense'\): must be one of dropless, capacity"),
        ({"num_tasks": 0}, r"SparseMoE\(num_tasks=0\): must be at least 1"),
        ({"routing": "isolated", "num_modalities": 3}, r"a modality has only 1 of num_experts=4"),
    ],
)
def test_values_that_make_no_layer(settings, message):
    with pytest.raises(ConfigError, match=message):
        SparseMoE(**settings)
