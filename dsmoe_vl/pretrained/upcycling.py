"""A dense language model with experts that begin as copies of its feed-forwards (Komatsuzaki et al. 2023).

Where a layer has E experts of which a token takes K with gates that sum to 1, copies give what the dense layer gave,
whatever the router says. `parts` cuts each copy's hidden units into experts of a fraction of the width; then the rows
of the router are the same for the parts of one copy, so that a token takes copies as a whole, and w2 is that many times
as large, since each part has only its share of the gate.

What makes copies differ: each is trained on the tokens that the router sends to it. Until they differ the router has no
gradient of the tasks, only those of balance and z loss. `noise` and `fresh_share` (Drop-Upcycling, Nakamura et al.
2025) start them apart, at the price of outputs that are not the dense model's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from dsmoe_vl.config.model import MoEConfig
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.moe.expert_names import expert_name
from dsmoe_vl.pretrained.decoder import Decoder
from dsmoe_vl.pretrained.mapping import Make, Target, only

_ROUTER_STD = 0.02  # near-even routing at the start


def option(default: Any, words: str) -> Any:
    """A field that is an option of the command, with its help."""
    return field(default=default, metadata={"help": words})


@dataclass(frozen=True)
class Upcycling:
    """What to make of the dense layers; the options of launch/import_hf.py."""

    experts: int = option(0, "experts of a layer, E: parts of all copies; 0: layers stay dense")
    top_k: int = option(2, "experts of a token, K")
    first_dense: int = option(0, "first layers that stay dense")
    parts: int = option(1, "experts that one copy is cut into")
    noise: float = option(0.0, "noise on the copies: its deviation, relative to that of the matrix")
    fresh_share: float = option(0.0, "share of each expert's hidden units that is drawn anew")
    shared_width: int = option(0, "hidden width of a shared expert whose output starts at zero; 0: none")
    seed: int = option(0, "of everything that is drawn")

    @property
    def is_exact(self) -> bool:
        """Whether outputs are those of the dense model."""
        return self.noise == 0 and self.fresh_share == 0


@dataclass(frozen=True)
class _Upcycled(Decoder):
    how: Upcycling = Upcycling()

    def sparse(self, theirs: str, ours: str) -> Iterator[Target]:
        """As a decoder's, from the tensors of a dense layer."""
        how, width = self.how, self.model.width
        copies = how.experts // how.parts
        yield _drawn(f"{ours}router.weight", (copies, width), _ROUTER_STD, how.seed, how.parts)
        matrices = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
        for number in range(how.experts):
            for weight, source in matrices.items():
                name = expert_name(f"{ours}experts.{weight}", number)
                make = _copied(name, weight == "w2", number % how.parts, how)
                yield Target(name, (f"{theirs}{source}.weight",), make, self._words(number))
        if how.shared_width:
            yield _drawn(f"{ours}shared.gate_up.weight", (2 * how.shared_width, width), width**-0.5, how.seed)
            yield _drawn(f"{ours}shared.down.weight", (width, how.shared_width), 0.0, how.seed)

    def _words(self, number: int) -> str:
        how = self.how
        part = f"part {number % how.parts + 1} of {how.parts}, w2 times {how.parts}"
        words = ["copied" if how.parts == 1 else part]
        words += [f"noise of {how.noise:g} of its deviation"] if how.noise else []
        words += [f"{how.fresh_share:.0%} of the hidden units drawn anew"] if how.fresh_share else []
        return ", ".join(words)


def upcycled(decoder: Decoder, how: Upcycling, place: str) -> Decoder:
    """The decoder with experts. `place`: its config.json, for messages. Raises ConfigError."""
    _check(decoder, how, place)
    moe = MoEConfig(
        experts=how.experts, top_k=how.top_k, ffn_width=decoder.model.ffn_width // how.parts,
        shared_ffn_width=how.shared_width, first_dense_layers=how.first_dense,
    )  # fmt: skip
    inherited = {item.name: getattr(decoder, item.name) for item in fields(Decoder)}
    return _Upcycled(**inherited | {"moe": moe, "first_dense_layers": how.first_dense}, how=how)


def _check(decoder: Decoder, how: Upcycling, place: str) -> None:
    width, layers = decoder.model.ffn_width, decoder.model.layers

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise ConfigError(what)

    require(decoder.moe is None, f"--experts {how.experts}: {place} has experts already: leave the option out")
    require(
        how.top_k >= 2,
        f"--top-k {how.top_k}: with one expert a token's gate is its probability and not 1, so the outputs would not "
        "be those of the dense model: take 2 or more",
    )
    require(how.experts > how.top_k, f"--experts {how.experts}: must be more than --top-k {how.top_k}")
    require(how.parts >= 1, f"--parts {how.parts}: must be 1 or more")
    for option, value in (("--experts", how.experts), ("--top-k", how.top_k), ("the hidden width", width)):
        require(value % how.parts == 0, f"--parts {how.parts}: does not divide {option}, {value}")
    require(
        0 <= how.first_dense < layers, f"--first-dense {how.first_dense}: must be below {layers}, all of its layers"
    )
    require(0 <= how.fresh_share < 1, f"--fresh-share {how.fresh_share}: must be from 0 to below 1")
    require(how.noise >= 0, f"--noise {how.noise}: must not be negative")
    require(how.shared_width >= 0, f"--shared-width {how.shared_width}: must not be negative")


def _copied(name: str, is_output: bool, part: int, how: Upcycling) -> Make:
    """One matrix of an expert: hidden units are rows of w1 and w3, columns of w2."""

    def make(found: Sequence[Tensor]) -> Tensor:
        units = only(found).t() if is_output else only(found)
        size = len(units) // how.parts
        own = units[part * size : (part + 1) * size].float()
        if is_output:
            own = own * how.parts
        deviation = own.std()
        if how.noise:
            own = own + how.noise * deviation * torch.randn(own.shape, generator=_generator(name, how.seed))
        if how.fresh_share:
            expert = name.rpartition(".")[0]  # the same hidden units in its three matrices
            anew = torch.randperm(size, generator=_generator(expert, how.seed))[: round(how.fresh_share * size)]
            drawn = torch.randn((len(anew), own.shape[1]), generator=_generator(f"{name}/fresh", how.seed))
            own = own.index_copy(0, anew, units.float().mean() + deviation * drawn)
        return (own.t() if is_output else own).to(units.dtype).contiguous()

    return make


def _drawn(name: str, shape: tuple[int, int], std: float, seed: int, repeats: int = 1) -> Target:
    """Normal values, each row `repeats` times."""

    def make(found: Sequence[Tensor]) -> Tensor:
        values = std * torch.randn(shape, generator=_generator(name, seed))
        return values.repeat_interleave(repeats, dim=0)

    words = "zeros" if std == 0 else f"normal, standard deviation {std:.2g}"
    return Target(name, (), make, words + (f", {repeats} rows alike" if repeats > 1 else ""))


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
