"""Language models of other makers: what their config.json means, and which of their tensors ours are made of. Both are
read in both directions, to import and to export.

Read: Qwen3 and Qwen3-MoE, Qwen2, Qwen2.5 and Qwen2-MoE, Llama and what has its form (TinyLlama, SmolLM), Mistral,
Mixtral, OLMoE. Ernie 4.5 MoE is written only. The names of tensors are those on disk.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dsmoe_vl.config.model import ModelConfig, MoEConfig
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.moe.expert_names import expert_name
from dsmoe_vl.pretrained.mapping import (
    Target,
    expert_of,
    expert_targets,
    halved,
    joined,
    one_row,
    only_row,
    qkv,
    split_qkv,
    turned,
    turned_back,
)
from dsmoe_vl.pretrained.rope import read_base, read_scaling, read_sections, rope_config


@dataclass(frozen=True)
class _Family:
    """What a model type has in common, beside the numbers of its config.json. `architecture`: transformers' class."""

    architecture: str
    qk_norm: str = "none"
    qkv_bias: bool = False
    sparse: bool = False
    renormalise: bool | None = None  # None: config.json says it
    experts_in: str = "mlp"  # the module of router and experts
    expert_names: tuple[str, str, str] = ("gate_proj", "down_proj", "up_proj")
    shared: str = ""  # the module of a shared expert
    shared_gate: bool = False
    selection_bias: str = ""  # added to the probabilities for the choice of experts
    pairs: bool = False  # rotary pairs are side by side, as ours


FAMILIES = {
    "qwen3": _Family("Qwen3ForCausalLM", qk_norm="head"),
    "qwen3_moe": _Family("Qwen3MoeForCausalLM", qk_norm="head", sparse=True),
    "qwen2": _Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen2_moe": _Family(
        "Qwen2MoeForCausalLM", qkv_bias=True, sparse=True, shared="shared_expert", shared_gate=True
    ),
    "llama": _Family("LlamaForCausalLM"),
    "mistral": _Family("MistralForCausalLM"),
    "mixtral": _Family(
        "MixtralForCausalLM", sparse=True, renormalise=True, experts_in="block_sparse_moe",
        expert_names=("w1", "w2", "w3"),
    ),
    "olmoe": _Family("OlmoeForCausalLM", qk_norm="width", sparse=True),
}  # fmt: skip
WRITTEN_ONLY = {
    "ernie4_5_moe": _Family(
        "Ernie4_5_MoeForCausalLM", sparse=True, renormalise=True, shared="shared_experts",
        selection_bias="moe_statics.e_score_correction_bias", pairs=True,
    ),
}  # fmt: skip
_ALWAYS_WINDOWED = ("mistral", "mixtral")  # others say it with use_sliding_window
_NEAREST = {
    "qwen2_5": "qwen2",
    "gemma": "llama",
    "phi3": "llama",
    "deepseek_v2": "qwen2_moe",
    "deepseek_v3": "qwen3_moe",
}


@dataclass(frozen=True)
class Decoder:
    """A language model in a folder: the settings of ours that it needs, and how to find its tensors."""

    model: ModelConfig
    moe: MoEConfig | None  # None: all layers are dense
    vocab_size: int
    first_dense_layers: int
    kind: str  # the model_type of config.json
    prefix: str = "model."
    head: str = "lm_head.weight"
    has_stacks: bool = False  # one tensor has the matrices of all experts, as in Qwen3-VL-MoE

    @property
    def family(self) -> _Family:
        """What the kind has in common."""
        return (FAMILIES | WRITTEN_ONLY)[self.kind]

    def targets(self) -> Iterator[Target]:
        """The tensors of our decoder, with embedding and output projection."""
        yield Target("embedding.weight", (f"{self.prefix}embed_tokens.weight",))
        if not self.model.tied:
            yield Target("head.weight", (self.head,))
        yield Target("norm.weight", (f"{self.prefix}norm.weight",))
        for index in range(self.model.layers):
            theirs, ours = f"{self.prefix}layers.{index}.", f"layers.{index}."
            yield Target(f"{ours}attention_norm.weight", (f"{theirs}input_layernorm.weight",))
            yield Target(f"{ours}feed_forward_norm.weight", (f"{theirs}post_attention_layernorm.weight",))
            yield from self._attention(f"{theirs}self_attn.", f"{ours}attention.")
            if index < self.first_dense_layers:
                yield from _swiglu(f"{theirs}mlp.", f"{ours}feed_forward.")
            else:
                yield from self.sparse(f"{theirs}{self.family.experts_in}.", f"{ours}feed_forward.")

    def _attention(self, theirs: str, ours: str) -> Iterator[Target]:
        model, width, turn = self.model, self.model.width_of_head, not self.family.pairs
        order = "queries, keys and values; rotary pairs side by side"
        undo = split_qkv(width, model.heads, model.kv_heads, turn)
        for kind in ("weight", "bias")[: 1 + model.qkv_bias]:
            sources = tuple(f"{theirs}{part}_proj.{kind}" for part in "qkv")
            yield Target(f"{ours}qkv.{kind}", sources, qkv(width) if turn else joined, order, undo)
        yield Target(f"{ours}out.weight", (f"{theirs}o_proj.weight",))
        for part in "qk" if model.qk_norm != "none" else "":
            name, sources = f"{ours}{part}_norm.weight", (f"{theirs}{part}_norm.weight",)
            yield Target(name, sources, turned(width), "rotary pairs side by side", turned_back(width))

    def sparse(self, theirs: str, ours: str) -> Iterator[Target]:
        """Of one layer with experts: the tensors under `ours`, from those under `theirs`."""
        assert self.moe is not None
        yield Target(f"{ours}router.weight", (f"{theirs}gate.weight",))
        yield from self._stacked(self.moe, theirs, ours) if self.has_stacks else ()
        for number in range(0 if self.has_stacks else self.moe.experts):
            names = [f"{theirs}experts.{number}.{name}.weight" for name in self.family.expert_names]
            yield from expert_targets(f"{ours}experts", number, (names[0], names[1], names[2]))
        if self.family.selection_bias:
            sources = (f"{theirs}{self.family.selection_bias}",)
            yield Target(f"{ours}router.selection_bias", sources, only_row, "its only row", one_row)
        if self.family.shared and self.moe.shared_ffn_width:
            yield from _swiglu(f"{theirs}{self.family.shared}.", f"{ours}shared.")
        if self.family.shared_gate:
            yield Target(f"{ours}shared.gate.weight", (f"{theirs}{self.family.shared}_gate.weight",))

    def _stacked(self, moe: MoEConfig, theirs: str, ours: str) -> Iterator[Target]:
        """Those of one source follow each other, so that it is read once."""
        width, hidden = self.model.width, moe.ffn_width
        both, down = (2 * hidden, width), (width, hidden)
        numbers = range(moe.experts)
        names = {w: [expert_name(f"{ours}experts.{w}", n) for n in numbers] for w in ("w1", "w2", "w3")}
        for n in numbers:
            for weight, rows in (("w1", slice(hidden)), ("w3", slice(hidden, None))):
                how = f"expert {n}, rows from {rows.start or 0} on"
                make, source = expert_of(n, both, rows), f"{theirs}experts.gate_up_proj"
                yield Target(names[weight][n], (source,), make, how, stack=moe.experts)
        for n in numbers:
            make, source = expert_of(n, down, slice(None)), f"{theirs}experts.down_proj"
            yield Target(names["w2"][n], (source,), make, f"expert {n}", stack=moe.experts)

    def config(self, positions: int) -> dict[str, Any]:
        """The keys of config.json that say these settings, for transformers 4 and 5; `read_decoder` reads them back.

        positions: the longest sequence that the model was trained on.
        """
        model, moe = self.model, self.moe
        found: dict[str, Any] = {
            "architectures": [self.family.architecture], "model_type": self.kind, "hidden_size": model.width,
            "intermediate_size": model.ffn_width, "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads,
            "head_dim": model.width_of_head, "hidden_act": "silu", "max_position_embeddings": positions,
            "rms_norm_eps": model.norm_eps, **rope_config(model), "tie_word_embeddings": model.tied,
            "vocab_size": self.vocab_size,
        }  # fmt: skip
        if moe is None:
            return found
        dense = self.first_dense_layers
        if self.kind == "ernie4_5_moe":
            return found | {
                "moe_num_experts": moe.experts, "moe_k": moe.top_k, "moe_intermediate_size": moe.ffn_width,
                "moe_num_shared_experts": moe.shared_ffn_width // moe.ffn_width, "moe_layer_start_index": dense,
                "moe_layer_end_index": model.layers - 1, "moe_layer_interval": 1, "use_bias": False,
                "router_aux_loss_coef": moe.balance_weight,
            }  # fmt: skip
        found |= {"num_experts_per_tok": moe.top_k, "router_aux_loss_coef": moe.balance_weight}
        if self.kind == "mixtral":
            return found | {
                "num_local_experts": moe.experts, "intermediate_size": moe.ffn_width, "sliding_window": None,
            }  # fmt: skip
        found |= {"num_experts": moe.experts, "norm_topk_prob": moe.renormalise}
        if self.kind == "olmoe":
            return found | {"intermediate_size": moe.ffn_width, "clip_qkv": None}
        found |= {"moe_intermediate_size": moe.ffn_width, "decoder_sparse_step": 1}
        if self.family.shared:
            found["shared_expert_intermediate_size"] = moe.shared_ffn_width
        return found | {"mlp_only_layers": list(range(dense))}


def _swiglu(theirs: str, ours: str) -> Iterator[Target]:
    both = (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight")
    yield Target(f"{ours}gate_up.weight", both, joined, "gate and up", halved)
    yield Target(f"{ours}down.weight", (f"{theirs}down_proj.weight",))


def read_decoder(config: Mapping[str, Any], names: Collection[str], place: str) -> Decoder:
    """From a config.json and the names of the tensors. `place`: the file, for messages. Raises ConfigError."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        near = _NEAREST.get(str(kind))
        hint = f"; the nearest that is: {near}" if near else ""
        raise ConfigError(f"{place}: model_type = {kind!r} is not read, but {', '.join(FAMILIES)} are{hint}")
    family = FAMILIES[kind]
    _refuse(config, place)

    def need(*keys: str) -> Any:
        for key in keys:
            if config.get(key) is not None:
                return config[key]
        raise ConfigError(f"{place}: {' or '.join(keys)} is missing, and a guess would be wrong without a word: add it")

    width, heads = need("hidden_size"), need("num_attention_heads")
    head_width = config.get("head_dim") or width // heads
    model = ModelConfig(
        width=width, layers=need("num_hidden_layers"), heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads, ffn_width=need("intermediate_size"),
        rope_base=read_base(config, place), head_width=0 if head_width * heads == width else head_width,
        norm_eps=need("rms_norm_eps"), qk_norm=family.qk_norm, qkv_bias=family.qkv_bias,
        tied="lm_head.weight" not in names, rope_sections=read_sections(config, place),
        rope_scaling=read_scaling(config, place),
    )  # fmt: skip
    if not family.sparse:
        return Decoder(model, None, need("vocab_size"), model.layers, kind)
    moe = MoEConfig(
        experts=need("num_experts", "num_local_experts"), top_k=need("num_experts_per_tok"),
        ffn_width=need("moe_intermediate_size", "intermediate_size"),
        shared_ffn_width=need("shared_expert_intermediate_size") if family.shared else 0,
        shared_gate=family.shared_gate, first_dense_layers=_dense_layers(config, place),
        renormalise=bool(need("norm_topk_prob")) if family.renormalise is None else family.renormalise,
        routing="plain", balance_weight=need("router_aux_loss_coef"), z_weight=0.0,
    )  # fmt: skip
    return Decoder(model, moe, need("vocab_size"), moe.first_dense_layers, kind)


def _refuse(config: Mapping[str, Any], place: str) -> None:
    """Refuse what our decoder would compute otherwise, without a word."""
    windowed = config["model_type"] in _ALWAYS_WINDOWED or config.get("use_sliding_window")
    unlike = {
        "hidden_act": ("silu", config.get("hidden_act", "silu")),
        "mlp_bias": (False, bool(config.get("mlp_bias"))),
        "attention_bias": (False, bool(config.get("attention_bias"))),
        "clip_qkv": (None, config.get("clip_qkv")),
        "sliding_window": (None, config.get("sliding_window") if windowed else None),
    }
    for key, (ours, theirs) in unlike.items():
        if theirs != ours:
            raise ConfigError(f"{place}: {key} = {theirs!r} is not read; models with {ours!r} are")


def _dense_layers(config: Mapping[str, Any], place: str) -> int:
    """The first layers that are dense. Raises ConfigError where others are."""
    layers, step = config["num_hidden_layers"], config.get("decoder_sparse_step", 1)
    dense = set(config.get("mlp_only_layers") or ()) | {n for n in range(layers) if (n + 1) % step}
    if dense != set(range(len(dense))):
        raise ConfigError(f"{place}: layers {sorted(dense)} are dense; only the first ones may be")
    return len(dense)
