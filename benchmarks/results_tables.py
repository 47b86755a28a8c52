"""Tables of what models learn: the quickstart's output, the README's results, docs/results.md."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from benchmarks.tables import Results, Table, block, cite, known, newest

_TERMS = {
    "caption": "caption", "retrieval": "retrieval", "summary": "summary", "importance": "importance (squared error)",
    "ranking": "ranking",
}  # fmt: skip
_NAMED = "captions that name every colour and shape, images / videos"


def quickstart_output(results: Results) -> str:
    """The end of the training, a held-out caption, and how many are right, as the quickstart printed them."""
    result = newest(results, "quickstart")
    if result is None:
        return "Not recorded yet: `python benchmarks/recipes.py quickstart` runs the quickstart and records it."
    lines: list[str] = result.figures["output"]
    steps = [n for n, line in enumerate(lines) if line.startswith("step ") and line.endswith(" left")]
    saved = max(n for n, line in enumerate(lines) if line.startswith("saved "))
    images, videos = (n for n, line in enumerate(lines) if " captions name every " in line)
    shown = [*lines[steps[-3] : saved + 1], "...", *lines[images - 3 : images + 1], "...", lines[videos]]
    whole = known(result.figures["seconds"] and result.figures["seconds"] / 60, "{:.1f} minutes")
    return "\n".join(
        [
            *(f"    {line}" for line in shown),
            "",
            f"Time of the training steps: {result.figures['step_seconds'] / 60:.1f} minutes; of the command: {whole}.",
            f"Source: {cite(result)}.",
        ]
    )


def results(results: Results) -> str:
    """The README's table."""
    table = Table("what", "figure")
    if result := newest(results, "three_tasks"):
        images, videos = (result.figures["scores"][folder] for folder in ("images_eval", "videos_eval"))
        rates = [_right(scores["caption"]) for scores in (images, videos)]
        table.row(result, f"three tasks: {_NAMED}", " / ".join(rates))
        for medium, scores in (("images", images), ("videos", videos)):
            table.row(result, f"three tasks: retrieval of {medium}, R@1 by picture / by text", _recall(scores))
        scores = [f"{videos['summary'][name]:.3f}" for name in ("key_frame_f", "kendall_tau")]
        table.row(result, "three tasks: summaries, key-frame F / Kendall tau", " / ".join(scores))
    else:
        table.unverified("three_tasks", "three tasks: held-out scores")
    if result := newest(results, "quickstart"):
        rates = [_right(result.figures["scores"][folder]["caption"]) for folder in ("images_eval", "videos_eval")]
        table.row(result, f"quickstart: {_NAMED}", " / ".join(rates))
        table.row(
            result, "quickstart: tokens of its packs that are real", f"{100 * result.figures['real_tokens']:.1f} %"
        )
    else:
        table.unverified("quickstart", "quickstart: held-out captions")
    if result := newest(results, "alone"):
        rows = result.figures["rows"]
        better = sum(row["values"][0] > row["values"][1] for row in rows)
        table.row(result, "three tasks together: scores above those of one task alone", f"{better} of {len(rows)}")
    else:
        table.unverified("alone", "tasks together and alone")
    for world, title in (("catalogue", "much to remember"), ("scenes", "little to remember")):
        if result := newest(results, world):
            sparse, _, dense = (_last_losses(variant) for variant in result.figures["variants"])
            lower = sum(a < b for a, b in zip(sparse, dense, strict=True))
            figure = f"{fmean(sparse):.3f} / {fmean(dense):.3f}, sparse lower with {lower} of {len(sparse)} seeds"
            table.row(result, f"{title}: held-out loss, sparse / dense of equal active FLOPs", figure)
        else:
            table.unverified(world, f"{title}: sparse and dense")
    return block(table)


def catalogue(results: Results) -> str:
    """Variants on the catalogue."""
    return _variants(results, "catalogue")


def scenes(results: Results) -> str:
    """Variants on three_tasks.toml."""
    return _variants(results, "scenes")


def task_weights(results: Results) -> str:
    """Methods that weigh the tasks, on three_tasks.toml."""
    result = newest(results, "task_weights")
    if result is None:
        table = Table("weights", "held-out loss")
        table.unverified("task_weights", "all")
        return block(table)
    variants = result.figures["variants"]
    terms = [term for term in _TERMS if f"eval_loss_{term}" in variants[0]["last"][0]]
    table = Table("held-out loss by term, mean of three seeds", *(_TERMS[term] for term in terms))
    factors = [name for name in variants[-1]["last"][0] if name.startswith("weight_")]
    learned = Table("learned factor at the end", *(name.removeprefix("weight_") for name in factors))
    for variant in variants:
        values = [[found[f"eval_loss_{term}"] for found in variant["last"]] for term in terms]
        cells = [f"{fmean(seeds):.4f} ({min(seeds):.4f} to {max(seeds):.4f})" for seeds in values]
        table.row(result, variant["name"], *cells)
        if factors[0] in variant["last"][0]:
            means = [fmean(found[name] for found in variant["last"]) for name in factors]
            learned.row(result, variant["name"], *(f"{mean:.2f}" for mean in means))
    return block(table, learned)


def pretrained(results: Results) -> str:
    """From real weights, and the same model from nothing."""
    result = newest(results, "pretrained")
    if result is None:
        table = Table("start", "held-out caption loss")
        table.unverified("pretrained", "both")
        return block(table)
    found = result.figures
    table = Table("held-out caption loss, mean of the seeds", *(f"step {step}" for step in found["steps"]))
    for way, losses in found["losses"].items():
        table.row(result, way, *(f"{fmean(step):.3f}" for step in zip(*losses, strict=True)))
    last = [[seed[-1] for seed in losses] for losses in found["losses"].values()]
    lower = sum(real < nothing for real, nothing in zip(*last, strict=True))
    table.row(result, f"lower from real weights with {lower} of {len(last[0])} seeds", *[""] * len(found["steps"]))
    return block(table)


def _variants(results: Results, world: str) -> str:
    result = newest(results, world)
    if result is None:
        table = Table("variant", "held-out loss")
        table.unverified(world, "all")
        return block(table)
    variants, seeds = result.figures["variants"], result.figures["seeds"]
    sizes = ("parameters", "active", "MFLOP a token")
    losses = Table(f"after {variants[0]['steps'][-1]:,} steps", *sizes, *(f"seed {seed}" for seed in seeds), "mean")
    terms = [term for term in _TERMS if f"eval_loss_{term}" in variants[0]["last"][0]]
    by_term = Table("by term, mean of the seeds", *(_TERMS[term] for term in terms))
    for variant in variants:
        last = _last_losses(variant)
        losses.row(
            result, variant["name"], _millions(variant["parameters"]), _millions(variant["active"]),
            f"{variant['flops_per_token'] / 1e6:.2f}", *(f"{loss:.4f}" for loss in last), f"**{fmean(last):.4f}**",
        )  # fmt: skip
        means = [fmean(found[f"eval_loss_{term}"] for found in variant["last"]) for term in terms]
        by_term.row(result, variant["name"], *(f"{mean:.4f}" for mean in means))
    return block(losses, by_term)


def parting(results: Results) -> str:
    """Experts that begin as copies: how alike they are, and the loss, before and after training."""
    result = newest(results, "parting")
    if result is None:
        table = Table("experts begin as", "mean cosine of two experts")
        table.unverified("parting", "all")
        return block(table)
    found = result.figures
    table = Table(
        f"{found['experts']} experts of {found['top_k']} begin as", "mean cosine of two experts",
        f"after {found['steps']} steps", "held-out loss, nats", f"after {found['steps']} steps",
    )  # fmt: skip
    table.row(result, "the dense model, before", "", "", f"{fmean(found['dense_loss']):.3f}", "")
    for way, seeds in found["curves"].items():
        cells = [
            f"{fmean(points[at][value] for points in seeds):.3f}" for value in ("cosine", "loss") for at in (0, -1)
        ]
        table.row(result, way, *cells)
    return block(table)


def together_and_alone(results: Results) -> str:
    """Scores of three_tasks.toml beside those of models for one task."""
    table = Table("task", "score", "together", "alone", "difference", "samples together, alone")
    result = newest(results, "alone")
    if result is None:
        table.unverified("alone", "all")
        return block(table)
    for row in result.figures["rows"]:
        together, alone = row["values"]
        table.row(
            result, row["task"], row["score"], f"{together:.3f}", f"{alone:.3f}",
            f"{100 * (together - alone):+.1f} points", " / ".join(f"{count:,}" for count in row["samples"]),
        )  # fmt: skip
    return block(table)


def learning(results: Results) -> str:
    """Real pictures from nothing, beside a plain dual encoder."""
    scores = {"text_to_media_r1": "text to picture, R@1", "media_to_text_r1": "picture to text, R@1",
              "captions": "exact captions"}  # fmt: skip
    table = Table("variant", "pairs", "CPU seconds", *scores.values(), "caption loss, nats a token")
    result = newest(results, "learning")
    if result is None:
        table.unverified("learning", "all")
        return block(table)
    for variant, seeds in result.figures["curves"].items():
        last = [points[-1] for points in seeds]
        cells = [_percent_of_seeds([point[score] for point in last if score in point]) for score in scores]
        seconds = fmean(point["seconds"] for point in last)
        losses = [point["caption_loss"] for point in last if "caption_loss" in point]
        cells.append(f"{fmean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})" if losses else "-")
        table.row(result, variant, f"{fmean(point['pairs'] for point in last):,.0f}", f"{seconds:.0f}", *cells)
    return block(table)


def pretrained_pictures(results: Results) -> str:
    """Real pictures from real weights, from nothing, and over frozen features."""
    scores = {"text_to_media": "text to picture", "media_to_text": "picture to text"}
    heads = [f"{title}, R@{k}" for title in scores.values() for k in (1, 10)]
    table = Table("start", "pairs", "CPU seconds", *heads)
    result = newest(results, "pretrained_pictures")
    if result is None:
        table.unverified("pretrained_pictures", "all")
        return block(table)
    for way, seeds in result.figures["curves"].items():
        last = [points[-1] for points in seeds]
        cells = [_percent_of_seeds([point[f"{score}_r{k}"] for point in last]) for score in scores for k in (1, 10)]
        pairs, seconds = (fmean(point[name] for point in last) for name in ("pairs", "seconds"))
        table.row(result, way, f"{pairs:,.0f}", f"{seconds:.0f}", *cells)
    return block(table)


def rates(results: Results) -> str:
    """Learning rates of body, embedding and heads, on scenes and on pictures."""
    scores = {
        "text_to_media_r10": "pictures: text to picture, R@10", "media_to_text_r10": "picture to text, R@10",
    }  # fmt: skip
    terms = {"eval_loss": "scenes: held-out loss", "eval_loss_retrieval": "of it retrieval"}
    loss = "caption loss, nats a token"
    table = Table("rate of the body", "of the embedding", "of the heads", *terms.values(), *scores.values(), loss)
    result = newest(results, "rates")
    if result is None:
        table.unverified("rates", "all")
        return block(table)
    for row in result.figures["rates"]:
        table.row(
            result, *(f"{rate:g}" for rate in row["rates"]),
            *(f"{row['scenes'].get(term, math.nan):.3f}" for term in terms),
            *(f"{100 * row['pictures'][score]:.1f} %" for score in scores), f"{row['pictures']['caption_loss']:.3f}",
        )  # fmt: skip
    return block(table)


def ablations(results: Results) -> str:
    """What each change does to learning real pictures."""
    columns = {
        "text_to_media_r1": "text to picture, R@1", "media_to_text_r1": "picture to text, R@1",
        "text_to_media_r10": "text to picture, R@10", "media_to_text_r10": "picture to text, R@10",
        "captions": "exact captions",
    }  # fmt: skip
    table = Table("cause", "change", *columns.values(), "caption loss, nats a token")
    result = newest(results, "ablations")
    if result is None:
        table.unverified("ablations", "all")
        return block(table)
    for name, found in result.figures["changes"].items():
        cells = (f"{100 * found[column]:.1f} %" if column in found else "-" for column in columns)
        loss = f"{found['caption_loss']:.3f}" if "caption_loss" in found else "-"
        table.row(result, found["cause"], name, *cells, loss)
    gradients = Table("gradients of captions and retrieval, learned together, after the last step", "value")
    for key, value in result.figures["changes"].get("together", {}).items():
        kind, _, of = key.partition("_")
        if kind in ("norm", "cosine"):
            gradients.row(result, f"{kind}, {of}", f"{value:.2f}")
    return block(table, gradients)


def speech(results: Results) -> str:
    """Scores of speech.toml: what is said against what is written."""
    table = Table("held-out scenes, voices that training has not heard", "figure")
    if result := newest(results, "speech"):
        (scores,) = result.figures["scores"].values()
        found, said = scores["retrieval"], scores["transcript"]
        for what, name in (("written", "text"), ("spoken", "speech")):
            values = " / ".join(f"{found[f'{name}_to_media_r{k}']:.3f}" for k in (1, 5, 10))
            table.row(result, f"a {what} query finds its picture among {found['samples']:,}: R@1 / 5 / 10", values)
        share = found["speech_to_media_r1"] / found["text_to_media_r1"]
        table.row(result, "R@1 of spoken queries over that of written ones", f"{share:.2f}")
        rates = f"{100 * said['word_error_rate']:.1f} % / {100 * said['exact']:.1f} %"
        table.row(result, f"transcripts of {said['samples']:,} recordings: word error rate / without an error", rates)
        table.row(result, "captions that name every colour and shape", _right(scores["caption"]))
    else:
        table.unverified("speech", "all")
    return block(table)


def sizes(results: Results) -> str:
    """Parameters of the shipped recipes."""
    table = Table("recipe", "parameters", "active")
    if result := newest(results, "sizes"):
        for name, counts in result.figures.items():
            table.row(result, f"`{name}.toml`", *(_size(count) for count in counts.values()))
    else:
        table.unverified("sizes", "all")
    return block(table)


def recipes(results: Results) -> str:
    """What training the shipped recipes takes."""
    table = Table(
        "recipe", "parameters", "active", "ranks", "steps", "tokens/s", "real tokens", "steps alone", "whole command"
    )
    for name in ("quickstart", "three_tasks", "speech"):
        result = newest(results, name)
        if result is None:
            table.unverified(name, name)
            continue
        found = result.figures
        table.row(
            result, name, _millions(found["parameters"]), _millions(found["active_parameters"]), str(found["ranks"]),
            known(found["steps"], "{:,}"), known(found["tokens_per_second"], "{:,.0f}"),
            known(found["real_tokens"] and 100 * found["real_tokens"], "{:.1f} %"),
            _minutes(found["step_seconds"]), _minutes(found["seconds"]),
        )  # fmt: skip
    return block(table)


def _percent_of_seeds(values: list[float]) -> str:
    """Mean and range of the seeds."""
    if not values:
        return "-"
    mean, least, most = (100 * value for value in (fmean(values), min(values), max(values)))
    return f"**{mean:.1f} %** ({least:.1f} to {most:.1f})" if len(values) > 1 else f"{mean:.1f} %"


def _last_losses(variant: dict[str, Any]) -> list[float]:
    """Held-out loss of each seed after the last step."""
    return [losses[-1] for losses in variant["losses"]]


def _right(scores: dict[str, float]) -> str:
    """Share of captions with every attribute right, with their number if it was recorded."""
    number = f" of {scores['with_truth']:,}" if "with_truth" in scores else ""
    return f"{100 * scores['attribute_accuracy']:.1f} %{number}"


def _recall(scores: dict[str, dict[str, float]]) -> str:
    found = scores["retrieval"]
    number = f" among {found['samples']:,}" if "samples" in found else ""
    return f"{found['media_to_text_r1']:.3f} / {found['text_to_media_r1']:.3f}{number}"


def _millions(count: int | None) -> str:
    return known(count and count / 1e6, "{:.2f} M")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e8 else _millions(count)


def _minutes(seconds: float | None) -> str:
    return known(seconds and seconds / 60, "{:.1f} min")
