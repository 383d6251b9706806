"""The tables of docs/latent.md: what a fitted latent explains, how it answers, and how it adapts.

results/dpvr_mini/latent/fit_*.json      python -m dpvr.training.fit, one per plan
results/dpvr_mini/latent/accuracy.json   python -m dpvr.benchmarks.latents --split test
results/dpvr_mini/latent/adapted.json    training.json of train_sft.py --compare late_fusion kv_substitution lora
"""

from pathlib import Path
from typing import Any

from dpvr.reports.documents import read, table

FIT_HEADINGS = [
    "plan",
    "rank",
    "side layers",
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
ADAPTED_HEADINGS = ["", "exchanged, %", "ordinary, %", "prefill FLOPs", "trained parameters", "objective", "s a step"]


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
        f"dpvr-mini, fitted on {first['num_samples']} pictures of MiniBench and measured on {first['eval_samples']} "
        f"others of the same split, with the rows' own answers given; `{first['command']}`, {made_on(first)}. One "
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
        f"vanilla's whose last layer has one query too. `{document['command']}`, {made_on(document)}.",
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
        rows.append(
            [
                row["name"],
                *(f"{100 * means[row['name'], kind]['mean']:.1f}" for kind in ("swapped", "ordinary")),
                f"{row['prefill_flops']:.3f}",
                f"{row['trained_parameters']:,}" if row["trained_parameters"] else "0",
                objective,
                seconds,
            ]
        )
    fitted = means["fitted latent", "swapped"]
    steps = max(entry.get("step", 0) for entry in record["log"])
    lines = [
        *table(ADAPTED_HEADINGS, rows),
        "",
        f"MiniBench's validation questions, n = {fitted['n']}, {steps} steps each on the same rows. The latent as it "
        f"was fitted, before any step: {100 * fitted['mean']:.1f} on exchanged pictures. `{record['command']}`, "
        f"{made_on(record)}. One seed.",
    ]
    return "\n".join(lines) + "\n"


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


def _points(interval: list[float]) -> str:
    estimate, low, high = (100 * value for value in interval)
    return f"{estimate:+.1f} ({low:+.1f} to {high:+.1f})"
