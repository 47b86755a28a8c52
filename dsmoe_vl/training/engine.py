"""Builds the DeepSpeed engine of a run plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups, safe_get_full_grad
from safetensors import SafetensorError
from torch import Tensor, nn

from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.config.task_table import ALIGNMENT
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.data.word_start import read_word_start
from dsmoe_vl.errors import CheckpointError
from dsmoe_vl.model.init import first_values
from dsmoe_vl.model.without_values import without_values
from dsmoe_vl.model.word_rows import fill_words
from dsmoe_vl.moe.expert_parallel import ExpertParallelMoE, spread_experts
from dsmoe_vl.moe.expert_parallel_capacity import CapacityMoE, TokenCounts
from dsmoe_vl.moe.placement import Placed, placed
from dsmoe_vl.optim.l1 import add_proximal_step
from dsmoe_vl.optim.optimizer import optimizer_builder
from dsmoe_vl.optim.overflow import add_overflow
from dsmoe_vl.optim.parameter_groups import parameter_groups
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.parallel.warm_up import warm_up
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.planner.run_memory import reduce_bucket_size
from dsmoe_vl.planner.trained import rules
from dsmoe_vl.tasks.registry import build_backbone
from dsmoe_vl.tasks.task import MultiTaskModel, Task
from dsmoe_vl.training.compiler import leave_out_compiler

_NEW: Mapping[str, int] = MappingProxyType({})


def build_engine(plan: RunPlan, ranks: Ranks, tasks: tuple[Task, ...], updates: Mapping[str, int] | None = None) -> Any:
    """The engine around a freshly initialised model, its experts spread over `plan.ep_size` ranks.

    `updates`: those of a checkpoint that will be read into it, as `OptimizerFiles.updates` has them. Without, it begins
    with the weights of `model.init_from`, or the vectors of `model.embedding_from`.
    """
    engine = wrap(plan, build_model(plan, ranks, tasks, imports=updates is None), updates or {})
    torch.manual_seed(plan.recipe.run.seed * 2**20 + ranks.rank)  # for routing noise: a different seed on every rank
    return engine


def build_model(plan: RunPlan, ranks: Ranks, tasks: tuple[Task, ...], imports: bool = True) -> MultiTaskModel:
    """The module that the engine wraps, with this rank's experts only, and at ZeRO-3 this rank's partitions.

    It is described without memory, and made real one parameter at a time, in the plan's precision. What the recipe
    freezes requires no gradient. Collective: it makes the groups of experts and warms all groups up. Raises
    NetworkError.
    """
    with without_values():
        backbone = build_backbone(plan.recipe, plan.recompute)
        model = MultiTaskModel(backbone, tasks)
        spread_experts(model, plan.ep_size, ranks.rank, _token_counts(plan))
    if dist.is_initialized():  # the doctor looks at models of one process without it
        _make_expert_groups(model, plan.ep_size)
        warm_up(list(groups._get_expert_parallel_group_dict().values()))
    dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
    rule_of = rules(plan.recipe)
    fill = first_values(backbone, plan.recipe.run.seed, plan.recipe.model.vision.connector_scale)
    imported = imported_values(plan.recipe.model.init_from if imports else "")
    words = (
        read_word_start(plan.recipe, Tokenizer.of(plan.recipe))
        if imports and plan.recipe.model.embedding_from
        else None
    )
    partition = _partitioner(plan) if plan.zero_stage == 3 else None
    for where in list(placed(model)):
        assert where.name in rule_of, f"{where.name} is in no task's head_shapes"
        where.parameter.requires_grad_(not rule_of[where.name].freeze)
        _make_real(where.parameter)
        if not imported(where):
            if imports and ALIGNMENT in where.name:
                raise CheckpointError(
                    f"{where.name} is not in model.init_from = {plan.recipe.model.init_from!r}, and tasks.retrieval."
                    "align needs it: measure it with launch/align.py, and name its output there"
                )
            fill(where)
            fill_words(where.name, where.parameter.data, words, plan.recipe.run.seed)
        where.parameter.data = where.parameter.data.to(dtype)
        if partition is not None:
            partition(where.parameter)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    return model


def _token_counts(plan: RunPlan) -> TokenCounts:
    """In evaluation ranks have one held-out pack each, or a micro-step's: the first pass of the gradient cache."""
    length = plan.recipe.data.pack_length
    step = plan.micro_batch * length
    return TokenCounts(frozenset({step}), frozenset({length, step}))


def imported_values(folder: str) -> Callable[[Placed], bool]:
    """A function that fills a parameter with what `model.init_from` has for it: whether it has. Each rank reads what it
    keeps. Raises CheckpointError."""
    if not folder:
        return lambda where: False
    weights = WeightsFile(Path(folder))
    try:
        known = weights.shapes()
    except (SafetensorError, OSError) as error:
        raise _damaged(weights, error) from None

    def fill(where: Placed) -> bool:
        if where.name in known:
            try:
                weights.fill(where.name, where.first, where.parameter.data.view(-1))
            except (SafetensorError, OSError, EOFError) as error:
                raise _damaged(weights, error) from None
        return where.name in known

    return fill


def _damaged(weights: WeightsFile, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the weights of model.init_from = {str(weights.folder)!r} cannot be read: {error}: import them again"
    )


def _make_real(parameter: nn.Parameter) -> None:
    """Give a parameter of the meta device memory, in place: its marks and whoever shares it stay."""
    real = nn.Parameter(torch.empty(parameter.shape), parameter.requires_grad)
    real.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, real)


def _make_expert_groups(model: MultiTaskModel, ep_size: int) -> None:
    """As DeepSpeed's engine would, which gives them to the layers: it keeps those that are there."""
    is_sparse = any(isinstance(module, (ExpertParallelMoE, CapacityMoE)) for module in model.modules())
    if is_sparse and f"ep_size_{ep_size}" not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)


def _partitioner(plan: RunPlan) -> Callable[[Any], None]:
    """A function that leaves a rank its part of a parameter, as DeepSpeed's engine would when it has all of them."""
    dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
    first: list[Any] = []

    def partition(parameter: Any) -> None:
        if getattr(parameter, "allreduce", True) is False:
            group = groups._get_expert_data_parallel_group(parameter.group_name)
            parameter.ds_zero_partition_process_group = group
        if first:
            first[0].convert_to_zero_parameters(param_list=[parameter])
            return
        holder = nn.Module()
        holder.register_parameter("parameter", parameter)
        deepspeed.zero.Init(module=holder, config_dict_or_path=_engine_config(plan), dtype=dtype)
        first.append(parameter)

    return partition


def _engine_config(plan: RunPlan) -> dict[str, Any]:
    ours = ("optimizer", "activation_checkpointing")
    config = {key: value for key, value in plan.deepspeed.items() if key not in ours}
    if plan.zero_stage:  # DeepSpeed allocates the whole bucket, a gigabyte, also for a small model
        config["zero_optimization"] = config["zero_optimization"] | {"reduce_bucket_size": reduce_bucket_size(plan)}
    return config


def wrap(plan: RunPlan, model: nn.Module, updates: Mapping[str, int] = _NEW) -> Any:
    """`deepspeed.initialize` with our optimizer. No expert_parallel section: the expert layers are already built."""
    rate = float(plan.deepspeed["optimizer"]["params"]["lr"])
    rule_of = rules(plan.recipe)
    names = {own: where.name for (own, _), where in zip(model.named_parameters(), placed(model), strict=True)}
    found = parameter_groups(model, rate, lambda name: rule_of[names[name]], lambda name: updates.get(names[name], 0))
    trains_experts = any(group.get("moe") for group in found)
    leave_out_compiler()
    with nullcontext() if trains_experts else _without_expert_gradients():
        engine, _, _, _ = deepspeed.initialize(
            model=model, model_parameters=found, optimizer=optimizer_builder(plan), config=_engine_config(plan)
        )
    if not trains_experts:
        engine.has_moe_layers = False  # which the engine could not set
    if plan.zero_stage == 3:
        _share_masters(engine.optimizer)
    if engine.optimizer is engine.basic_optimizer:  # ZeRO-0 in fp32
        add_overflow(engine.basic_optimizer)
    # Not earlier: at ZeRO-0 in bf16, initialize takes a step without gradients to create the optimizer state.
    add_proximal_step(engine.basic_optimizer, plan.recipe.objective.l1)
    return engine


def _share_masters(optimizer: Any) -> None:
    """Let fp32 weights be the masters that the optimizer updates, instead of a second copy of each partition.

    DeepSpeed means to, but compares a tensor's device with the name of one, and copies.
    """
    pairs = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True)
    for master, weights in pairs:
        if weights is not None and (weights.dtype, weights.device) == (master.dtype, master.device):
            master.data = weights.data


def full_value(parameter: nn.Parameter) -> Tensor:
    """The whole parameter, also where ZeRO-3 partitions it. Collective."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


@contextmanager
def _without_expert_gradients() -> Iterator[None]:
    """While an engine is made whose experts are all frozen: it then has no expert layers, as far as gradients go.

    DeepSpeed asserts that a model with expert layers has groups of expert parameters. Its engine sets an attribute on
    itself if there are such layers; all that follows from it is how gradients are reduced and their norm is taken.
    """
    DeepSpeedEngine.has_moe_layers = property(lambda engine: False, lambda *_: None)
    try:
        yield
    finally:
        del DeepSpeedEngine.has_moe_layers


def full_gradient(parameter: nn.Parameter) -> Tensor:
    """The full gradient of a parameter that ZeRO partitions, between the last backward of a step and the update.

    For an expert: the gradient of this rank's slice. Of a frozen parameter: zeros. Collective.
    """
    if not parameter.requires_grad:
        return torch.zeros(getattr(parameter, "ds_shape", parameter.shape), device=parameter.device)
    gradient = safe_get_full_grad(parameter)
    assert gradient is not None, "a parameter has no gradient"
    return gradient
