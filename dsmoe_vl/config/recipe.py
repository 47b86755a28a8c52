"""The recipe: every setting that DeepSpeed does not know, as frozen dataclasses read from TOML.

Batch sizes, optimizer, scheduler, precision, ZeRO and expert parallelism belong to the DeepSpeed JSON and have no
field here. A field's comment gives its unit; constraints between fields are checked in `resolve.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder: a bidirectional transformer over the patches of one image or one frame."""

    patch_size: int = 16  # pixels, side of a square patch
    merge: int = 2  # merge x merge neighbouring patches become one vision token in the decoder
    width: int = 1024  # model width of the encoder
    layers: int = 24
    heads: int = 16
    ffn_width: int = 4096  # hidden width of the SwiGLU feed-forward


@dataclass(frozen=True)
class ModelConfig:
    """The decoder: a causal transformer whose feed-forwards are dense or MoE."""

    width: int = 2048  # D
    layers: int = 24
    heads: int = 16  # query heads
    kv_heads: int = 8  # key/value heads; divides `heads`
    ffn_width: int = 5632  # hidden width of the dense SwiGLU layers
    rope_base: float = 10000.0
    vision: VisionConfig = field(default_factory=VisionConfig)


@dataclass(frozen=True)
class MoEConfig:
    """The sparse feed-forwards."""

    experts: int = 8  # E; routed experts a layer
    top_k: int = 2  # K; experts a token
    ffn_width: int = 1408  # F; hidden width of one expert
    shared_ffn_width: int = 0  # hidden width of the always-on shared expert; 0: none
    first_dense_layers: int = 1  # the first decoder layers that stay dense
    balance_weight: float = 0.01  # coefficient of the load-balance loss; 0: off
    z_weight: float = 0.001  # coefficient of the router z-loss; 0: off


@dataclass(frozen=True)
class TaskConfig:
    """One task's place in the objective."""

    weight: float = 1.0  # w_i


@dataclass(frozen=True)
class TasksConfig:
    """The tasks that the model learns."""

    caption: TaskConfig = field(default_factory=TaskConfig)


@dataclass(frozen=True)
class SourceConfig:
    """One stream of shards: a folder with an `index.json`."""

    name: str = ""
    path: str = ""  # folder; relative to the working directory
    weight: float = 1.0  # relative sampling weight, in samples


@dataclass(frozen=True)
class DataConfig:
    """What the packs are made of."""

    sources: tuple[SourceConfig, ...] = ()
    evaluation: tuple[SourceConfig, ...] = ()  # held-out shards; weights are ignored
    pack_length: int = 4096  # L; tokens in a pack
    pack_patches: int = 8192  # P; image patches in a pack
    image_max_patches: int = 1024  # patches of one image, aspect ratio kept
    frame_max_patches: int = 256  # patches of one video frame
    video_frames: int = 8  # frames sampled uniformly from a video
    frame_pool: int = 2  # frame_pool x frame_pool vision tokens of a frame are averaged into one
    lanes: int = 64  # virtual readers; a multiple of (data-parallel ranks x workers); fixed for the life of a run
    lookahead: int = 32  # samples among which the packer looks for the best fit
    shuffle_block: int = 256  # samples read and shuffled together
    workers: int = 2  # loader processes a rank; 0: in the training process
    max_bad_fraction: float = 0.01  # error budget: bad samples over samples read, per source


@dataclass(frozen=True)
class TokenizerConfig:
    """The SentencePiece model."""

    path: str = ""  # a tokenizer.model file
    vocab_size: int = 32000  # rows of the embedding table; at least the tokenizer's own size


@dataclass(frozen=True)
class RunConfig:
    """The run itself."""

    name: str = "run"  # the run directory is `directory`/`name`
    directory: str = "runs"
    steps: int = 1000  # optimizer steps
    seed: int = 1
    log_every: int = 10  # optimizer steps
    evaluate_every: int = 500  # optimizer steps; 0: only at the end
    evaluate_packs: int = 64  # packs of held-out data per evaluation, over all ranks
    checkpoint_every: int = 500  # optimizer steps
    keep_checkpoints: int = 2  # newest complete checkpoints that stay on disk


@dataclass(frozen=True)
class Recipe:
    """A whole recipe file. One TOML table a field."""

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
