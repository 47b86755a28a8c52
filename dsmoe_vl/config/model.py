"""The settings of the model: encoders, decoder and sparse feed-forwards. They are tables of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsmoe_vl.config.bounds import bounded
from dsmoe_vl.config.rope import RopeScalingConfig


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder: a bidirectional transformer over the patches of one image or one frame."""

    patch_size: int = bounded(16, least=1)  # pixels; side of a square patch
    merge: int = bounded(2, least=1)  # merge x merge neighbouring patches become one vision token in the decoder
    width: int = bounded(1024, least=1)  # model width of the encoder
    layers: int = bounded(24, least=1)
    heads: int = bounded(16, least=1)
    ffn_width: int = bounded(4096, least=1)  # hidden width of the feed-forward
    # The following keys are for weights that were trained elsewhere.
    norm: str = bounded("rms", choices=("rms", "layer"))  # RMSNorm or LayerNorm
    norm_eps: float = bounded(1e-6, above=0)
    bias: bool = False  # of queries, keys, values and their output
    qk_norm: bool = True  # RMSNorm of each head's queries and keys
    # SwiGLU without biases, or two matrices with biases and one of the kinds of GELU between them
    ffn: str = bounded("swiglu", choices=("swiglu", "gelu", "gelu_tanh", "quick_gelu"))
    layer_scale: bool = False  # a learned factor per feature on what attention and feed-forward add
    positions: str = bounded("rotary", choices=("rotary", "learned", "learned+rotary"))
    rope_base: float = bounded(100.0, least=1)
    position_grid: int = bounded(0, least=0)  # side of the learned table, in patches
    # how the table is resized to the grid of a picture: `model/positions.py`
    position_resize: str = bounded("bilinear", choices=("bilinear", "bicubic", "align_corners"))
    prefix_tokens: int = bounded(0, least=0)  # class token and registers before the patches of a picture
    pre_norm: bool = False  # a norm before the first layer
    final_norm: bool = True
    # LayerNorm of what is joined to a cell: of each patch, or of all together; or none
    connector_norm: str = bounded("none", choices=("none", "patch", "joined"))
    connector_norm_eps: float = bounded(1e-5, above=0)
    connector_width: int = bounded(0, least=0)  # hidden width of the connector; 0: the decoder's width
    # factor of the first values that the connector puts out, whose root mean square is about 1.5 without; the text that
    # an imported decoder knows has a tenth of that, and pictures would drown it
    connector_scale: float = bounded(1.0, above=0)
    # DeepStack: encoder layers, from 0 and in order; what leaves the n-th of them is added after decoder layer n
    taps: tuple[int, ...] = ()
    place_and_time: bool = True  # the connector adds the place of a cell in its picture and of a frame in its video
    # a vision token is its cell and the embedding of <image> or <video>, or its cell alone
    placeholder: str = bounded("add", choices=("add", "replace"))


FRAMES_OF_STATE = 4  # log-mel frames of 10 ms that become one state of the speech encoder
SECONDS_OF_STATE = 0.01 * FRAMES_OF_STATE


@dataclass(frozen=True)
class SpeechConfig:
    """The speech encoder: two strided convolutions over log-mel frames, then a bidirectional transformer."""

    layers: int = bounded(0, least=0)  # 0: the model has no speech encoder
    width: int = bounded(256, least=1)  # model width of the encoder
    heads: int = bounded(4, least=1)
    ffn_width: int = bounded(768, least=1)  # hidden width of the feed-forward, a SwiGLU
    bands: int = bounded(80, least=1)  # of the mel scale, up to 8 kHz
    merge: int = bounded(6, least=1, most=25)  # neighbouring states of 40 ms become one speech token in the decoder


@dataclass(frozen=True)
class ModelConfig:
    """The decoder: a causal transformer whose feed-forwards are dense or MoE."""

    width: int = bounded(2048, least=1)  # D
    layers: int = bounded(24, least=1)
    heads: int = bounded(16, least=1)  # query heads
    kv_heads: int = bounded(8, least=1)  # key/value heads; divides `heads`
    ffn_width: int = bounded(5632, least=1)  # hidden width of the dense SwiGLU layers
    rope_base: float = bounded(10000.0, least=1)
    # a folder that launch/import_hf.py wrote: training starts from its weights, and its settings need not be given
    init_from: str = ""
    # vectors of words in the format of word2vec: pieces that are such a word start from its vector
    embedding_from: str = ""
    # The following keys are for weights that were trained elsewhere.
    head_width: int = bounded(0, least=0)  # d; 0: width / heads
    norm_eps: float = bounded(1e-6, above=0)  # of every RMSNorm of the decoder
    # RMSNorm of queries and keys before their rotation: of each head, of all heads together, or none
    qk_norm: str = bounded("head", choices=("head", "width", "none"))
    qkv_bias: bool = False  # biases of queries, keys and values
    tied: bool = True  # the output projection is the token embedding
    # rotary pairs that turn with time, row and column of a token (interleaved MRoPE); empty: all with its position
    rope_sections: tuple[int, ...] = ()
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    speech: SpeechConfig = field(default_factory=SpeechConfig)

    @property
    def width_of_head(self) -> int:
        """d."""
        return self.head_width or self.width // self.heads

    @property
    def hears(self) -> bool:
        """Whether the model has a speech encoder."""
        return self.speech.layers > 0

    @property
    def modalities(self) -> int:
        """M, that the router tells apart: text, images, videos and, if the model hears, speech."""
        return 4 if self.hears else 3


@dataclass(frozen=True)
class MoEConfig:
    """The sparse feed-forwards."""

    # "dropless": every assignment is computed; "capacity": DeepSpeed's classic MoE, ZeRO 0-2
    backend: str = bounded("dropless", choices=("dropless", "capacity"))
    experts: int = bounded(8, least=1)  # E; routed experts per layer
    experts_per_layer: tuple[int, ...] = ()  # E of each MoE layer, maximum `experts`; empty: all layers equal
    top_k: int = bounded(2, least=1)  # K; experts per token
    ffn_width: int = bounded(1408, least=1)  # F; hidden width of one expert
    shared_ffn_width: int = bounded(0, least=0)  # hidden width of the shared expert of every token; 0: none
    shared_gate: bool = False  # the shared expert's output is times a learned sigmoid of the token
    renormalise: bool = True  # the gates of a token's K experts sum to 1; false: they are their softmax probabilities
    first_dense_layers: int = bounded(1, least=0)  # number of dense decoder layers before the MoE layers
    # Router input: "token" (token, task, modality), "plain" (token), "task"; "isolated": "token", experts by modality.
    routing: str = bounded("token", choices=("token", "plain", "task", "isolated"))
    balance_weight: float = bounded(0.01, least=0)  # coefficient of the load-balance loss; 0: off, as for all below
    # balance the load over "all" tokens, per "task" or per "modality"
    balance_over: str = bounded("all", choices=("all", "task", "modality"))
    z_weight: float = bounded(0.001, least=0)  # coefficient of the router z-loss
    local_entropy_weight: float = bounded(0.0, least=0)  # of LIMoE's local entropy loss: low entropy per token
    global_entropy_weight: float = bounded(0.0, least=0)  # of LIMoE's global entropy loss: many experts per modality
    # experts that each modality should use at least; the global entropy loss is 0 from there
    global_entropy_experts: float = bounded(4.0, least=1)
    # of the negative mutual information between tasks and experts
    mutual_information_weight: float = bounded(0.0, least=0)
    bias_rate: float = bounded(0.0, least=0)  # step of the aux-loss-free balancing bias, in probability; 0: no bias
    # With backend "capacity" only:
    drop_tokens: bool = True  # limit the assignments per expert, rank and micro-step; false: no limit
    # that limit, relative to the even share K T / E of T tokens, padding included
    capacity_factor: float = bounded(1.25, above=0)
    eval_capacity_factor: float = bounded(2.0, above=0)  # the same in evaluation
    min_capacity: int = bounded(4, least=0)  # assignments; the limit is at least this
    random_token_selection: bool = False  # in training, drop random tokens, not the last ones; needs top_k = 1
    noisy_gate: str = ""  # routing noise in training: "RSample" (Gumbel on z, top_k = 1), "Jitter" (1 % of x), "": none
    residual: bool = False  # PR-MoE: one more expert for every token, with a learned weight
