"""One examination of a cluster, in one of its processes: what was asked for, and what every way of asking does."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe_vl.config.deepspeed_json import load_deepspeed, setting
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.doctor.cluster.between_hosts import judge_plan
from dsmoe_vl.doctor.cluster.findings import Finding, as_list, status
from dsmoe_vl.doctor.cluster.host_facts import HostFacts, gather
from dsmoe_vl.doctor.cluster.supply import with_supply
from dsmoe_vl.parallel.device import device_name, has_bf16_unit
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.planner.resolve import resolve


@dataclass(frozen=True)
class Request:
    """The command line. In processes that a doctor starts over ssh, `part` is "facts" or "links", and `name` is what it
    calls this host."""

    recipe: Path
    deepspeed: Path
    overrides: Sequence[str] = ()
    hostfile: Path | None = None
    part: str = ""
    name: str = ""


class Case:
    """Each method raises ConfigError for a recipe or a JSON that cannot be read."""

    def __init__(self, request: Request) -> None:
        """Raises ConfigError if a launcher's variables contradict each other."""
        self.request, self.ranks = request, Ranks.discover()
        self.host = request.name or socket.gethostname()
        self._started = time.monotonic()

    def load(self) -> tuple[Recipe, dict[str, Any]]:
        """The recipe and the DeepSpeed JSON."""
        return load_recipe(self.request.recipe, self.request.overrides), load_deepspeed(self.request.deepspeed)

    def plan(self, world_size: int) -> tuple[RunPlan | None, list[Finding]]:
        """The plan for all ranks, if there is one, and what is wrong with it."""
        recipe, deepspeed = self.load()
        device = device_name()

        def make() -> RunPlan:
            return resolve(
                recipe,
                deepspeed,
                world_size,
                device=device,
                bf16_unit=has_bf16_unit(device),
                recipe_file=str(self.request.recipe),
                deepspeed_file=str(self.request.deepspeed),
            )

        return judge_plan(make, world_size)

    def facts(self, port: int | None = None) -> HostFacts:
        """Of this host. `port`: as in `gather`."""
        recipe, deepspeed = self.load()
        facts = gather(self.host, recipe, Path(recipe.run.directory, recipe.run.name), port)
        bf16 = setting(deepspeed, "bf16.enabled", False) and has_bf16_unit(facts.device)
        return with_supply(facts, recipe, self.ranks.local_size, bf16)

    def report(self, findings: Sequence[Finding], what: str) -> int:
        """Print the list. Returns the exit status."""
        print(f"doctor of {what}, {self.request.recipe}, {self.request.deepspeed}")
        # mpirun gives its ranks a terminal, whatever its own output is.
        print(as_list(findings, colours=self.ranks.world_size == 1 and sys.stdout.isatty()))
        print(f"took {time.monotonic() - self._started:.0f} s", flush=True)
        return status(findings)
