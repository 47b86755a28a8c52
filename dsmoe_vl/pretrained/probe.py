"""What an imported language model answers to a few texts, by the library of its makers: `probe.safetensors`.

A wrong import, or a start that lost experts, trains on from a high loss without an error. So a run that starts from the
import first asks the same, and refuses other answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.pack import assemble, collate
from dsmoe_vl.data.pack_shape import PackShape
from dsmoe_vl.data.segment import IGNORE, Modality, Segment
from dsmoe_vl.errors import CheckpointError, ConfigError

PROBE_NAME = "probe.safetensors"
# Of the largest logit. In bf16 two correct programs differ by some hundredths of it; random experts by all of it.
TOLERANCES = {"fp32": 1e-3, "bf16": 0.1}
_LENGTHS = (3, 12, 29)  # of the texts, tokens
_SEED = 0


@dataclass(frozen=True)
class Probe:
    """Texts one after another, int64 [T], their lengths, and the logits after the last token of each, fp32 [N, V]."""

    tokens: Tensor
    lengths: tuple[int, ...]
    logits: Tensor

    def batch(self, patch_size: int, merge: int) -> Batch:
        """The texts in one pack, as segments without labels."""
        segments = []
        for text in self.tokens.split(self.lengths):
            tokens = text.numpy().astype(np.int32)
            empty = np.full(len(tokens), IGNORE, np.int32)
            segments.append(Segment(0, tokens, empty, np.full(len(tokens), Modality.TEXT, np.int32)))
        shape = PackShape(len(self.tokens), merge * merge, patch_size, merge)
        return collate([assemble(segments, shape)])

    @property
    def last(self) -> Tensor:
        """The places of the texts' last tokens: int64 [N]."""
        return torch.tensor(self.lengths).cumsum(0) - 1


def make_probe(text: Path, output: Path, pieces: int, is_whole: bool = False) -> None:
    """Ask transformers' model of the folder `text`, in fp32 on the CPU, about the first `pieces` of its vocabulary, V:
    rows behind them may be given to our symbols, or stand for pictures. Raises ConfigError, OSError."""
    try:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    except ImportError:
        raise ConfigError("--probe asks transformers, which is not installed: `pip install transformers`") from None
    try:
        kind = AutoModelForImageTextToText if is_whole else AutoModelForCausalLM
        model = kind.from_pretrained(text, dtype=torch.float32, local_files_only=True).eval()
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(f"--probe: transformers cannot open {text}: {' '.join(str(error).split())[:300]}") from None
    generator = torch.Generator().manual_seed(_SEED)
    texts = [torch.randint(0, pieces, (length,), generator=generator) for length in _LENGTHS]
    with torch.no_grad():
        logits = torch.stack([model(tokens[None]).logits[0, -1, :pieces].float() for tokens in texts])
    tensors = {"tokens": torch.cat(texts), "lengths": torch.tensor(_LENGTHS), "logits": logits}
    save_file(tensors, output / PROBE_NAME)


def read_probe(folder: Path) -> Probe | None:
    """Of an import; None if it has none. Raises CheckpointError."""
    file = folder / PROBE_NAME
    if not file.exists():
        return None
    try:
        found = load_file(file)
        probe = Probe(found["tokens"], tuple(found["lengths"].tolist()), found["logits"])
        if sum(probe.lengths) != len(probe.tokens) or len(probe.lengths) != len(probe.logits):
            raise ValueError("its tensors do not fit each other")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}: import again, or remove it to go without") from None
    return probe


def compare(probe: Probe, logits: Tensor, precision: str, folder: str) -> str:
    """A line on how far our answers, fp32 [N, V or more], are from the probe's.

    Raises CheckpointError beyond the tolerance.
    """
    size = probe.logits.shape[1]
    largest = probe.logits.abs().max().item()
    difference = (logits[:, :size].float().cpu() - probe.logits).abs().max().item()
    limit = TOLERANCES[precision] * largest
    found = f"the largest difference of a logit is {difference:.2g}, where logits reach {largest:.3g}"
    if not difference <= limit:
        raise CheckpointError(
            f"the model that starts from {folder} does not answer as its makers' does: {found} and {limit:.2g} is "
            f"allowed in {precision}: import it again, or remove {Path(folder) / PROBE_NAME} if this is meant"
        )
    return found
