"""The recipe: every setting that DeepSpeed does not know, as frozen dataclasses read from TOML.

Batch sizes, optimizer, scheduler, precision, ZeRO and expert parallelism belong to the DeepSpeed JSON and have no
field here. A field's comment gives its unit. Bounds of one field stand beside it, rules between fields in
`checks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Any

from dsmoe_vl.config.bounds import bounded
from dsmoe_vl.config.task_table import TASKS, TaskSpec

PIPE = "pipe:"  # begins the path of a source that a shell command reads


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder: a bidirectional transformer over the patches of one image or one frame."""

    patch_size: int = bounded(16, least=1)  # pixels, side of a square patch
    merge: int = bounded(2, least=1)  # merge x merge neighbouring patches become one vision token in the decoder
    width: int = bounded(1024, least=1)  # model width of the encoder
    layers: int = bounded(24, least=1)
    heads: int = bounded(16, least=1)
    ffn_width: int = bounded(4096, least=1)  # hidden width of the SwiGLU feed-forward


@dataclass(frozen=True)
class ModelConfig:
    """The decoder: a causal transformer whose feed-forwards are dense or MoE."""

    width: int = bounded(2048, least=1)  # D
    layers: int = bounded(24, least=1)
    heads: int = bounded(16, least=1)  # query heads
    kv_heads: int = bounded(8, least=1)  # key/value heads; divides `heads`
    ffn_width: int = bounded(5632, least=1)  # hidden width of the dense SwiGLU layers
    rope_base: float = bounded(10000.0, least=1)
    vision: VisionConfig = field(default_factory=VisionConfig)


@dataclass(frozen=True)
class MoEConfig:
    """The sparse feed-forwards."""

    # "dropless": every assignment is computed; "capacity": DeepSpeed's classic MoE, ZeRO 0-2
    backend: str = bounded("dropless", choices=("dropless", "capacity"))
    experts: int = bounded(8, least=1)  # E; routed experts a layer
    experts_per_layer: tuple[int, ...] = ()  # E of every MoE layer, the largest being `experts`; none: all alike
    top_k: int = bounded(2, least=1)  # K; experts a token
    ffn_width: int = bounded(1408, least=1)  # F; hidden width of one expert
    shared_ffn_width: int = bounded(0, least=0)  # hidden width of the always-on shared expert; 0: none
    first_dense_layers: int = bounded(1, least=0)  # the first decoder layers that stay dense
    # What the gate reads: "token" (token, task and modality), "plain" (token), "task", or "isolated" (by modality).
    routing: str = bounded("token", choices=("token", "plain", "task", "isolated"))
    balance_weight: float = bounded(0.01, least=0)  # coefficient of the load-balance loss; 0: off, as for all below
    # tokens among which load is balanced: "all", those of a "task", or of a "modality"
    balance_over: str = bounded("all", choices=("all", "task", "modality"))
    z_weight: float = bounded(0.001, least=0)  # coefficient of the router z-loss
    local_entropy_weight: float = bounded(0.0, least=0)  # of LIMoE's local loss: sure routing of every token
    global_entropy_weight: float = bounded(0.0, least=0)  # of LIMoE's global loss: many experts for every modality
    # experts that a modality should use at least; where the global loss ends
    global_entropy_experts: float = bounded(4.0, least=1)
    # of minus the mutual information between tasks and experts
    mutual_information_weight: float = bounded(0.0, least=0)
    bias_rate: float = bounded(0.0, least=0)  # step of the aux-loss-free balancing bias, in probability; 0: no bias
    # With backend "capacity" only:
    drop_tokens: bool = True  # an expert computes so many assignments of a rank's micro-step; false: all of them
    # that many, relative to an even share K T / E of the T tokens, padding included
    capacity_factor: float = bounded(1.25, above=0)
    eval_capacity_factor: float = bounded(2.0, above=0)  # the same outside training
    min_capacity: int = bounded(4, least=0)  # assignments; an expert takes as many at least
    random_token_selection: bool = False  # who is dropped in training is random, not the last; needs top_k = 1
    noisy_gate: str = (
        ""  # noise on routing in training: "RSample" (Gumbel on z, top_k = 1), "Jitter" (1 % of x), or none
    )
    residual: bool = False  # PR-MoE: every token also goes through one more expert, with a learned share


_TaskSettings: Any = make_dataclass(
    "_TaskSettings",
    [(spec.name, spec.settings, field(default_factory=spec.settings)) for spec in TASKS],
    frozen=True,
)


class TasksConfig(_TaskSettings):
    """The tasks that the model learns: a table [tasks.NAME] for each row of the task table."""


@dataclass(frozen=True)
class L1Config:
    """The term lambda Omega(theta), Omega = sum_g c_g ||theta_g||_1; Omega over all parameters: every c_g = 1."""

    # lambda; a weight stays 0 while |m / sqrt(v)| of AdamW is below lambda c_g; 0: no term
    weight: float = bounded(0.0, least=0)
    experts: float = bounded(1.0, least=0)  # c_g of the routed experts
    matrices: float = bounded(0.0, least=0)  # c_g of every other weight matrix, embeddings and routers included
    vectors: float = bounded(0.0, least=0)  # c_g of norms and biases


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
    # of the mixture: sources are drawn in proportion to weight ** (1 / temperature)
    temperature: float = bounded(1.0, above=0)
    pack_length: int = bounded(4096, least=1)  # L; tokens in a pack
    pack_patches: int = bounded(8192, least=1)  # P; image patches in a pack
    image_max_patches: int = bounded(1024, least=1)  # patches of one image, aspect ratio kept
    frame_max_patches: int = bounded(256, least=1)  # patches of one video frame
    video_frames: int = bounded(8, least=1)  # frames of a video, at most
    # Which: "uniform" in time; "fps": `video_fps`, as long as video_frames are enough; "keyframes" of the codec.
    video_sampling: str = bounded("uniform", choices=("uniform", "fps", "keyframes"))
    video_fps: float = bounded(1.0, above=0)  # frames a second, with "fps"
    frame_pool: int = bounded(2, least=1)  # frame_pool x frame_pool vision tokens of a frame are averaged into one
    # virtual readers; a multiple of (data-parallel ranks x workers); fixed for the life of a run
    lanes: int = bounded(64, least=1)
    lookahead: int = bounded(32, least=1)  # samples among which the packer looks for the best fit
    shuffle_block: int = bounded(256, least=1)  # samples read and shuffled together
    workers: int = bounded(2, least=0)  # loader processes a rank; 0: in the training process
    max_bad_fraction: float = bounded(0.01, least=0, most=1)  # error budget: bad samples over samples read, per source
    # Of sources whose path is not a local folder:
    cache: str = "~/.cache/dsmoe_vl/shards"  # folder on a local disk; processes and runs of a host share its shards
    # GiB; beyond it the least recently used shards are removed from the cache; 0: no limit
    cache_gib: float = bounded(200.0, least=0)
    # seconds for which storage that fails is tried again; then the run ends
    fetch_patience_seconds: float = bounded(300.0, above=0)
    allow_pipe: bool = False  # a path may be "pipe:COMMAND", which runs a shell


@dataclass(frozen=True)
class TokenizerConfig:
    """The SentencePiece model."""

    path: str = ""  # a tokenizer.model file
    vocab_size: int = bounded(32000, least=1)  # rows of the embedding table; at least the tokenizer's own size


@dataclass(frozen=True)
class RunConfig:
    """The run itself."""

    name: str = "run"  # the run directory is `directory`/`name`
    directory: str = "runs"
    steps: int = bounded(1000, least=1)  # optimizer steps
    seed: int = bounded(1, least=0)
    log_every: int = bounded(10, least=1)  # optimizer steps
    evaluate_every: int = bounded(500, least=0)  # optimizer steps; 0: only at the end
    evaluate_packs: int = bounded(64, least=1)  # packs of held-out data per evaluation, over all ranks
    checkpoint_every: int = bounded(500, least=1)  # optimizer steps
    keep_checkpoints: int = bounded(2, least=1)  # newest complete checkpoints that stay on disk
    # optimizer steps at least between pictures of held-out samples, at checkpoints; 0: none
    samples_every: int = bounded(500, least=0)
    # optimizer steps between records of the routers (router.npz, heat maps); 0: none
    router_every: int = bounded(100, least=0)
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


def learned_tasks(recipe: Recipe) -> tuple[TaskSpec, ...]:
    """The tasks with a weight above 0, in the order of the task table."""
    return tuple(spec for spec in TASKS if getattr(recipe.tasks, spec.name).weight > 0)


def term_weights(recipe: Recipe) -> dict[str, float]:
    """w_i of every term of every task's loss."""
    return {term.name: getattr(getattr(recipe.tasks, spec.name), term.weight) for spec in TASKS for term in spec.terms}
