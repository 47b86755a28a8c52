"""Tiny models of another maker, imported with the real command."""

from __future__ import annotations

import json
import re

import torch

from tests.support.runs import REPOSITORY, finish, python, start
from tests.support.tokenizers import byte_level

IMPORT = REPOSITORY / "launch" / "import_hf.py"
DECODER = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 20, "max_position_embeddings": 64, "rope_theta": 5000.0,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "norm_topk_prob": True,
}  # fmt: skip


def imported(folders, output, *parts):
    options = [word for part in parts for word in (f"--{part}", folders / part)]
    return finish(start(python(IMPORT, *options, "--output", output, "--probe")))


def import_speaking(folder):
    """An import of a language model with its tokenizer, of which every text begins with a piece."""
    import transformers

    torch.manual_seed(0)
    sizes = {key: value for key, value in DECODER.items() if "expert" not in key and "moe" not in key}
    config = transformers.Qwen3Config(**sizes, tie_word_embeddings=True)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder / "text")
    byte_level(folder / "text" / "tokenizer.json")
    said = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    (folder / "text" / "tokenizer_config.json").write_text(json.dumps(said))
    result = imported(folder, folder / "model", "text")
    assert result.status == 0, result.err
    assert "307 pieces of tokenizer.json, 8 symbols in rows after them; segments begin with <s>" in result.out
    assert "warning" not in result.out
    (line,) = [line for line in result.out.splitlines() if re.search(r"vision +403,493,888 parameters get first", line)]
    assert "[model.vision]" in line and "--vision DIR" in line
    return folder / "model"


def with_its_tokenizer(tiny, output, recipe):
    """The tiny recipe with its vision encoder; decoder and tokenizer are those of the import."""
    text = tiny.recipe.read_text()
    seen = text[text.index("[model.vision]") : text.index("[moe]")]
    data = text[text.index("[[data.sources]]") : text.index("[tokenizer]")]
    recipe.write_text(f'[model]\ninit_from = "{output}"\n\n{seen}{data}{text[text.index("[run]") :]}')
    return recipe
