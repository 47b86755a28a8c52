"""A change of benchmarks/ablation_changes.py replaces what the model calls: it must not pass by it."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.distributed.ranks import REPOSITORY, cpu_environment

TRY = """
import torch
import ablation_changes
from dsmoe_vl.tasks.registry import build_backbone
from tests.parity.test_planner import BASE, batch_of

torch.manual_seed(0)
model, (batch, _) = build_backbone(BASE), batch_of(BASE)
with torch.no_grad():
    causal = model(batch)[0]
    ablation_changes.pictures_see_all()
    seeing = model(batch)[0]
# The first token of the first picture sees itself alone, and then its whole picture.
assert seeing.isfinite().all() and not torch.allclose(seeing[0], causal[0], atol=0.01)
print("changed")
"""


def test_pictures_see_all():
    path = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "benchmarks")))
    environment = cpu_environment() | {"PYTHONPATH": path}
    found = subprocess.run([sys.executable, "-c", TRY], env=environment, capture_output=True, text=True, timeout=120)
    assert found.stdout.endswith("changed\n"), found.stderr
