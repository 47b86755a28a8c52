"""One sparse layer, ours and others', forward and backward, beside a dense layer of equal active FLOPs.

    python benchmarks/moe_layer.py [--shapes NAME ...] [--tokens N ...] [--turns N] [--bf16] [--json FILE]
    deepspeed --num_accelerators 2 benchmarks/moe_layer.py

On a GPU where there is one, else on a CPU. EP is the number of ranks; each has its own tokens, and one thread. All
sparse layers of a shape have the same weights and the same router, and what they compute is compared with ours before
anything is timed: outputs, and gradients of the input. At capacity 1.25 only the tokens that lost no expert can be
compared. Layers take turns, and each turn begins with another one; ratios are of the same turn, and times are those of
the slowest rank. On a machine that does other work too, ratios of the processor's time are steadier than those of the
clock; at EP 2 they leave out the waiting.

Ours is measured as a training uses it, with the statistics of its router; no balancing term is part of the backward
pass of any layer. Optimizers and the reduction of gradients are left out: they are the same for all.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from moe_peers import CAPACITY, DENSE, GPU_SHAPES, OURS, PATHS, SHAPES, Layer, NotRunError, Shape, lost, weights
from record import Result
from torch import Tensor

from dsmoe_vl.command import leave
from dsmoe_vl.parallel.device import device_name, use_device
from dsmoe_vl.parallel.process_group import start_process_group
from dsmoe_vl.parallel.ranks import Ranks

TOKENS = (512, 1024, 4096)  # of a rank
# Error of a token, relative to the largest value, and the share of the tokens that must keep to it. In bf16 some
# routers compute their logits in bf16, and choose another expert for a token between two.
AGREEMENT = {torch.float32: (1e-4, 1.0), torch.bfloat16: (5e-2, 0.9)}


class Bench:
    """The layers of one shape and one number of tokens."""

    def __init__(self, shape: Shape, tokens: int, dtype: torch.dtype, ranks: Ranks, device: torch.device) -> None:
        self.shape, self.dtype, self.ranks, self.device = shape, dtype, ranks, device
        noise = torch.Generator().manual_seed(1 + ranks.rank)
        self.x, self.gradient = (
            torch.randn(tokens, shape.width, generator=noise).to(device, dtype)
            for _ in ("input", "gradient of the output")
        )
        self.x.requires_grad_()
        self.layers: dict[str, list[Layer]] = {}  # the forms of each
        self.not_run: dict[str, str] = {}
        self.agreeing: dict[str, float] = {}  # least share of the tokens that were compared
        self.dropped = 0.0  # share of the assignments, at capacity 1.25
        for name, forms in PATHS.items():
            try:
                self.layers[name] = [self._form(name, form, build) for form, build in forms.items()]
            except (NotRunError, ImportError, NotImplementedError, RuntimeError, ValueError) as error:
                self.not_run[name] = str(error).splitlines()[0]

    def take(self, layer: Layer) -> tuple[float, float]:
        """Seconds of a forward and backward, by the clock and of this process. Ranks begin together."""
        self.x.grad = None
        for parameter in layer.module.parameters():
            parameter.grad = None  # as after every step of ZeRO
        dist.barrier()
        self._wait()
        started, worked = time.perf_counter(), time.process_time()
        layer.run(self.x).backward(self.gradient)
        self._wait()
        return time.perf_counter() - started, time.process_time() - worked

    def turns(self, count: int) -> list[tuple[str, Layer, Tensor]]:
        """Of every layer and form, seconds by the clock and of the process: float64 [2, turns], of the slowest rank."""
        forms = [(name, layer) for name, forms in self.layers.items() for layer in forms]
        seconds = torch.zeros(len(forms), 2, count, dtype=torch.float64, device=self.device)
        for _, layer in forms:
            self.take(layer)
        for turn in range(count):
            for place in range(len(forms)):
                index = (turn + place) % len(forms)
                seconds[index, :, turn] = torch.tensor(self.take(forms[index][1]))
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return [(*of, found) for of, found in zip(forms, seconds.cpu(), strict=True)]

    def _wait(self) -> None:
        """For the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _form(self, name: str, form: str, build: Callable[..., Layer]) -> Layer:
        """One form of a layer, after its results were compared with ours."""
        layer = build(weights(self.shape), self.shape, self.ranks)
        layer.module.to(self.device, self.dtype)
        layer.form = form
        self._compare(name, layer)
        return layer

    def _compare(self, name: str, layer: Layer) -> None:
        """Raises SystemExit if the layer computes something else than ours."""
        self.take(layer)
        with torch.no_grad():
            found = (layer.run(self.x), self.x.grad)
        if name == OURS:
            self.ours = found
        if name in (OURS, DENSE):  # the dense one is another function
            return
        limit, least = AGREEMENT[self.dtype]
        kept = torch.ones(len(self.x), dtype=torch.bool, device=self.device)
        if name == CAPACITY:
            losses = lost(layer, self.x)
            self.dropped, kept = float(losses.float().mean()), ~losses.any(1)
        agrees = kept
        for theirs, ours in zip(found, self.ours, strict=True):
            assert theirs is not None and ours is not None
            agrees = agrees & (_error(theirs, ours) <= limit)
        share = float(agrees.sum() / kept.sum())
        self.agreeing[name] = min(share, self.agreeing.get(name, 1.0))
        if share < least:
            raise SystemExit(
                f"{name} ({layer.form}) computes something else than ours for {1 - share:.2%} of the tokens"
            )


def _error(theirs: Tensor, ours: Tensor) -> Tensor:
    """Of each token, relative to the largest value: [T]."""
    return (theirs.float() - ours.float()).abs().amax(1) / ours.float().abs().max()


def measure(bench: Bench, tokens: int, turns: int) -> dict[str, Any]:
    """Times, ratios to the dense layer and rates of all layers, each in its fastest form."""
    fastest: dict[str, tuple[Layer, Tensor]] = {}
    for name, layer, seconds in bench.turns(turns):
        if name not in fastest or seconds[0].quantile(0.5) < fastest[name][1][0].quantile(0.5):
            fastest[name] = layer, seconds
    flops = 18.0 * tokens * bench.shape.width * bench.shape.top_k * bench.shape.ffn_width  # three products, thrice
    paths: dict[str, dict[str, Any]] = {}
    for name in PATHS:
        if name in bench.not_run:
            paths[name] = {"not_run": bench.not_run[name]}
            continue
        layer, seconds = fastest[name]
        ratio, processor_ratio = seconds / fastest[DENSE][1]
        paths[name] = {
            "form": layer.form,
            "ms": _spread(1e3 * seconds[0]),
            "over_dense": _spread(ratio),
            "over_dense_processor": _spread(processor_ratio),
            "tflops_per_rank": round(flops / seconds[0].quantile(0.5).item() / 1e12, 5),
        }
        if name in bench.agreeing:
            paths[name]["tokens_agreeing"] = bench.agreeing[name]
    return {"dropped_at_capacity": round(bench.dropped, 4), "paths": paths}


def _spread(values: Tensor) -> list[float]:
    """Median, least and greatest."""
    return [round(value, 4) for value in values.quantile(torch.tensor([0.5, 0.0, 1.0], dtype=values.dtype)).tolist()]


def show(name: str, tokens: int, found: dict[str, Any]) -> None:
    """Print the layers of one shape."""
    dropped = f"{100 * found['dropped_at_capacity']:.1f} % of the assignments dropped at capacity 1.25"
    print(f"\n{name}, {tokens:,} tokens a rank; {dropped}")
    print(f"{'':34}{'ms':>8}   / dense (range)        TFLOP/s  by processor")
    for path, of in found["paths"].items():
        if "not_run" in of:
            print(f"{path:34}not run: {of['not_run']}")
            continue
        ratio, low, high = of["over_dense"]
        spread = f"{ratio:6.2f} ({low:.2f} to {high:.2f})"
        rates = f"{of['tflops_per_rank']:8.4f}{of['over_dense_processor'][0]:8.2f}"
        print(f"{path:34}{of['ms'][0]:8.2f} {spread:24}{rates}  {of['form']}", flush=True)


def main() -> int:
    """Measure the shapes at all numbers of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="of a rank")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--bf16", action="store_true", help="weights and tokens in bf16, in place of fp32")
    parser.add_argument("--json", type=Path, help="write a result file too (record.py)")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    ranks = Ranks.discover()
    device = use_device(device_name(), ranks)
    torch.set_num_threads(1)  # a rank per core is what trains fastest on a CPU
    start_process_group(ranks, device.type)
    shapes, layers = SHAPES if device.type == "cpu" else GPU_SHAPES, []
    for name in args.shapes:
        for tokens in args.tokens:
            bench = Bench(shapes[name], tokens, torch.bfloat16 if args.bf16 else torch.float32, ranks, device)
            found = measure(bench, tokens, args.turns)
            layers.append({"shape": name, **asdict(shapes[name]), "tokens": tokens, **found})
            if ranks.rank == 0:
                show(name, tokens, found)
    figures = {
        "device": device.type, "ep_size": ranks.world_size, "precision": "bf16" if args.bf16 else "fp32",
        "threads": torch.get_num_threads(), "turns": args.turns, "layers": layers,
    }  # fmt: skip
    if args.json and ranks.rank == 0:
        Result.now("moe_layer", figures).write(args.json)
    return 0


if __name__ == "__main__":
    leave(main())
