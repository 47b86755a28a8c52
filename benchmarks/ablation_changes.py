"""What ablations.py changes where no setting of a recipe or of the DeepSpeed JSON does: parts of the program.

They are replaced before the model is built. What helps becomes a setting; what does not stays here.

Shapes: T tokens, D width, N patches, L tokens of the longest segment.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import learning_run
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_vl.config.parts import PARTS, part_of
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.data.segment import Modality
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.model import attention, vision
from dsmoe_vl.model.vlm import VisionLanguageModel
from dsmoe_vl.planner.trained import Rule
from dsmoe_vl.tasks import retrieval_head
from dsmoe_vl.tasks.registry import build_backbone
from dsmoe_vl.training import engine, step

Replacement = Callable[[], None]


def groups(factors: dict[str, float] | None = None, undecayed: tuple[str, ...] = ()) -> Replacement:
    """Other learning rates, as factors, or no weight decay, by the end of a parameter's name."""

    def replace() -> None:
        usual = engine.parameter_groups

        def changed(model: nn.Module, *rates: Any) -> list[dict[str, Any]]:
            ends = {id(value): end for name, value in model.named_parameters() for end in ends_of if name.endswith(end)}
            found = []
            for group in usual(model, *rates):
                for end in (None, *ends_of):
                    params = [value for value in group["params"] if ends.get(id(value)) == end]
                    factor = (factors or {}).get(end or "", 1.0)
                    other = {"lr": group["lr"] * factor, "rate_factor": group["rate_factor"] * factor}
                    if params:
                        found.append(
                            group | other | ({"weight_decay": 0.0} if end in undecayed else {}) | {"params": params}
                        )
            return found

        ends_of = (*(factors or {}), *undecayed)
        engine.parameter_groups = changed

    return replace


def start_of_scale(scale: float) -> Replacement:
    """1 / temperature at the start."""

    def replace() -> None:
        retrieval_head._START["info_nce"] = (scale, 0.0)

    return replace


def sampled_pieces(alpha: float) -> Replacement:
    """Texts in training are cut into pieces at random (Kudo 2018); in scoring as usual."""

    def replace() -> None:
        usual, score = Tokenizer.encode, learning_run.scores
        training = [True]

        def encode(self: Tokenizer, text: str) -> list[int]:
            if not training[0]:
                return usual(self, text)
            return self.vocabulary.model.encode(text, enable_sampling=True, alpha=alpha, nbest_size=-1)

        def scored(*args: Any) -> dict[str, float]:
            training[0] = False
            try:
                return score(*args)
            finally:
                training[0] = True

        Tokenizer.encode, learning_run.scores = encode, scored  # type: ignore[method-assign]

    return replace


def averaged(keep: float) -> Replacement:
    """Scored are running averages of the weights: `keep` of the average stays at each step."""

    def replace() -> None:
        means: dict[str, Tensor] = {}

        class Averaging(step.OptimizerStep):
            def __call__(self, *args: Any, **settings: Any) -> step.StepResult:
                result = super().__call__(*args, **settings)
                for name, value in self.engine.module.backbone.state_dict().items():
                    means.setdefault(name, value.float().clone()).lerp_(value.float(), 1 - keep)
                return result

        def trained(_: VisionLanguageModel, tokenizer: Tokenizer, recipe: Recipe, *rest: Any) -> TrainedModel:
            model = build_backbone(recipe)
            model.load_state_dict(means)
            return TrainedModel(model.eval(), tokenizer, recipe, *rest)

        step.OptimizerStep = Averaging  # type: ignore[misc]
        learning_run.TrainedModel = trained  # type: ignore[assignment, misc]

    return replace


def earlier_layer(layers: int) -> Replacement:
    """Embeddings are read so many layers before the last."""

    def replace() -> None:
        decode, head = VisionLanguageModel._decode, retrieval_head.RetrievalHead.forward
        kept: list[Tensor] = []

        def keeping(self: VisionLanguageModel, *args: Any) -> Any:
            layer = self.layers[len(self.layers) - 1 - layers]
            handle = layer.register_forward_hook(lambda _m, _i, out: kept.append(self.norm(out[0])))
            try:
                return decode(self, *args)
            finally:
                handle.remove()

        def forward(self: retrieval_head.RetrievalHead, hidden: Tensor, *rest: Tensor) -> Any:
            state = kept.pop()
            kept.clear()
            return head(self, state, *rest)

        VisionLanguageModel._decode = keeping  # type: ignore[method-assign]
        retrieval_head.RetrievalHead.forward = forward  # type: ignore[method-assign]

    return replace


def pictures_see_all() -> None:
    """In the decoder a picture's tokens attend to those after them, too; text stays causal."""
    usual, forward = attention._packed_attention, VisionLanguageModel.forward
    of_picture: list[Tensor] = []

    def keeping(self: VisionLanguageModel, batch: Any, *args: Any) -> Any:
        of_picture[:] = [batch.modality_ids != Modality.TEXT]
        return forward(self, batch, *args)

    def attend(packed: Tensor, heads: int, layout: attention.SegmentLayout, causal: bool) -> Tensor:
        if not causal:
            return usual(packed, heads, layout, causal)
        keys, out = (packed.shape[1] - heads) // 2, []
        q, k, v = packed.split((heads, keys, keys), dim=1)
        k, v = (x.repeat_interleave(heads // keys, dim=1) for x in (k, v))
        for bucket in layout.in_buckets.buckets:
            shape = (bucket.segments, bucket.longest, heads, -1)
            dense = [x[bucket.rows].view(shape).transpose(1, 2) for x in (q, k, v)]
            seen = of_picture[0][bucket.rows].view(bucket.segments, 1, bucket.longest)
            mask = torch.ones(bucket.longest, bucket.longest, dtype=torch.bool).tril() | (seen.mT & seen)
            mask = mask.unsqueeze(1) if bucket.key_mask is None else mask.unsqueeze(1) & bucket.key_mask
            # A row of padding that sees nothing would be NaN, and its gradient with it.
            mask = mask | torch.eye(bucket.longest, dtype=torch.bool)
            flat = F.scaled_dot_product_attention(*dense, attn_mask=mask).transpose(1, 2).flatten(0, 1)
            out.append(flat[bucket.valid])
        result, inverse = torch.cat(out), layout.in_buckets.inverse
        return result if inverse is None else result[inverse]

    attention._packed_attention = attend
    VisionLanguageModel.forward = keeping  # type: ignore[method-assign]


def packs_of_half_a_step() -> None:
    """For two micro-steps a step: packs half as long, so that a step sees as many pairs as before."""
    usual = learning_run.sized

    def halved(recipe: Recipe, pairs: int) -> Recipe:
        whole = usual(recipe, pairs)
        cell = recipe.model.vision.merge**2
        half = {"pack_length": whole.data.pack_length // 2, "pack_patches": whole.data.pack_patches // 2 // cell * cell}
        return dataclasses.replace(whole, data=dataclasses.replace(whole.data, **half))

    learning_run.sized = halved


def pairs_of_a_step(pairs: int) -> Replacement:
    """More or fewer pairs a step, and so fewer or more steps."""

    def replace() -> None:
        learning_run._BATCH = pairs

    return replace


class _Convolutions(nn.Module):
    """3 x 3 convolutions of stride 2 down to a patch, in place of one matrix (Xiao et al. 2021).

    For square pictures of 4 x 4 patches of 16 pixels in cells of 2 x 2.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise((3, 24, 48, 96, width)))
        self.norms = nn.ModuleList(nn.GroupNorm(1, channels) for channels in (24, 48, 96))

    @property
    def weight(self) -> Tensor:
        """The encoder asks for its type."""
        weight: Tensor = self.convolutions[0].weight  # type: ignore[assignment]
        return weight

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3 * 16 ** 2] -> [N, width]."""
        whole = F.pad(pixels, (0, 0, 0, -len(pixels) % 16))  # a batch without pictures has one cell
        x = whole.view(-1, 2, 2, 2, 2, 3, 16, 16).permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, 3, 64, 64)
        for convolution, norm in zip(self.convolutions, self.norms, strict=False):
            x = F.gelu(norm(convolution(x)))
        x = self.convolutions[-1](x)
        return x.view(len(x), -1, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(len(whole), -1)[: len(pixels)]


def convolutional_stem() -> None:
    """Patches through convolutions."""
    build = vision.VisionEncoder.__init__

    def with_convolutions(self: vision.VisionEncoder, config: Any) -> None:
        build(self, config)
        self.patch_embedding = _Convolutions(config.width)  # type: ignore[assignment]

    vision.VisionEncoder.__init__ = with_convolutions  # type: ignore[method-assign]
    usual = engine.rules
    engine.rules = lambda recipe: _Rules(usual(recipe))


class _Rules(dict[str, Rule]):
    """Also of tensors that the planner does not know."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Rule:
        return Rule()


def task_gradients() -> None:
    """Adds to each point the norm of each term's gradient, and the cosine of captions' and retrieval's, over all shared
    parameters and over the vision tower, on the packs of that step."""
    score = learning_run.scores
    last: list[Any] = []

    class Keeping(step.OptimizerStep):
        def __call__(self, batches: Any, counts: Any, part_norms: bool = False) -> step.StepResult:
            last[:] = [self.engine.module, batches[0], counts]
            return super().__call__(batches, counts, part_norms)

    def scored(*args: Any) -> dict[str, float]:
        model, batch, counts = last
        with torch.enable_grad():
            sums = model(batch)[0].loss_sums
            named = dict(model.named_parameters())
            found = {}
            for term, value in sums.items():
                gradients = torch.autograd.grad(
                    value / counts[term], list(named.values()), retain_graph=True, allow_unused=True
                )
                found[term] = {name: g for name, g in zip(named, gradients, strict=True) if g is not None}
        metrics = {f"norm_{term}": _norm(list(values.values())) for term, values in found.items()}
        for part in ("all", *PARTS):
            shared = [
                name for name in named if all(name in of_term for of_term in found.values())
                and part in ("all", part_of(name))
            ]  # fmt: skip
            if not shared:
                continue
            a, b = ([of_term[name] for name in shared] for of_term in found.values())
            product = sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
            metrics[f"cosine_{part}"] = product / max(_norm(a) * _norm(b), 1e-30)
        return score(*args) | metrics

    step.OptimizerStep = Keeping  # type: ignore[misc]
    learning_run.scores = scored


def _norm(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradients))
