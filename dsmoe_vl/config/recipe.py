"""The recipe: every setting that DeepSpeed does not know, as frozen dataclasses read from TOML.

Batch sizes, optimizer, scheduler, precision, ZeRO and expert parallelism are set in the DeepSpeed JSON, not here. A
field's comment gives its unit. Bounds of one field are in its declaration, constraints between fields in `checks.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Any

from dsmoe_vl.config.bounds import bounded
from dsmoe_vl.config.control_symbols import ControlsConfig
from dsmoe_vl.config.model import ModelConfig, MoEConfig
from dsmoe_vl.config.task_table import TASKS, TaskSpec

PIPE = "pipe:"  # prefix of a source path that is a shell command

_TaskSettings: Any = make_dataclass(
    "_TaskSettings",
    [(spec.name, spec.settings, field(default_factory=spec.settings)) for spec in TASKS],
    frozen=True,
)


class TasksConfig(_TaskSettings):
    """The tasks: one table [tasks.NAME] per row of the task table."""


@dataclass(frozen=True)
class L1Config:
    """The term lambda Omega(theta), Omega = sum_g c_g ||theta_g||_1; Omega over all parameters: every c_g = 1."""

    # lambda; a weight stays 0 while AdamW's |m / sqrt(v)| is below lambda c_g; 0: no L1 term
    weight: float = bounded(0.0, least=0)
    experts: float = bounded(1.0, least=0)  # c_g of the routed experts
    matrices: float = bounded(0.0, least=0)  # c_g of every other weight matrix, embeddings and routers included
    vectors: float = bounded(0.0, least=0)  # c_g of norms and biases


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of low rank (LoRA, Hu et al. 2021): a matrix W [out, in] computes as W + (alpha / rank) B A.

    Of the parts that have adapters, the adapters train and nothing else, unless [train] says otherwise.
    """

    rank: int = bounded(0, least=0)  # r: A is [r, in], B is [out, r]; 0: no adapters
    alpha: float = bounded(16.0, above=0)  # with another rank, keep it: the same learning rate then fits
    parts: tuple[str, ...] = ("attention", "feed_forward", "experts")  # of the decoder; "vision": of the vision encoder

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def adapted(self) -> tuple[str, ...]:
        """The parts that have adapters."""
        return self.parts if self.rank else ()


@dataclass(frozen=True)
class PartConfig:
    """How some parameters train. A key that is absent is as an earlier table has it, else as the DeepSpeed JSON has it.

    With a rate factor other than 1 the scheduler must be WarmupCosineLR, WarmupLR without warmup_max_lr, or none.
    """

    freeze: bool | None = None  # true: the values stay as they are; no gradient, no optimizer state
    lr_scale: float | None = bounded(None, above=0)  # factor of the JSON's learning rate
    weight_decay: float | None = bounded(None, least=0)  # instead of the JSON's; norms and biases have none


@dataclass(frozen=True)
class StageConfig:
    """Some steps of a run that train other parts, or weigh the tasks otherwise, than the steps before and after."""

    steps: int = bounded(0, least=1)  # optimizer steps; those of all stages are run.steps
    lr_scale: float = bounded(1.0, above=0)  # factor of the JSON's learning rate for all parts
    train: dict[str, PartConfig] = field(default_factory=dict)  # tables after those of the recipe's [train]
    tasks: dict[str, float] = field(default_factory=dict)  # factors of the tasks' weights; 0: nothing of it is learned


@dataclass(frozen=True)
class TaskWeightsConfig:
    """How the tasks' losses are weighed against each other, beyond their weights."""

    # "fixed"; or factors learned from the losses: "uncertainty" (Kendall et al. 2018), "famo" (Liu et al. 2023)
    method: str = bounded("fixed", choices=("fixed", "uncertainty", "famo"))
    rate: float = bounded(0.025, above=0)  # learning rate of the factors' logarithms
    decay: float = bounded(0.001, least=0)  # pulls them back to even factors


@dataclass(frozen=True)
class ObjectiveConfig:
    """The objective besides the task losses and the balancing terms."""

    l1: L1Config = field(default_factory=L1Config)
    task_weights: TaskWeightsConfig = field(default_factory=TaskWeightsConfig)


@dataclass(frozen=True)
class SourceConfig:
    """One stream of shards: a local or remote folder with an `index.json`."""

    name: str = ""
    # A folder, relative to the working directory; the URL of a folder (http, https, or fsspec's: s3, gs, ...); or
    # "pipe:COMMAND", a shell command that writes the file {} of a folder to standard output.
    path: str = ""
    weight: float = bounded(1.0, above=0)  # relative sampling weight, in samples
    tasks: tuple[str, ...] = ()  # tasks to use its samples for; empty: every task of the recipe that they qualify for
    # "module:function": called with all files of a sample, a dict as WebDataset's; returns others, or None to skip it
    map: str = ""

    @classmethod
    def at(cls, path: str | Path) -> SourceConfig:
        """A source that is in no recipe. Its name is the last part of its path."""
        return cls(str(path).rstrip("/").rpartition("/")[2], str(path))


@dataclass(frozen=True)
class AugmentConfig:
    """Changes of training pictures, another one every epoch. All frames of a video are changed alike; 0: off."""

    # a view of the picture replaces it, with sides of 1 / (1 + zoom) to (1 + zoom) times the picture's, log-uniform
    zoom: float = bounded(0.0, least=0, most=1)
    shift: float = bounded(0.0, least=0, most=0.5)  # share of a side; the view's centre moves by at most this
    rotate: float = bounded(0.0, least=0, most=180)  # degrees; the view turns by at most this, either way
    # relative; brightness, contrast and saturation change by at most this factor each. Hues are kept.
    colour: float = bounded(0.0, least=0, most=0.9)
    # probability that a rectangle of 2 to 20 % of the area gets the mean colour
    erase: float = bounded(0.0, least=0, most=1)
    # probability of mirroring left and right: makes "left of" and writing untrue
    mirror: float = bounded(0.0, least=0, most=1)


@dataclass(frozen=True)
class DataConfig:
    """Data sources, and the size and content of packs."""

    sources: tuple[SourceConfig, ...] = ()
    evaluation: tuple[SourceConfig, ...] = ()  # held-out shards; weights are ignored
    # sources are sampled in proportion to weight ** (1 / temperature)
    temperature: float = bounded(1.0, above=0)
    pack_length: int = bounded(4096, least=1)  # L; tokens per pack
    pack_patches: int = bounded(8192, least=1)  # P; image patches per pack
    image_max_patches: int = bounded(1024, least=1)  # patches per image, at most; aspect ratio kept
    frame_max_patches: int = bounded(256, least=1)  # patches per video frame, at most
    video_frames: int = bounded(8, least=1)  # frames per video, at most
    # Which frames: "uniform" in time; "fps": at `video_fps` if video_frames allow it; "keyframes" of the codec.
    video_sampling: str = bounded("uniform", choices=("uniform", "fps", "keyframes"))
    video_fps: float = bounded(1.0, above=0)  # frames per second, for "fps"
    frame_pool: int = bounded(2, least=1)  # frame_pool x frame_pool vision tokens of a frame are averaged into one
    # For models with a speech encoder: seconds of recordings per pack, and of one recording, at most.
    pack_speech_seconds: float = bounded(120.0, above=0)
    speech_max_seconds: float = bounded(30.0, above=0)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    # virtual readers; a multiple of (data-parallel ranks x workers); fixed for the whole run
    lanes: int = bounded(64, least=1)
    lookahead: int = bounded(32, least=1)  # samples from which the packer chooses the best fit
    shuffle_block: int = bounded(256, least=1)  # samples read and shuffled together
    workers: int = bounded(2, least=0)  # loader processes per rank; 0: load in the training process
    max_bad_fraction: float = bounded(0.01, least=0, most=1)  # error budget per source: bad samples / samples read
    # Above one of these limits a sample is bad. They bound the memory of a worker.
    max_text_mib: float = bounded(8.0, above=0)  # MiB of KEY.txt and of KEY.json, at most
    max_media_mib: float = bounded(2048.0, above=0)  # MiB of an image or video, at most
    max_megapixels: float = bounded(64.0, above=0, most=100)  # of an image or a frame, at most; millions of pixels
    # MiB per second at which local shards are hashed during training and compared with index.json; 0: not at all
    verify_mib_per_second: float = bounded(20.0, least=0)
    # For sources whose path is not a local folder:
    cache: str = "~/.cache/dsmoe_vl/shards"  # folder on a local disk, shared by all processes and runs of a host
    # GiB; above it the least recently used shards are removed from the cache; 0: no limit
    cache_gib: float = bounded(200.0, least=0)
    # seconds of retries while storage fails; then the run ends
    fetch_patience_seconds: float = bounded(300.0, above=0)
    allow_pipe: bool = False  # allow "pipe:COMMAND" as a path, which runs a shell command


@dataclass(frozen=True)
class TokenizerConfig:
    """A SentencePiece model or a tokenizer.json."""

    path: str = ""  # a tokenizer.model or tokenizer.json file
    vocab_size: int = bounded(32000, least=1)  # rows of the embedding table; at least the tokenizer's size
    # The following keys are for tokenizers of other makers; launch/import_hf.py fills them in.
    bos: str = ""  # the piece at the beginning of every segment, such as "<s>"; empty: none
    eos: str = ""  # the piece that ends a text; empty: the one that the file says
    controls: ControlsConfig = field(default_factory=ControlsConfig)
    # of the pieces to which the rows of the weights of model.init_from belong; another tokenizer is refused
    sha256: str = ""


# Parts of the model that `run.recompute` computes again: feed-forwards with experts, the other parts of the decoder's
# layers, the vision encoder's layers.
RECOMPUTED: dict[str, tuple[str, ...]] = {
    "none": (),
    "moe": ("experts",),
    "decoder": ("experts", "decoder"),
    "all": ("experts", "decoder", "vision"),
}


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
    keep_checkpoints: int = bounded(2, least=1)  # newest complete checkpoints to keep on disk
    keep_every: int = bounded(0, least=0)  # also keep those whose optimizer step is a multiple of it; 0: none
    # steps in a row with a loss or gradient that is not finite; they are skipped, so many end the run
    max_skipped_steps: int = bounded(10, least=1)
    # minimum optimizer steps between images of held-out samples, drawn at checkpoints; 0: none
    samples_every: int = bounded(500, least=0)
    # optimizer steps between router records (router.npz, heat maps); 0: none
    router_every: int = bounded(100, least=0)
    # Seconds without progress on any rank after which the run ends and names the rank that stopped. Must be longer than
    # the slowest step, evaluation, save or samples, and than data.fetch_patience_seconds.
    stall_seconds: float = bounded(600.0, least=10)
    # What the backward pass computes again, and so need not keep. "": the decoder if the DeepSpeed JSON has a section
    # activation_checkpointing, else nothing.
    recompute: str = bounded("", choices=("", *RECOMPUTED))
    profile_steps: tuple[int, ...] = ()  # first and last optimizer step of the profiler trace; empty: no trace


@dataclass(frozen=True)
class Recipe:
    """A whole recipe file: one TOML table per field."""

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    # By part (`config/parts.py: PARTS`), or by a pattern of parameters' names, such as "layers.0.*" or "*". Of two
    # tables that set a key of a parameter, the later one in the recipe counts.
    train: dict[str, PartConfig] = field(default_factory=dict)
    # One after the other; each has a schedule of its own, as a run. A recipe of one stage is that stage of a run, which
    # ends with run.steps.
    stages: tuple[StageConfig, ...] = ()
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    run: RunConfig = field(default_factory=RunConfig)


def each_stage(recipe: Recipe) -> Iterator[Recipe]:
    """The recipes of a run's stages, whose run.steps are the end of each; the recipe itself without stages."""
    end = 0
    for stage in recipe.stages:
        end += stage.steps
        yield replace(recipe, stages=(stage,), run=replace(recipe.run, steps=end))
    if not recipe.stages:
        yield recipe


def first_step(recipe: Recipe) -> int:
    """The step after which a recipe of one stage begins; 0 without stages."""
    return recipe.run.steps - recipe.stages[0].steps if len(recipe.stages) == 1 else 0


def learned_tasks(recipe: Recipe) -> tuple[TaskSpec, ...]:
    """The tasks with a weight above 0, in the order of the task table."""
    return tuple(spec for spec in TASKS if getattr(recipe.tasks, spec.name).weight > 0)


def term_weights(recipe: Recipe) -> dict[str, float]:
    """The weight w_i of each loss term of every task, in this stage."""
    factors = recipe.stages[0].tasks if len(recipe.stages) == 1 else {}
    return {
        term.name: factors.get(spec.name, 1.0) * getattr(getattr(recipe.tasks, spec.name), term.weight)
        for spec in TASKS
        for term in spec.terms
    }
