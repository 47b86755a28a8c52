"""Bytes that a sparse layer reads and writes on a GPU, beside the least possible; needs none.

    python benchmarks/traffic.py [--operators] [--json FILE]                                            (seconds)

A layer's forward and backward run on tensors without data, on the branch that a GPU takes, and every operator's inputs
and outputs are counted. An operator that would make the host wait for the device cannot run on such tensors, so what
runs here does not wait. Least: rows are gathered once and combined once in each direction, and each product and each
SwiGLU reads its operands once and writes its result once. "Fused": w1 and w3 are one product, and SwiGLU is computed in
the products, which no grouped product of PyTorch offers.

Shapes: T tokens, D width, F hidden width, E experts, K experts per token, R = T K rows.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from moe_peers import GPU_SHAPES, SHAPES, Shape
from record import Result
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsmoe_vl.moe.sparse_moe import SparseMoE

TOKENS = (4096, 16384)
ALL_SHAPES = {**{f"{name}, narrow": shape for name, shape in SHAPES.items()}, **GPU_SHAPES}
_BYTES = 2  # of a bf16 number

_FREE = {  # they describe memory, and touch none
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty", "permute", "select",
    "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view",
    "_reshape_alias", "lift_fresh",
}  # fmt: skip
_FILLS = {"zero_", "fill_", "new_zeros", "zeros", "zeros_like", "new_ones", "ones", "ones_like", "full", "arange"}


def touched(tensor: Tensor) -> int:
    """Bytes of memory behind it: what is expanded counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


class Traffic(TorchDispatchMode):
    """Counts bytes read and written by operator, and how often each started."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.starts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name not in _FREE and not (name == "_to_copy" and out is args[0]):
            self.starts[name] += 1
            self.bytes[name] += self._of(name, _tensors((args, kwargs)), _tensors(out))
        return out

    def _of(self, name: str, read: list[Tensor], written: list[Tensor]) -> int:
        result = sum(map(touched, written))
        if name in _FILLS:
            return result
        if name in ("index_select", "take", "gather", "index", "embedding"):  # of the source, only what is taken
            return result + written[0].numel() * read[0].element_size() + touched(read[-1])
        if name.startswith("_embedding_bag"):
            rows, places = read[0], read[1]
            return places.numel() * rows.shape[1] * rows.element_size() + touched(places) + touched(written[0])
        if name.startswith(("index_copy", "scatter", "index_add")):  # in place, the places of the index alone
            return sum(map(touched, read[1:])) + touched(read[-1])
        return result + sum(map(touched, read))


def _tensors(found: Any) -> list[Tensor]:
    """Each once."""
    unique: dict[int, Tensor] = {id(leaf): leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)}
    return list(unique.values())


def count(shape: Shape, tokens: int) -> Traffic:
    """Of one forward and backward of our layer, with its statistics, as `moe_layer.py` times it."""
    with torch.device("meta"):
        layer = SparseMoE(
            shape.width, shape.experts, 4, num_modalities=4, top_k=shape.top_k, ffn_width=shape.ffn_width
        ).bfloat16()
        x = torch.empty(tokens, shape.width, dtype=torch.bfloat16, requires_grad=True)
        ids = torch.empty(tokens, dtype=torch.int64)
        real = torch.empty(tokens, dtype=torch.bool)
        gradient = torch.empty_like(x)
    with Traffic() as traffic:
        out, _ = layer(x, ids, ids, real)
        out.backward(gradient)
    return traffic


def least(shape: Shape, tokens: int) -> tuple[int, int]:
    """Bytes of the experts' part with kernels of their own, and with everything fused."""
    width, hidden, top_k = shape.width, shape.ffn_width, shape.top_k
    rows, weights = tokens * top_k, shape.experts * width * hidden
    moved = 2 * (2 * rows * width) + 2 * (rows + tokens) * width  # gathered once and combined once, twice
    products = 9 * (rows * (width + hidden) + weights)
    swiglu = rows * (3 * hidden + 6 * hidden)
    # One product for w1 and w3: the rows are read (or written) once, not twice, in each of three products. In the
    # products, SwiGLU reads nothing forward but writes its result; backward it reads two numbers and writes three.
    fused_products = products - 3 * rows * width
    fused_swiglu = swiglu - rows * (2 * hidden + 2 * hidden)
    return _BYTES * (moved + products + swiglu), _BYTES * (moved + fused_products + fused_swiglu)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--operators", action="store_true", help="print every operator")
    args = parser.parse_args()
    layers = []
    for name, shape in ALL_SHAPES.items():
        for tokens in TOKENS:
            found, (separate, fused) = count(shape, tokens), least(shape, tokens)
            total = sum(found.bytes.values())
            print(f"{name:15} {tokens:6} {total / 2**20:9.1f} MiB  {total / separate:.2f}  {total / fused:.2f}")
            if args.operators:
                for operator, size in found.bytes.most_common():
                    print(f"    {operator:28} {found.starts[operator]:3} x  {size / total:6.1%}")
            layers.append({
                "shape": name, **asdict(shape), "tokens": tokens, "bytes": total, "least": separate, "fused": fused,
                "starts": sum(found.starts.values()), "host_waits": 0,  # else it would not have run
                "operators": dict(found.bytes.most_common()),
            })  # fmt: skip
    if args.json:
        Result.now("traffic", {"layers": layers}).write(args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
