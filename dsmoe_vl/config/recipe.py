"""The recipe: every setting that DeepSpeed does not know, as frozen dataclasses read from TOML.

Batch sizes, optimizer, scheduler, precision, ZeRO and expert parallelism belong to the DeepSpeed JSON and have no
field here. A field's comment gives its unit; constraints between fields are checked in `resolve.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PIPE = "pipe:"  # begins the path of a source that a shell command reads


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

    backend: str = "dropless"  # "dropless": every assignment is computed; "capacity": DeepSpeed's classic MoE, ZeRO 0-2
    experts: int = 8  # E; routed experts a layer
    experts_per_layer: tuple[int, ...] = ()  # E of every MoE layer, the largest being `experts`; none: all alike
    top_k: int = 2  # K; experts a token
    ffn_width: int = 1408  # F; hidden width of one expert
    shared_ffn_width: int = 0  # hidden width of the always-on shared expert; 0: none
    first_dense_layers: int = 1  # the first decoder layers that stay dense
    # What the gate reads: "token" (token, task and modality), "plain" (token), "task", or "isolated" (by modality).
    routing: str = "token"
    balance_weight: float = 0.01  # coefficient of the load-balance loss; 0: off, as for all below
    balance_over: str = "all"  # tokens among which load is balanced: "all", those of a "task", or of a "modality"
    z_weight: float = 0.001  # coefficient of the router z-loss
    local_entropy_weight: float = 0.0  # of LIMoE's local loss: sure routing of every token
    global_entropy_weight: float = 0.0  # of LIMoE's global loss: many experts for every modality
    global_entropy_experts: float = 4.0  # experts that a modality should use at least; where the global loss ends
    mutual_information_weight: float = 0.0  # of minus the mutual information between tasks and experts
    bias_rate: float = 0.0  # step of the aux-loss-free balancing bias, in probability; 0: no bias
    # With backend "capacity" only:
    drop_tokens: bool = True  # an expert computes so many assignments of a rank's micro-step; false: all of them
    capacity_factor: float = 1.25  # that many, relative to an even share K T / E of the T tokens, padding included
    eval_capacity_factor: float = 2.0  # the same outside training
    min_capacity: int = 4  # assignments; an expert takes as many at least
    random_token_selection: bool = False  # who is dropped in training is random, not the last; needs top_k = 1
    noisy_gate: str = (
        ""  # noise on routing in training: "RSample" (Gumbel on z, top_k = 1), "Jitter" (1 % of x), or none
    )
    residual: bool = False  # PR-MoE: every token also goes through one more expert, with a learned share


@dataclass(frozen=True)
class CaptionConfig:
    """Captioning of images and videos."""

    weight: float = 1.0  # w_i; 0: the task is not learned
    word_dropout: float = 0.0  # share of a caption's tokens that training hides from the words that follow them


@dataclass(frozen=True)
class RetrievalConfig:
    """Image-text and video-text retrieval."""

    weight: float = 0.0  # w_i; 0: the task is not learned
    loss: str = "info_nce"  # or "sigmoid"
    embedding_width: int = 512
    gradient_cache: bool = False  # contrast over all accumulation steps together, at the cost of a second forward


@dataclass(frozen=True)
class SummaryConfig:
    """Video summarization: the text, and how much each frame matters."""

    weight: float = 0.0  # w_i of the text; 0: the task is not learned
    importance_weight: float = 1.0  # of the regression to the annotators' mean
    ranking_weight: float = 1.0  # of the comparison of pairs of frames
    ranking_margin: float = 0.1  # difference in importance, 0 to 1, from which two frames are compared


@dataclass(frozen=True)
class TasksConfig:
    """The tasks that the model learns."""

    caption: CaptionConfig = field(default_factory=CaptionConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    summary: SummaryConfig = field(default_factory=SummaryConfig)


@dataclass(frozen=True)
class L1Config:
    """The term lambda Omega(theta), Omega = sum_g c_g ||theta_g||_1; Omega over all parameters: every c_g = 1."""

    weight: float = 0.0  # lambda; a weight stays 0 while |m / sqrt(v)| of AdamW is below lambda c_g; 0: no term
    experts: float = 1.0  # c_g of the routed experts
    matrices: float = 0.0  # c_g of every other weight matrix, embeddings and routers included
    vectors: float = 0.0  # c_g of norms and biases


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised besides the tasks' losses and the balancing terms."""

    l1: L1Config = field(default_factory=L1Config)


@dataclass(frozen=True)
class SourceConfig:
    """One stream of shards: a folder with an `index.json`, here or elsewhere."""

    name: str = ""
    # A folder, relative to the working directory; the URL of one (http, https, and what fsspec knows: s3, gs, ...); or
    # "pipe:COMMAND", a shell command that writes the file {} of a folder to its standard output.
    path: str = ""
    weight: float = 1.0  # relative sampling weight, in samples
    tasks: tuple[str, ...] = ()  # that its samples are used for; none: every task of the recipe that they can serve


@dataclass(frozen=True)
class DataConfig:
    """What the packs are made of."""

    sources: tuple[SourceConfig, ...] = ()
    evaluation: tuple[SourceConfig, ...] = ()  # held-out shards; weights are ignored
    temperature: float = 1.0  # of the mixture: sources are drawn in proportion to weight ** (1 / temperature)
    pack_length: int = 4096  # L; tokens in a pack
    pack_patches: int = 8192  # P; image patches in a pack
    image_max_patches: int = 1024  # patches of one image, aspect ratio kept
    frame_max_patches: int = 256  # patches of one video frame
    video_frames: int = 8  # frames of a video, at most
    # Which: "uniform" in time; "fps": `video_fps`, as long as video_frames are enough; "keyframes" of the codec.
    video_sampling: str = "uniform"
    video_fps: float = 1.0  # frames a second, with "fps"
    frame_pool: int = 2  # frame_pool x frame_pool vision tokens of a frame are averaged into one
    lanes: int = 64  # virtual readers; a multiple of (data-parallel ranks x workers); fixed for the life of a run
    lookahead: int = 32  # samples among which the packer looks for the best fit
    shuffle_block: int = 256  # samples read and shuffled together
    workers: int = 2  # loader processes a rank; 0: in the training process
    max_bad_fraction: float = 0.01  # error budget: bad samples over samples read, per source
    # Of sources whose path is not a local folder:
    cache: str = "~/.cache/dsmoe_vl/shards"  # folder on a local disk; processes and runs of a host share its shards
    cache_gib: float = 200.0  # GiB; beyond it the least recently used shards are removed from the cache; 0: no limit
    fetch_patience_seconds: float = 300.0  # seconds for which storage that fails is tried again; then the run ends
    allow_pipe: bool = False  # a path may be "pipe:COMMAND", which runs a shell


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
    samples_every: int = 500  # optimizer steps at least between pictures of held-out samples, at checkpoints; 0: none
    router_every: int = 100  # optimizer steps between records of the routers (router.npz, heat maps); 0: none
    profile_steps: tuple[int, ...] = ()  # the first and the last optimizer step of a profiler's trace; none: no trace


@dataclass(frozen=True)
class Recipe:
    """A whole recipe file. One TOML table a field."""

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    run: RunConfig = field(default_factory=RunConfig)


def learned_tasks(recipe: Recipe) -> tuple[str, ...]:
    """The tasks with a weight above 0, in the order of the recipe."""
    return tuple(name for name, task in vars(recipe.tasks).items() if task.weight > 0)
