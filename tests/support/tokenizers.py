"""Tokenizers as other makers have them, tiny and trained here."""

from __future__ import annotations

from pathlib import Path

import sentencepiece

SENTENCES = [
    f"a {colour} {shape} left of a {side} cube, “née” café: über 12 </p> s"
    for colour in ("red", "blue", "green") for shape in ("ball", "cone", "pyramid") for side in ("grey", "brown")
] * 3  # fmt: skip
CONTROL_TEXT = "<image></s><s><|im_start|><|endoftext|><caption><unk><pad><unused0>[control_8]"
NASTY = (
    "a red ball", "", " ", "  two  spaces ", " leading", "trailing ", "tabs\tand\nnew\r\nlines",
    "émoji \U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467 é", "e\u0301 NFD", "\ufb01 ligature \u212b",
    "日本語 テスト", "a\0b", "\u200b\ufeff", "<image> </s> x</s>y <s>", CONTROL_TEXT, "</s></s></s>",
    "<|im_start|>user\n<think>x</think>", "<0x41> \u2581 \u2581\u2581a", "a" * 300,
)  # fmt: skip


def sentencepiece_model(path: Path, **options: object) -> Path:
    """As Llama's: no padding, unknown 0, beginning 1, end 2, bytes, and a space before every text."""
    settings: dict[str, object] = {
        "vocab_size": 340, "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2,
        "pad_id": -1, "unk_id": 0, "bos_id": 1, "eos_id": 2, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }  # fmt: skip
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES), model_writer=file, **(settings | options)
        )
    return path


def byte_level(path: Path) -> Path:
    """As Qwen's: byte-level BPE without an unknown piece, special pieces and an added one that text may hold."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet)
    )
    special = ("<|endoftext|>", "<|im_start|>", "<|image_pad|>", "<s>", "</s>")
    made.add_special_tokens([AddedToken(name, special=True) for name in special])
    made.add_tokens([AddedToken("<think>", special=False), AddedToken("<unused0>", special=False)])
    made.save(str(path))
    return path


def unigram(path: Path) -> Path:
    """As XLM-R's: its special pieces are among those that the model itself chooses from."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(SENTENCES, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.enable_truncation(7)  # as some files have it
    made.enable_padding(length=5)
    made.save(str(path))
    return path
