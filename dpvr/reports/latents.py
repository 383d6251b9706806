"""The tables of docs/latent.md: what a fitted latent explains, how it answers, and how it adapts.

results/dpvr_mini/latent/fit_*.json      python -m dpvr.training.fit, one per plan
results/dpvr_mini/latent/accuracy.json   python -m dpvr.benchmarks.latents --split test
results/dpvr_mini/latent/adapted.json    training.json of train_sft.py --compare late_fusion kv_substitution lora
"""

from pathlib import Path
from typing import Any

from configuration_dpvr import make_plan, vanilla_plan
from costs_dpvr import Branch, DecoderCosts, prefill_flops
from decoders_dpvr import lowest_split
from dpvr.cost_table import load_config
from dpvr.reports.documents import COVERED, read, table

FIT_HEADINGS = [
    "plan",
    "rank",
    "side layers",
    "pictures",
    "explained of keys and values",
    "answers equal",
    "tokens equal",
    "KL (nats)",
]
ACCURACY_HEADINGS = [
    "",
    "what",
    "prefill FLOPs",
    "mean, %",
    "minus vanilla (95%)",
    "replies equal",
    "latent minus it (95%)",
]
ADAPTED_HEADINGS = [
    "",
    "exchanged, %",
    "ordinary, %",
    "prefill FLOPs",
    "trained parameters",
    "objective",
    "learning rate",
    "s a step",
    "saved for backward",
]

CONFIGS = Path(__file__).parents[2] / "configs" / "shapes"
SHAPES = ("llava-1.5-7b", "qwen2.5-vl-7b", "qwen3-vl-8b", "internvl3-8b")
PROMPTS = ((576, 128), (2048, 128))  # image and text tokens
SHAPE_HEADINGS = [
    "",
    "split",
    "rank",
    *(f"{image} + {text} tokens" for image, text in PROMPTS),
    "parameters",
    "moments",
]


def folder(results: Path) -> Path:
    return results / "dpvr_mini" / "latent"


def render_fits(results: Path) -> str:
    """A row per fit, and below how it was made."""
    fits = [read(path) for path in sorted(folder(results).glob("fit_*.json"))]
    rows = [
        [
            f"`{fit['plan']}`",
            str(fit["latent_rank"]),
            str(fit["latent_side_layers"]),
            f"{fit['num_samples']:,}",
            f"{sum(fit['explained'].values()) / len(fit['explained']):.3f}",
            f"{fit['answers_equal']:.1%}",
            f"{fit['tokens_equal']:.1%}",
            f"{fit['kl_to_base']:.4f}",
        ]
        for fit in fits
    ]
    first = fits[0]
    lines = [
        *table(FIT_HEADINGS, rows),
        "",
        f"dpvr-mini, fitted on so many pictures of MiniBench and measured on {first['eval_samples']} others of its "
        f"split, with the rows' own answers given; `{first['command']}`, {made_on(first)}. One "
        "seed.",
    ]
    return "\n".join(lines) + "\n"


def render_accuracy(results: Path) -> str:
    """A row per model, with paired intervals, and below what was asked."""
    document = read(folder(results) / "accuracy.json")
    rows = [
        [
            row["name"] if row["beside"] is None else f"{row['name']}, as cheap",
            _what(row["what"]),
            f"{row['prefill_flops']:.3f}",
            f"{100 * row['mean']:.1f}",
            "" if row["name"] == "vanilla" else _points(row["minus_vanilla"]),
            f"{row['equal']:.1%}",
            _points(row["latent_minus_this"]) if "latent_minus_this" in row else "",
        ]
        for row in document["rows"]
    ]
    prompt = document["prompt"]
    lines = [
        *table(ACCURACY_HEADINGS, rows),
        "",
        f"{document['limit']} questions of each of the 8 tasks, {document['split']} split, the same for all. Prefill "
        f"FLOPs of a prompt of {prompt['image_tokens']} image and {prompt['text_tokens']} text tokens, as a share of "
        f"vanilla's whose last layer has one query too. {COVERED} `{document['command']}`, {made_on(document)}.",
    ]
    return "\n".join(lines) + "\n"


def render_adapted(results: Path) -> str:
    """The table that a run of train_sft.py ends with."""
    record = read(folder(results) / "adapted.json")
    means = {(row["name"], row["pictures"]): row for row in record["accuracy"]}
    rows = []
    for row in record["table"]:
        objective = row.get("objective", record["objective"]) if row["trained_parameters"] else ""
        seconds = f"{row['seconds_per_step']:.2f}" if row["trained_parameters"] else ""
        saved = f"{row['saved_activation_bytes'] / 1e6:,.0f} MB" if row["trained_parameters"] else ""
        rate = row.get("learning_rate", record["recipe"]["learning_rate"])
        rows.append(
            [
                row["name"],
                *(_mean(means[row["name"], kind]) for kind in ("swapped", "ordinary")),
                f"{row['prefill_flops']:.3f}",
                f"{row['trained_parameters']:,}" if row["trained_parameters"] else "0",
                objective,
                f"{rate:g}" if row["trained_parameters"] else "",
                seconds,
                saved,
            ]
        )
    fitted = means["fitted latent", "swapped"]
    steps = max(entry.get("step", 0) for entry in record["log"])
    lines = [
        *table(ADAPTED_HEADINGS, rows),
        "",
        f"MiniBench's validation questions, n = {fitted['n']}, {steps} steps each on the same rows. The latent as it "
        f"was fitted, before any step: {100 * fitted['mean']:.1f} on exchanged pictures. {COVERED} "
        f"`{record['command']}`, {made_on(record)}.",
    ]
    return "\n".join(lines) + "\n"


def render_adapted_seeds(results: Path) -> str:
    """The means on exchanged pictures of every seed's run, whose rows and training differ."""
    records = [read(path) for path in sorted(folder(results).glob("adapted*.json"))]
    shown = [
        {row["name"]: row["mean"] for row in record["accuracy"] if row["pictures"] == "swapped"} for record in records
    ]
    names = dict.fromkeys(name for means in shown for name in means)
    rows = [[name, *(f"{100 * means[name]:.1f}" if name in means else "" for means in shown)] for name in names]
    header = ["exchanged, %", *(f"seed {record['seed']}, n = {record['accuracy'][0]['n']}" for record in records)]
    return "\n".join(table(header, rows)) + "\n"


def render_shapes(results: Path) -> str:
    """What a latent of a quarter of the width costs at the shapes of real models, counted here; no record is read."""
    rows = []
    for name in SHAPES:
        config = load_config(str(CONFIGS / f"{name}.json"))
        text = config.get_text_config()
        costs, split, rank = DecoderCosts.of(text), max(1, lowest_split(config)), text.hidden_size // 4
        plan = make_plan(text.num_hidden_layers, routing="latent", latent_split_layer=split, latent_rank=rank)
        vanilla, branch = vanilla_plan(text.num_hidden_layers), Branch(0, rank)
        shares = [
            prefill_flops(costs, plan, *prompt, branch=branch)
            / prefill_flops(costs, vanilla, *prompt, short_vanilla=True)
            for prompt in PROMPTS
        ]
        read_widths = sum(layer.key_width for layer in costs.layers[split:])
        parameters = rank * (text.hidden_size + read_widths) + read_widths
        moments = 8 * text.hidden_size * (text.hidden_size + read_widths)
        counts = [f"{parameters / 1e6:.0f} million", f"{moments / 1e9:.1f} GB"]
        rows.append([name, str(split), str(rank), *(f"{share:.3f}" for share in shares), *counts])
    return "\n".join(table(SHAPE_HEADINGS, rows)) + "\n"


def render_fit_time(results: Path) -> str:
    """What fitting takes at the shapes of real models: a row per record."""
    records = [read(path) for path in sorted((results / "fit_time").glob("*.json"))]
    rows = []
    for record in records:
        ratio, low, high = record["ratio"]
        rows.append(
            [
                record["shape"],
                str(record["latent_rank"]),
                f"{record['prefill_seconds']:.2f} s",
                f"{record['fit_seconds']:.2f} s, {ratio:.2f} ({low:.2f} to {high:.2f})",
                f"{record['solve_seconds']:.1f} s",
                f"{record['moments_bytes'] / 1e9:.2f} GB",
            ]
        )
    header = ["", "rank", "prefill of a picture", "the same with moments, ratio", "solution, once", "moments"]
    notes = [
        f"{record['shape']}: {record['image_tokens']} image and {record['text_tokens']} text tokens, "
        f"{record['dtype']}, {record['threads']} thread, medians of {record['pictures']} pictures in turn, in "
        f"brackets the 10th and 90th percentiles. `{record['command']}`, {made_on(record)}."
        for record in records
    ]
    return "\n".join([*table(header, rows), *(line for note in notes for line in ("", note))]) + "\n"


def made_on(record: dict[str, Any]) -> str:
    versions = record["versions"]
    return f"{record['hardware']}, torch {versions['torch']}, transformers {versions['transformers']}"


def _what(fields: dict[str, Any]) -> str:
    if "plan" in fields:
        side = f", side layers {fields['latent_side_layers']}" if fields["latent_side_layers"] else ""
        return f"`{fields['plan']}`, rank {fields['latent_rank']}{side}; {fields['how']}"
    if "keep" in fields:
        return f"{fields['keep']:.0%} of the image tokens after {fields['layer']} layers"
    if "fusion_layers" in fields:
        layers = ", ".join(map(str, fields["fusion_layers"]))
        return f"split {fields['split_layer']}, reads in {layers}"
    return f"split {fields['split_layer']}" if fields else ""


def _mean(scores: dict[str, Any]) -> str:
    return f"{100 * scores['mean']:.1f} ({100 * scores['low']:.1f} to {100 * scores['high']:.1f})"


def _points(interval: list[float]) -> str:
    estimate, low, high = (100 * value for value in interval)
    return f"{estimate:+.1f} ({low:+.1f} to {high:+.1f})"
