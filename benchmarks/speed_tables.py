"""Tables of speed: the README's, docs/performance.md, and that of docs/use.md."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.record import Result
from benchmarks.tables import Results, Table, block, newest

_GPU = "bash benchmarks/gpu.sh"


def speed(results: Results) -> str:
    """The README's table."""
    table = Table("what", "figure")
    for result in _or_unverified(table, results, "train_step", "training: tokens/s; step / the machine's products"):
        found = result.figures
        rate = f"{found['tokens_per_second']:,.0f}; {found['step_over_product_rate']:.2f}"
        table.row(result, f"training, {_setting(result)}: tokens/s; step / the machine's products", rate)
    for result in _or_unverified(table, results, "moe_cost", "sparse / dense step; telemetry's share of a step"):
        found = result.figures
        share = f"{_spread(found['step_moe_over_dense'])}; {100 * found['telemetry_over_step'][0]:.1f} %"
        table.row(result, f"{_setting(result)}: sparse / dense step; telemetry's share of a step", share)
    for result in _or_unverified(table, results, "monitoring", "step with all that is watched by default / without"):
        middle, low, high = result.figures["watched_over_bare"]
        figure = f"{middle:.3f} (half of the pairs: {low:.3f} to {high:.3f})"
        table.row(result, f"{_setting(result)}: step with all that is watched by default / without", figure)
    if stream := newest(results, "data"):
        rates = {name: f"{rate['samples_per_second']:,.0f}" for name, rate in stream.figures["rates"].items()}
        table.row(stream, "photos/s: loader / plain webdataset pipeline", _pair(rates, "loader", "plain webdataset"))
        table.row(stream, "photos/s: converter / loop of TarWriter", _pair(rates, "converter", "TarWriter loop"))
        resume = f"{stream.figures['resume_seconds']:.3f} s"
        table.row(stream, "first batch from the middle of a million samples", resume)
    else:
        table.unverified("data", "loader, converter, resuming")
    if captions := newest(results, "generate"):
        ratios = [f"{captions.figures['ratios'][way]['median']:.0f}" for way in ("uncached", "pictures-once")]
        label = "captions: times as fast with the key/value cache as without / as with pictures encoded once"
        table.row(captions, label, " / ".join(ratios))
    else:
        table.unverified("generate", "captions with the key/value cache")
    _cuda(table, results, "train_step", "training on a GPU")
    return block(table)


def train_step(results: Results) -> str:
    """Steps beside the machine's matrix products."""
    table = Table(
        "step", "tokens/s", "step, ms", "forward", "backward", "optimizer", "TFLOP/s a rank", "products, TFLOP/s",
        "step / products", "forward and backward / products",
    )  # fmt: skip
    operators = Table("step", "operators with the largest shares of its time")
    for result in _or_unverified(table, results, "train_step", "on a CPU"):
        found = result.figures
        table.row(
            result, _setting(result), f"{found['tokens_per_second']:,.0f}",
            f"{found['step_ms']:,.0f} ({found['step_ms_spread'][0]:,.0f} to {found['step_ms_spread'][1]:,.0f})",
            *(f"{found[f'{phase}_ms']:,.0f}" for phase in ("forward", "backward", "optimizer")),
            f"{found['tflops_per_rank']:.3g}", f"{found['product_tflops_per_rank']:.3g}",
            f"{found['step_over_product_rate']:.2f}", f"{found['forward_backward_over_product_rate']:.2f}",
        )  # fmt: skip
        if shares := list(found.get("operators_percent", {}).items())[:8]:
            text = ", ".join(f"`{name}` {share:.1f} %" for name, share in shares)
            operators.row(result, _setting(result), text)
    _cuda(table, results, "train_step", "on a GPU")
    return block(table, operators) if operators.rows else block(table)


def train_peer(results: Results) -> str:
    """Our step beside transformers' model in a DeepSpeed engine."""
    table = Table("step", "ours, tokens/s", "transformers and DeepSpeed, tokens/s", "ours / theirs")
    for result in _or_unverified(table, results, "train_peer", "on a CPU"):
        found = result.figures
        rates = found["tokens_per_second"]
        table.row(
            result, _setting(result), f"{rates['ours']:,.0f}", f"{rates['transformers']:,.0f}",
            _spread(found["ours_over_transformers"]),
        )  # fmt: skip
    return block(table)


def moe_cost(results: Results) -> str:
    """Sparse steps beside dense ones."""
    table = Table(
        "step", "forward and backward, sparse / dense", "step, sparse / dense", "step, with L1 / without",
        "router statistics, share of the step", "telemetry, share of the step", "log line, ms",
    )  # fmt: skip
    for result in _or_unverified(table, results, "moe_cost", "on a CPU"):
        found = result.figures
        ratios = ("forward_backward_moe_over_dense", "step_moe_over_dense", "step_l1_over_moe")
        table.row(
            result, _setting(result), *(_spread(found[name]) for name in ratios),
            f"{100 * found['router_statistics_over_step']:.1f} %", f"{100 * found['telemetry_over_step'][0]:.1f} %",
            f"{found['log_line_ms']:.1f}",
        )  # fmt: skip
    _cuda(table, results, "moe_cost", "on a GPU")
    return block(table)


def moe_layer(results: Results) -> str:
    """One sparse layer beside others' and beside a dense one; columns are the paths of the newest result."""
    found = results.get("moe_layer", ())
    paths = list(found[-1].figures["layers"][0]["paths"]) if found else ["ours", "dense"]
    *sparse, dense = paths
    table = Table("layer", "tokens a rank", "EP", f"{dense}, TFLOP/s a rank", *sparse)
    for result in _or_unverified(table, results, "moe_layer", "on a CPU"):
        figures = result.figures
        for layer in figures["layers"]:
            of = layer["paths"]
            name = f"{layer['shape']}: {layer['experts']} experts of {layer['width']} x {layer['ffn_width']}"
            cells = ["not run" if "not_run" in of[path] else _spread(of[path]["over_dense"]) for path in sparse]
            table.row(
                result, f"{name}, {layer['top_k']} a token, {figures['precision']}", f"{layer['tokens']:,}",
                f"{figures['ep_size']}", f"{of[dense]['tflops_per_rank']:.3f}", *cells,
            )  # fmt: skip
    _cuda(table, results, "moe_layer", "on a GPU")
    return block(table)


def traffic(results: Results) -> str:
    """Bytes of a sparse layer on a GPU beside the least possible."""
    table = Table(
        "layer", "tokens", "bytes, MiB", "of the least", "of the least, fused", "operators started", "waits of the host"
    )
    if not results.get("traffic"):
        table.unverified("traffic", "all")
    for result in results.get("traffic", ()):
        for layer in result.figures["layers"]:
            name = f"{layer['shape']}: {layer['experts']} experts of {layer['width']} x {layer['ffn_width']}"
            table.row(
                result, f"{name}, {layer['top_k']} a token, bf16", f"{layer['tokens']:,}",
                f"{layer['bytes'] / 2**20:,.0f}", f"{layer['bytes'] / layer['least']:.2f}",
                f"{layer['bytes'] / layer['fused']:.2f}", f"{layer['starts']}",
                f"{layer['host_waits']}",
            )  # fmt: skip
    return block(table)


def growth(results: Results) -> str:
    """How a step grows, beside the order that is expected."""
    table = Table("what grows", "", "step, s", "times the first", "expected", "memory at its peak, MiB")
    if not results.get("growth"):
        table.unverified("growth", "all")
    for result in results.get("growth", ()):
        for name, points in result.figures["curves"].items():
            for point in points:
                table.row(
                    result, name, f"{point['at']:,}", _spread((point["seconds"], *point["seconds_spread"])),
                    *(f"{point[key] / points[0][key]:.2f}" for key in ("seconds", "expected")),
                    f"{point['peak_mib']:,.0f}",
                )  # fmt: skip
    return block(table)


def packing(results: Results) -> str:
    """Steps on packs beside steps on padded batches."""
    table = Table(
        "step", "samples", "padded", "real tokens in it", "real patches", "padded, real tokens/s",
        "packed, real tokens/s", "packed / padded", "by the processor's time",
    )  # fmt: skip
    for result in _or_unverified(table, results, "packing", "on a CPU"):
        found = result.figures
        packed, padded, texts = (found[side] for side in ("packed", "padded", "padded texts"))
        for what, side, ratio in (
            ("texts and pictures", padded, "packed_over_padded"), ("texts", texts, "packed_over_padded_texts"),
        ):  # fmt: skip
            table.row(
                result, _setting(result), f"{found['samples_a_step']:.0f}", what, f"{100 * side['real_share']:.1f} %",
                f"{100 * packed['patches_a_step'] / side['patches_a_step']:.1f} %",
                *(f"{one['real_tokens_per_second'][0]:,.0f}" for one in (side, packed)),
                _spread(found[ratio]), _spread(found[f"{ratio}_processor"]),
            )  # fmt: skip
    return block(table)


def monitoring(results: Results) -> str:
    """Watched steps beside bare ones."""
    table = Table(
        "step", "bare, ms", "watched / bare (half of the pairs)", "adding up, ms a step", "log line, ms",
        "routers' record, ms", "these parts, share of the step",
    )  # fmt: skip
    for result in _or_unverified(table, results, "monitoring", "on a CPU"):
        found = result.figures
        table.row(
            result, _setting(result), f"{found['step_ms']:,.0f}", _spread(found["watched_over_bare"], 3),
            f"{found['adding_up_ms']:.2f}", f"{found['log_line_ms']:.1f}", f"{found['router_record_ms']:.1f}",
            f"{100 * found['parts_over_step']:.2f} %",
        )  # fmt: skip
    _cuda(table, results, "monitoring", "on a GPU")
    return block(table)


def data(results: Results) -> str:
    """Loader, converter and resuming."""
    result = newest(results, "data")
    if result is None:
        table = Table("what", "photos/s")
        table.unverified("data", "loader, converter, resuming")
        return block(table)
    found = result.figures
    turns = f"median (least to most) of {found['repeats']} turns, {found['workers']} workers"
    rates = Table("what", f"photos/s, {turns}")
    for name, rate in found["rates"].items():
        rates.row(result, name, f"{rate['samples_per_second']:,.0f} ({rate['least']:,.0f} to {rate['most']:,.0f})")
    others = Table("beside it", "figure")
    for label, name in (
        ("loader / plain webdataset", "loader_over_webdataset"),
        ("loader / plain webdataset, our pixels", "loader_over_webdataset_same_pixels"),
        ("loader / decode, resize and tokenise alone", "loader_over_decoding"),
        ("converter / TarWriter loop", "converter_over_loop"),
    ):
        others.row(result, label, f"{found[name]:.2f}")
    others.row(result, "our pixels beside Pillow's, PSNR", f"{found['psnr_db']:.1f} dB")
    others.row(result, "first batch of a million samples, from the start", f"{found['start_seconds']:.3f} s")
    others.row(
        result, "first batch of a million samples, from the middle of an epoch", f"{found['resume_seconds']:.3f} s"
    )
    return block(rates, others)


def checkpoint(results: Results) -> str:
    """What saving and loading take, of the rank that takes most."""
    table = Table("what", "figure")
    for result in _or_unverified(table, results, "checkpoint", "saving and loading"):
        figures, ranks = result.figures, result.figures["of_ranks"]
        title = f"ZeRO-{figures['zero_stage']}, {len(ranks)} ranks, {figures['parameters'] / 1e6:.0f} M parameters"

        def most(name: str, ranks: list[dict[str, Any]] = ranks) -> float:
            return max(found[name] for found in ranks)

        blocked = f"{most('save_seconds_in the background'):.2f} s, {100 * most('blocked_share'):.1f} %"
        table.row(result, f"{title}: training stands still, background / waiting for the files", blocked)
        if "step_over_usual_during_a_save" in ranks[0]:
            figure = f"{most('step_over_usual_during_a_save'):.2f}"
            table.row(result, f"{title}: a step during a save / a usual step", figure)
        for name, label in (("write_over_plain", "plain write / save"), ("read_over_plain", "plain read / load")):
            figure = f"{min(found[name] for found in ranks):.2f}"
            table.row(result, f"{title}: time of a {label} of the same bytes", figure)
        figure = f"{most('load_seconds'):.1f} s, {most('of_it_exchange_seconds'):.1f} s"
        table.row(result, f"{title}: a load, of it exchange of weights between ranks", figure)
        peaks = [found["peak_over_kept"] for found in ranks]
        for phase in peaks[0]:
            figure = f"{max(of_rank[phase] for of_rank in peaks):.2f}"
            table.row(result, f"{title}: peak memory / what a rank keeps, {phase}", figure)
    for result in _or_unverified(table, results, "large", "a large model in a host's memory"):
        found = result.figures
        cut = (
            f"large.toml cut to two layers, {found['parameters'] / 1e6:.0f} M parameters, {found['precision']}, ZeRO-3"
        )
        for phase, peak in found["peak_gib"].items():
            table.row(
                result, f"{cut}, {found['world_size']} ranks: memory of all processes, {phase}", f"{peak:.1f} GiB"
            )
    for result in _or_unverified(table, results, "kills", "kills at random moments"):
        found = result.figures
        moments = f"kills at random moments, of these while a checkpoint was written: {found['kills_in_a_save']}"
        table.row(result, moments, f"{found['kills']}")
        figure = f"{found['runs_that_ended_equal']} of {found['runs_that_ended_equal']}, bit for bit"
        table.row(result, "killed runs that ended as one that was not killed", figure)
        table.row(result, "complete checkpoints that the next start did not use", f"{found['complete_ones_not_used']}")
    return block(table)


def import_model(results: Results) -> str:
    """Memory and time of an import, and the time of a plan from it."""
    table = Table("what", "figure")
    for result in results.get("import_model", ()):
        found = result.figures
        title = f"{found['parameters'] / 1e9:.2f} B parameters"
        largest, layer, peak = (found[f"{name}_bytes"] / 2**20 for name in ("largest_file", "layer", "peak"))
        table.row(result, f"{title}: largest file / a layer, MiB", f"{largest:,.0f} / {layer:,.0f}")
        table.row(result, f"{title}: memory at its peak, MiB", f"{peak:,.0f}")
        limit = f"{title}: of 1.2 times the largest file and a layer"
        table.row(result, limit, f"{peak / (1.2 * largest + layer):.2f}")
        table.row(result, f"{title}: import", f"{found['import_seconds']:.1f} s")
        clock, processor = (median(found[f"plan_{name}"]) for name in ("seconds", "processor_seconds"))
        table.row(result, f"{title}: `--dry-run` / of the processor", f"{clock:.2f} s / {processor:.2f} s")
    if not table.rows:
        table.unverified("import_model", "memory and time of an import")
    return block(table)


def generate(results: Results) -> str:
    """Captions with and without the key/value cache."""
    result = newest(results, "generate")
    if result is None:
        table = Table("way", "seconds")
        table.unverified("generate", "all")
        return block(table)
    found = result.figures
    least, most = found["vision_tokens"]
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    table = Table(
        f"{found['max_tokens']} tokens after {least} to {most} vision tokens, batch of {found['batch']}, {threads}",
        f"seconds, median (least to most) of {found['repeats']}", "tokens/s", "times the cached",
    )  # fmt: skip
    names = {
        "cached": "key/value cache",
        "uncached": "no cache: a whole forward a token",
        "pictures-once": "no cache, but pictures are encoded once",
    }
    for way, seconds in found["seconds"].items():
        middle = median(seconds)
        ratio = found["ratios"].get(way)
        times = f"{ratio['median']:.1f} ({ratio['least']:.1f} to {ratio['most']:.1f})" if ratio else ""
        table.row(
            result, names[way], f"{middle:.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
            f"{found['batch'] * found['max_tokens'] / middle:,.0f}", times,
        )  # fmt: skip
    return block(table)


def _or_unverified(table: Table, results: Results, benchmark: str, label: str) -> Sequence[Result]:
    """All results of a benchmark; without one of a CPU, the table says so."""
    found = results.get(benchmark, ())
    if all(result.figures["device"] != "cpu" for result in found):
        table.unverified(benchmark, label)
    return found


def _cuda(table: Table, results: Results, benchmark: str, label: str) -> None:
    """Without a result of a GPU, the table says so."""
    if all(result.figures["device"] == "cpu" for result in results.get(benchmark, ())):
        table.unverified_on_cuda(label, _GPU if benchmark == "train_step" else f"python benchmarks/{benchmark}.py")


def _setting(result: Result) -> str:
    """What a step depends on, as far as it was recorded."""
    found: dict[str, Any] = result.figures
    parts = [f"{found['recipe']}.toml" if found["recipe"] else "", found["device"].upper()]
    parts.append("1 rank" if found["ranks"] == 1 else f"{found['ranks']} ranks")
    parts += [
        f"{name} {found[key]}" for name, key in (("EP", "ep_size"), ("ZeRO", "zero_stage")) if found[key] is not None
    ]
    parts.append(found["precision"])
    if found["micro_batch"]:
        parts.append(f"{found['micro_batch'] * found['accumulation']} x {found['pack_length']} tokens a rank")
    return ", ".join(part for part in parts if part)


def _spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and the range that the benchmark reports with it."""
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


def _pair(rates: dict[str, str], ours: str, theirs: str) -> str:
    return f"{rates[ours]} / {rates[theirs]}"
