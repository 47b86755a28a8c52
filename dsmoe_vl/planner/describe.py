"""A run plan as readable text, with the arithmetic: what --dry-run prints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from dsmoe_vl.config.deepspeed_json import setting
from dsmoe_vl.config.imported import imported_roots
from dsmoe_vl.config.model import SECONDS_OF_STATE
from dsmoe_vl.config.parts import part_of
from dsmoe_vl.config.recipe import AugmentConfig, L1Config, TaskWeightsConfig, first_step
from dsmoe_vl.planner.counts import count_adapters
from dsmoe_vl.planner.flops import labels_of_full_pack
from dsmoe_vl.planner.parameters import sparse_layers, tensors
from dsmoe_vl.planner.plan import RECOMPUTED_TEXT, RunPlan
from dsmoe_vl.planner.stages import stage_plans
from dsmoe_vl.planner.trained import Rule, Trained, rules

_SHOWN_GROUPS = 4
_SHOWN_RANKS = 4


def describe(plan: RunPlan) -> str:
    """Several lines: model, what trains, batch, schedule, cost, memory, groups, notes."""
    sections = (
        ("run", _run(plan)),
        ("parameters", _parameters(plan)),
        *_stages(plan),
        ("step", _step(plan)),
        ("cost", _cost(plan)),
        *([] if plan.recipe.stages else [("memory per rank", _memory(plan))]),
        ("groups", _groups(plan)),
    )
    lines: list[str] = []
    for title, rows in sections:
        lines += [title, *(f"  {name:<22}{value}" for name, value in rows), ""]
    lines.append("notes" if plan.notes else "no notes: all settings are used as given")
    lines += [f"  - {note}" for note in plan.notes]
    return "\n".join(lines)


def _run(plan: RunPlan) -> list[tuple[str, str]]:
    recomputed = f", {RECOMPUTED_TEXT[plan.recompute]} in the backward pass" if plan.recompute != "none" else ""
    data = plan.recipe.data
    return [
        ("directory", str(plan.run_dir)),
        ("tensorboard", str(plan.tensorboard_dir) if plan.tensorboard_enabled else "off"),
        *([("metrics also go to", ", ".join(plan.mirrors))] if plan.mirrors else []),
        ("ranks", f"{plan.world_size} x {plan.device}, {plan.precision}, ZeRO-{plan.zero_stage}{recomputed}"),
        ("sources", _sources(plan)),
        ("readers", f"{data.lanes} lanes, {data.lanes // plan.world_size} per rank, {data.workers} workers per rank"),
        *_augmentation(data.augment),
        *_start(plan),
    ]


def _sources(plan: RunPlan) -> str:
    sources, heat = plan.recipe.data.sources, plan.recipe.data.temperature
    total = sum(source.weight ** (1 / heat) for source in sources)
    return ", ".join(
        f"{source.name} {source.weight ** (1 / heat) / total:.0%}"
        + (f" through {source.map} (sha256 {plan.maps[source.map][:12]})" if source.map else "")
        for source in sources
    )


def _augmentation(augment: AugmentConfig) -> list[tuple[str, str]]:
    used = ", ".join(f"{name} {value:g}" for name, value in asdict(augment).items() if value)
    return [("training pictures", f"changed every epoch: {used}")] if used else []


def _start(plan: RunPlan) -> list[tuple[str, str]]:
    folder = plan.recipe.model.init_from
    if not folder:
        return []
    roots, fresh = imported_roots(folder), dict[str, int]()
    for name, shape in tensors(plan.recipe).items():
        if roots and name.partition(".")[0] not in roots:
            fresh[part_of(name)] = fresh.get(part_of(name), 0) + math.prod(shape)
    where = {"vision": " (its size: [model.vision])"}
    said = ", ".join(f"{part} {shown_count(count)}{where.get(part, '')}" for part, count in fresh.items())
    rows = [("starts from", f"{folder}, which gives it its shapes")]
    return [*rows, ("from first values", said)] if said else rows


def _parameters(plan: RunPlan) -> list[tuple[str, str]]:
    counts, model, moe = plan.parameters, plan.recipe.model, plan.recipe.moe
    sparse = sparse_layers(plan.recipe)
    per_layer = (
        f"({' + '.join(map(str, moe.experts_per_layer))})"
        if moe.experts_per_layer
        else f"{sparse} layers x {moe.experts}"
    )
    experts = f"{per_layer} experts x 3 x {model.width} x {moe.ffn_width}"
    lora = plan.recipe.lora
    parts = ", ".join(lora.parts)
    low = f"{shown_count(count_adapters(plan.recipe))} of rank {lora.rank}, alpha {lora.alpha:g}, in {parts}"
    return [
        ("total", shown_count(counts.total)),
        *([("of these adapters", low)] if lora.rank else []),
        ("active per token", f"{shown_count(counts.active)} ({moe.top_k} of {_per_layer(plan)} experts)"),
        ("routed experts", f"{shown_count(counts.experts)} = {experts}"),
        ("shared experts", shown_count(counts.shared_experts)),
        *([("residual experts", shown_count(counts.residual_experts))] if moe.residual else []),
        ("routers", shown_count(counts.routers)),
        (
            "dense feed-forwards",
            f"{shown_count(counts.dense_ffn)} in {moe.first_dense_layers} of {model.layers} layers",
        ),
        ("attention", shown_count(counts.attention)),
        ("embedding", f"{shown_count(counts.embedding)}, {'tied with' if model.tied else 'and'} the output"),
        ("vision encoder", shown_count(counts.vision)),
        ("connector", shown_count(counts.connector)),
        *(
            [("speech encoder", f"{shown_count(counts.speech)}, not in the FLOPs and activations")]
            if model.hears
            else []
        ),
        ("norms", shown_count(counts.norms)),
        ("task heads", shown_count(counts.heads)),
    ]


def _stages(plan: RunPlan) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """What trains, and with stages what each of them needs."""
    if not plan.recipe.stages:
        yield "what trains", _trains(plan)
        return
    for number, stage in enumerate(stage_plans(plan), 1):
        (settings,) = stage.recipe.stages
        factors = ", ".join(f"{name} x {factor:g}" for name, factor in settings.tasks.items())
        yield (
            f"stage {number}: steps {first_step(stage.recipe) + 1:,} to {stage.recipe.run.steps:,}",
            [
                *_trains(stage),
                ("learning rate", f"{float(stage.deepspeed['optimizer']['params']['lr']):g} at its peak"),
                *([("weights of tasks", factors)] if factors else []),
                *_memory(stage),
            ],
        )


def _trains(plan: RunPlan) -> list[tuple[str, str]]:
    """Part by part; what the recipe's [train] says of it, if anything."""
    by_part: dict[str, set[Rule]] = {}
    for name, rule in rules(plan.recipe).items():
        if not rule.freeze:
            by_part.setdefault(part_of(name), set()).add(rule)
    rate = float(plan.deepspeed["optimizer"]["params"]["lr"])
    return [
        (part, ", ".join(_of_part(plan.trained, part, sorted(by_part.get(part, ()), key=str), rate)))
        for part in plan.trained.trained
    ]


def _of_part(trained: Trained, part: str, found: list[Rule], rate: float) -> Iterator[str]:
    moving, still = trained.trained[part], trained.frozen[part]
    if moving:
        yield f"{shown_count(moving)} trained" if still else shown_count(moving)
    if still:
        yield f"{shown_count(still)} frozen"
    if any(rule.lr_scale != 1 for rule in found):
        yield "rate " + " and ".join(dict.fromkeys(f"{rate * rule.lr_scale:g}" for rule in found))
    if any(rule.weight_decay is not None for rule in found):
        decays = ["the JSON's" if rule.weight_decay is None else f"{rule.weight_decay:g}" for rule in found]
        yield "weight decay " + " and ".join(dict.fromkeys(decays))


def _step(plan: RunPlan) -> list[tuple[str, str]]:
    data, run = plan.recipe.data, plan.recipe.run
    packs = f"{plan.micro_batch} per rank x {plan.accumulation} accumulated x {plan.world_size} ranks"
    cells = data.pack_patches // plan.recipe.model.vision.merge**2
    patches = f"{plan.packs_per_step * data.pack_patches:,}"
    return [
        ("packs", f"{plan.packs_per_step} = {packs}"),
        ("tokens", f"{plan.tokens_per_step:,} = {plan.packs_per_step} packs x {data.pack_length}"),
        (
            "patches",
            f"at most {patches}, {data.pack_patches} per pack = {cells} tokens",
        ),
        *_speech(plan),
        ("steps", f"{run.steps:,} = {shown_count(run.steps * plan.tokens_per_step)} tokens"),
        ("learning rate", f"{float(plan.deepspeed['optimizer']['params']['lr']):g} at its peak"),
        ("schedule", _schedule(plan)),
        ("gradient clipping", f"{setting(plan.deepspeed, 'gradient_clipping', 1.0)}"),
        *_l1(plan.recipe.objective.l1),
        *_task_weights(plan.recipe.objective.task_weights),
        *_backend(plan),
    ]


def _speech(plan: RunPlan) -> list[tuple[str, str]]:
    speech, data = plan.recipe.model.speech, plan.recipe.data
    if not speech.layers:
        return []
    seconds = f"at most {data.pack_speech_seconds:g} per pack and {data.speech_max_seconds:g} per recording"
    return [("seconds of speech", f"{seconds}, a token every {SECONDS_OF_STATE * speech.merge:g}")]


def _backend(plan: RunPlan) -> list[tuple[str, str]]:
    moe, tokens = plan.recipe.moe, plan.micro_batch * plan.recipe.data.pack_length
    if moe.backend == "dropless":
        return [("experts compute", "every assignment (dropless)")]
    if not moe.drop_tokens:
        return [("experts compute", "every assignment; buffers sized for the busiest expert (capacity)")]
    share = f"{moe.capacity_factor:g} x {moe.top_k} x {tokens} / experts"
    more = [text for text in (moe.noisy_gate, "random token selection" * moe.random_token_selection) if text]
    rows = f"at most {share} assignments per rank and micro-step, at least {moe.min_capacity} (capacity)"
    return [("experts compute", ", ".join([rows, *more]))]


def _task_weights(settings: TaskWeightsConfig) -> list[tuple[str, str]]:
    if settings.method == "fixed":
        return []
    return [("weights of tasks", f"{settings.method}, rate {settings.rate:g}: learned, from the recipe's on")]


def _l1(l1: L1Config) -> list[tuple[str, str]]:
    if l1.weight == 0:
        return []
    omega = f"{l1.experts:g} |experts| + {l1.matrices:g} |other matrices| + {l1.vectors:g} |norms, biases|"
    return [("L1 term", f"{l1.weight:g} x ({omega}), by a proximal step after each update")]


def _schedule(plan: RunPlan) -> str:
    scheduler = plan.deepspeed.get("scheduler")
    if scheduler is None:
        return "constant"
    return f"{scheduler['type']}: " + ", ".join(f"{key} {value}" for key, value in scheduler["params"].items())


def _cost(plan: RunPlan) -> list[tuple[str, str]]:
    flops, data = plan.flops, plan.recipe.data
    share = (
        f"{data.pack_length} tokens, {data.pack_patches} patches, {labels_of_full_pack(plan.recipe)} labels per pack"
    )
    spared = ", less where weights are frozen" if any(plan.trained.frozen.values()) else ""
    return [
        ("forward per token", f"{shown_flops(flops.per_token)}, attending to {flops.token_context:g} on average"),
        (
            "forward per patch",
            f"{shown_flops(flops.per_patch)}, attending to {flops.patch_context:g}",
        ),
        ("forward per label", f"{shown_flops(flops.per_label)}, the output projection, only at positions with a label"),
        ("training per step", f"{shown_flops(plan.flops_per_step)} = 3 x forward of {share}{spared}"),
        ("training per rank", f"{shown_flops(plan.flops_per_step / plan.world_size)} per step"),
    ]


def _memory(plan: RunPlan) -> list[tuple[str, str]]:
    memory = plan.memory
    what = f" of the {shown_count(plan.trained.total)} that train" if any(plan.trained.frozen.values()) else ""
    rows = [
        ("weights", shown_bytes(memory.weights)),
        ("gradients", shown_bytes(memory.gradients) + what),
        ("optimizer", shown_bytes(memory.optimizer) + what),
        ("on the device", f"{shown_bytes(memory.device)}, activations and communication buckets not counted"),
    ]
    return rows + ([("on the host", shown_bytes(memory.host))] if memory.host else [])


def _groups(plan: RunPlan) -> list[tuple[str, str]]:
    return [
        ("data parallel", _shown([range(plan.dp_size)])),
        ("expert parallel", f"{_shown(plan.ep_groups)}, {_per_layer(plan, plan.ep_size)} experts per rank and layer"),
        ("expert data", f"{_shown(plan.expert_data_groups)}, the same experts"),
    ]


def _per_layer(plan: RunPlan, divided_by: int = 1) -> str:
    """Experts per layer: one number, or one for each layer of a pyramid."""
    return "/".join(
        str(count // divided_by) for count in plan.recipe.moe.experts_per_layer or (plan.recipe.moe.experts,)
    )


def _shown(groups: Sequence[range]) -> str:
    shown = " ".join(_ranks(group) for group in groups[:_SHOWN_GROUPS])
    more = " ..." if len(groups) > _SHOWN_GROUPS else ""
    return f"{len(groups)} x {len(groups[0])} ranks: {shown}{more}"


def _ranks(group: range) -> str:
    if len(group) <= _SHOWN_RANKS:
        return f"[{' '.join(str(rank) for rank in group)}]"
    return f"[{group[0]} {group[1]} ... {group[-1]}]"


def shown_count(number: float) -> str:
    """With a unit: 1.20 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def shown_flops(number: float) -> str:
    """With a unit: 1.20 TFLOP."""
    for size, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number / 1e6:.2f} MFLOP"


def shown_bytes(number: float) -> str:
    """With a unit: 1.20 GiB."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
