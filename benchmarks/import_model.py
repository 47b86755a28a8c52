"""What an import costs: time, memory at its peak beside the largest file of the model, and the time of a plan from it.

    python benchmarks/import_model.py [--parameters 1.0] [--files 3] [--folder DIR] [--json FILE]

The model: Llama's form in bf16, 2,048 wide, its output projection of its own, random, in files of about one size.
Memory is resident memory at its peak over what the process had when everything was imported. Nothing maps the files,
so the operating system's cache of them is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from memory import Memory
from record import ROOT, Result
from torch import Tensor

from dsmoe_vl.checkpoint.tensor_files import Share, Spec, write_tensors
from dsmoe_vl.pretrained.importing import import_models

_WIDTH, _HEADS, _KV_HEADS, _FFN, _PIECES = 2048, 32, 8, 8192, 32_000
_MIB = 2**20
_REPEATS = 5


def tensors_of(layer: int) -> dict[str, Spec]:
    """Of one layer, by name."""
    of_kv = _WIDTH * _KV_HEADS // _HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (_WIDTH,), "post_attention_layernorm": (_WIDTH,), "self_attn.q_proj": (_WIDTH, _WIDTH),
        "self_attn.k_proj": (of_kv, _WIDTH), "self_attn.v_proj": (of_kv, _WIDTH), "self_attn.o_proj": (_WIDTH, _WIDTH),
        "mlp.gate_proj": (_FFN, _WIDTH), "mlp.up_proj": (_FFN, _WIDTH), "mlp.down_proj": (_WIDTH, _FFN),
    }  # fmt: skip
    return {f"model.layers.{layer}.{name}.weight": Spec(torch.bfloat16, shape) for name, shape in shapes.items()}


def write_model(folder: Path, parameters: float, files: int) -> dict[str, Any]:
    """A random model of about so many parameters, in so many files; its sizes."""
    table = Spec(torch.bfloat16, (_PIECES, _WIDTH))
    of_layer = sum(spec.size for spec in tensors_of(0).values())
    layers = max(1, round((2 * parameters - 2 * table.size) / of_layer))
    specs = {"model.embed_tokens.weight": table}
    for layer in range(layers):
        specs |= tensors_of(layer)
    specs |= {"model.norm.weight": Spec(torch.bfloat16, (_WIDTH,)), "lm_head.weight": table}
    total = sum(spec.size for spec in specs.values())
    shares: list[dict[str, Spec]] = [{}]
    for name, spec in specs.items():
        if sum(item.size for item in shares[-1].values()) >= total / files:
            shares.append({})
        shares[-1][name] = spec
    places, sizes = {}, []
    for number, share in enumerate(shares, 1):
        file = f"model-{number:05d}-of-{len(shares):05d}.safetensors"
        sizes.append(write_tensors(folder / file, Share(share, random_values(share)), {"format": "pt"}).entry.size)
        places |= dict.fromkeys(share, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = {
        "model_type": "llama", "hidden_size": _WIDTH, "intermediate_size": _FFN, "num_hidden_layers": layers,
        "num_attention_heads": _HEADS, "num_key_value_heads": _KV_HEADS, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
        "vocab_size": _PIECES, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return {"parameters": total // 2, "layers": layers, "largest_file_bytes": max(sizes), "layer_bytes": of_layer}


def random_values(share: dict[str, Spec]) -> Iterator[Tensor]:
    """One after another."""
    for spec in share.values():
        yield torch.randn(spec.shape, dtype=spec.dtype)


def measured_import(text: Path, output: Path) -> dict[str, float]:
    """In a process of its own."""
    memory = Memory()
    before = memory.read("VmRSS")
    with memory.phase("import"):
        began = time.perf_counter()
        import_models(text, None, output)
        seconds = time.perf_counter() - began
    return {"import_seconds": seconds, "before_bytes": before, "peak_bytes": memory.peaks["import"] - before}


def measured_plans(imported: Path, folder: Path) -> dict[str, list[float]]:
    """Seconds of `launch/train.py --dry-run`, several times: by the clock, and of the processor."""
    recipe = folder / "recipe.toml"
    nowhere = '[[data.sources]]\nname = "a"\npath = "none"\n\n[tokenizer]\npath = "none/tokenizer.model"\n'
    recipe.write_text(f'[model]\ninit_from = "{imported}"\n\n{nowhere}')
    command = [sys.executable, str(ROOT / "launch/train.py"), "--recipe", str(recipe), "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    clock, processor = [], []
    for _ in range(_REPEATS):
        began, used = time.perf_counter(), of_children()
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        clock.append(time.perf_counter() - began)
        processor.append(of_children() - used)
    return {"plan_seconds": clock, "plan_processor_seconds": processor}


def of_children() -> float:
    """Processor seconds of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1.0, help="of the model, in billions")
    parser.add_argument("--files", type=int, default=3, help="of its weights")
    parser.add_argument("--folder", type=Path, help="where they are written; a temporary one if not given")
    parser.add_argument("--json", type=Path, help="the result file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        text, output = folder / "text", folder / "imported"
        text.mkdir()
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            found = pool.submit(write_model, text, args.parameters * 1e9, args.files).result()
            found |= pool.submit(measured_import, text, output).result()
        found |= measured_plans(output, folder)
    allowed = 1.2 * found["largest_file_bytes"] + found["layer_bytes"]
    print(f"{found['parameters'] / 1e9:.2f} B parameters, imported in {found['import_seconds']:.1f} s")
    print(f"largest file {found['largest_file_bytes'] / _MIB:,.0f} MiB, a layer {found['layer_bytes'] / _MIB:,.0f} MiB")
    print(f"memory at its peak {found['peak_bytes'] / _MIB:,.0f} MiB, {found['peak_bytes'] / allowed:.2f} of the limit")
    plan = statistics.median(found["plan_seconds"]), statistics.median(found["plan_processor_seconds"])
    print(f"a plan takes {plan[0]:.2f} s, {plan[1]:.2f} s of the processor")
    if args.json:
        Result.now("import_model", found).write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
