"""What parameters start with."""

from __future__ import annotations

import torch

from dsmoe_vl.model.init import first_values
from dsmoe_vl.moe.placement import placed
from dsmoe_vl.tasks.registry import build_backbone
from tests.unit.test_planner import TINY


def test_only_what_the_decoder_sees_of_pictures_is_scaled():
    starts = []
    for scale in (1.0, 0.25):
        model = build_backbone(TINY)
        fill = first_values(model, seed=3, connector_scale=scale)
        for where in placed(model):
            fill(where)
        starts.append(dict(model.named_parameters()))
    one, quarter = starts
    differing = {name for name in one if not torch.equal(one[name], quarter[name])}
    assert differing == {"connector.down.weight", "connector.place.weight", "connector.time.weight"}
    assert all(torch.equal(quarter[name], one[name] * 0.25) for name in differing)
