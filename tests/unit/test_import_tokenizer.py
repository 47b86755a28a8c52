"""What an import makes of the tokenizer in a folder: which file, which pieces begin and end, which rows are new."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.data.tokenizer import Tokenizer, hash_rows
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.pretrained.importing import import_models
from dsmoe_vl.pretrained.tokenizer import with_mean_rows
from tests.support.tokenizers import byte_level, sentencepiece_model, unigram

transformers = pytest.importorskip("transformers", reason="transformers: importing was not checked")

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "rope_theta": 5000.0,
}  # fmt: skip


def folder_with(path, rows, tied=False, **said):
    """A Llama with `rows` rows, and `said` in its tokenizer_config.json."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, eos_token_id=2, **SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    if said:
        (path / "tokenizer_config.json").write_text(json.dumps(said))
    return path


def imported(folder, output, **controls):
    done = import_models(folder, None, output, controls=controls)
    assert done.tokenizer is not None
    return done.tokenizer, json.loads((output / "model.json").read_text())["tokenizer"]


@pytest.mark.parametrize("tied", (False, True))
def test_rows_of_new_symbols_are_the_mean_of_the_old_ones(tmp_path, tied):
    pieces = Tokenizer(sentencepiece_model(tmp_path / "t.model")).vocabulary.size
    folder = folder_with(tmp_path / "text", pieces, tied, tokenizer_class="LlamaTokenizer", bos_token="<s>")
    shutil.move(tmp_path / "t.model", folder / "tokenizer.model")
    found, table = imported(folder, tmp_path / "out")
    rows = -(-(pieces + 7) // 64) * 64
    assert table == {
        "path": "tokenizer.model",
        "vocab_size": rows,
        "bos": "<s>",
        "sha256": hash_rows(found.tokenizer.vocabulary),
    }
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    theirs, ours = load_file(folder / "model.safetensors"), WeightsFile(tmp_path / "out").load()
    names = {"embedding.weight": "model.embed_tokens.weight"} | ({} if tied else {"head.weight": "lm_head.weight"})
    origin = json.loads((tmp_path / "out" / "origin.json").read_text())["tensors"]
    for name, source in names.items():
        assert ours[name][:pieces].equal(theirs[source]) and ours[name].shape == (rows, 16)
        mean = theirs[source].mean(0).expand(rows - pieces, -1)
        torch.testing.assert_close(ours[name][pieces:], mean, rtol=1e-5, atol=1e-7)
        assert origin[name]["how"].endswith(
            f"rows {pieces} to {rows - 1} are new: each is the mean of the first {pieces}"
        )
    assert ("head.weight" in ours) != tied


def test_spare_rows_are_used_and_the_others_kept(tmp_path):
    folder = folder_with(tmp_path / "text", 384, eos_token={"content": "<|im_start|>"}, bos_token=None)
    byte_level(folder / "tokenizer.json")
    found, table = imported(folder, tmp_path / "out", image="<|image_pad|>")
    assert table["vocab_size"] == 384 and table["eos"] == "<|im_start|>" and "bos" not in table
    assert table["controls"] == {"image": "<|image_pad|>"}
    theirs = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    ours = WeightsFile(tmp_path / "out").load()["embedding.weight"]
    changed = (ours != theirs).any(1).nonzero().flatten().tolist()
    assert changed == list(found.tokenizer.new_rows) and len(changed) == 7
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_means_are_of_all_rows_and_exact_in_bf16():
    table = torch.randn(40_000, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    wider = with_mean_rows(table, range(39_000, 40_005), 39_000, 40_005)
    mean = table[:39_000].double().mean(0).bfloat16()
    assert wider[:39_000].equal(table[:39_000]) and (wider[39_000:] == mean).all() and wider.dtype == torch.bfloat16


def test_bos_is_what_transformers_puts_before_a_text(tmp_path):
    """By tokenizer_config.json, else the post-processor, else the class."""
    cases = {
        "said": ({"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}, byte_level, "<s>"),
        "said not": ({"add_bos_token": False, "bos_token": "<s>", "eos_token": "</s>"}, unigram, ""),
        "post-processor": ({"bos_token": "</s>", "eos_token": "</s>"}, unigram, "<s>"),
        "class": ({"tokenizer_class": "LlamaTokenizer"}, sentencepiece_model, "<s>"),
        "nothing": ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, sentencepiece_model, ""),
    }
    for name, (said, make, bos) in cases.items():
        folder = folder_with(tmp_path / name, 400, **said)
        make(folder / ("tokenizer.model" if make is sentencepiece_model else "tokenizer.json"))
        found, table = imported(folder, tmp_path / f"{name} out")
        assert table.get("bos", "") == bos, name
        assert found.tokenizer.vocabulary.piece(found.tokenizer.eos) == "</s>"


def test_the_end_may_be_said_by_the_model_alone(tmp_path):
    folder = folder_with(tmp_path / "text", 400)
    unigram(folder / "tokenizer.json")
    assert imported(folder, tmp_path / "out")[1]["eos"] == "</s>"  # id 2 of config.json


def test_which_of_two_files(tmp_path):
    """tokenizer.model, unless pieces were added to tokenizer.json since, or it is none of SentencePiece's."""
    folder = folder_with(tmp_path / "text", 400, eos_token="</s>")
    model = sentencepiece_model(folder / "tokenizer.model")
    unigram(folder / "tokenizer.json")
    assert imported(folder, tmp_path / "first")[1]["path"] == "tokenizer.model"
    byte_level(folder / "tokenizer.json")
    model.write_bytes(b"IQ== 0\nIg== 1\n")
    assert imported(folder, tmp_path / "second")[1]["path"] == "tokenizer.json"
    sentencepiece_model(model, vocab_size=290)
    assert imported(folder, tmp_path / "third")[1]["path"] == "tokenizer.json"


def test_settings_reach_the_recipe_which_may_choose_bos(tmp_path):
    folder = folder_with(tmp_path / "text", 400, tokenizer_class="LlamaTokenizer")
    sentencepiece_model(folder / "tokenizer.model")
    imported(folder, tmp_path / "out")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[model]\ninit_from = "{tmp_path / "out"}"\n')
    plain = load_recipe(recipe)
    assert plain.tokenizer.path == str(tmp_path / "out" / "tokenizer.model")
    assert Tokenizer.of(plain).begin == (1,)
    assert Tokenizer.of(load_recipe(recipe, ['tokenizer.bos=""'])).begin == ()
    sentencepiece_model(tmp_path / "other.model", vocab_size=300)
    other = load_recipe(recipe, [f"tokenizer.path={tmp_path / 'other.model'}"])
    with pytest.raises(
        ConfigError, match=rf"other.model \(pieces \w+\) is not that of .*init_from = '{tmp_path / 'out'}'"
    ):
        Tokenizer.of(other)


def test_bad_folders_are_named(tmp_path):
    def refused(message, folder, **controls):
        with pytest.raises(ConfigError, match=message) as error:
            import_models(folder, None, tmp_path / "out", controls=controls)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    small = folder_with(tmp_path / "small", 300)
    byte_level(small / "tokenizer.json")
    refused(r"tokenizer.json has 307 pieces, but vocab_size = 300 in .*config.json", small)
    (small / "tokenizer.json").write_text("{")
    refused(r"small/tokenizer.json cannot be read by tokenizers", small)
    other = folder_with(tmp_path / "other", 320, eos_token="<end>")
    byte_level(other / "tokenizer.json")
    refused(r"tokenizer.json: no file beside it names a reserved piece that ends a text: add eos_token", other)
    (other / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    refused(r"tokenizer.controls.video = 'a' is a piece of .*tokenizer.json that texts consist of", other, video="a")
    refused(r"--controls picture=x: .*Valid here: caption", other, picture="x")
    refused(r"--controls image=: name a piece", other, image="")
    with pytest.raises(ConfigError, match="--controls names pieces of the tokenizer of --text DIR"):
        import_models(None, small, tmp_path / "out", controls={"image": "x"})


def test_pieces_that_were_added_beside_a_lone_model_are_said(tmp_path):
    """Of them the file knows nothing."""
    pieces = Tokenizer(sentencepiece_model(tmp_path / "t.model")).vocabulary.size
    known = {"0": {"content": "<unk>"}, "1": {"content": "<s>"}}
    cases = {
        "added_tokens.json": {"<|pad|>": pieces, "<tool>": pieces + 1, "<s>": 1},
        "tokenizer_config.json": known | {str(pieces): {"content": "<|pad|>"}, str(pieces + 1): {"content": "<tool>"}},
    }
    for file, added in cases.items():
        folder = folder_with(tmp_path / file, pieces + 10, tokenizer_class="LlamaTokenizer", added_tokens_decoder=known)
        shutil.copyfile(tmp_path / "t.model", folder / "tokenizer.model")
        assert imported(folder, tmp_path / f"{file} before")[0].unread == ""
        (folder / file).write_text(json.dumps({"added_tokens_decoder": added} if "config" in file else added))
        said = imported(folder, tmp_path / f"{file} out")[0].unread
        assert said.startswith(f"{folder / file} adds 2 pieces to tokenizer.model: <|pad|>, <tool>. They are not read")
        assert "tokenizer.json" in said and "\n" not in said
