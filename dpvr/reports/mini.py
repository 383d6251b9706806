"""Tables of dpvr-mini: its scores, how it was pretrained, and what training a side branch costs.

dpvr_mini/accuracy.json       dpvr.benchmarks.accuracy         vanilla, untrained, trained, blind
dpvr_mini/training.json       train_sft.py                     what training the side branch took
dpvr_mini/pretraining.jsonl   dpvr.pretraining.train           the curve on the validation split
training_cpu.json             dpvr.benchmarks.training_step    a step of late fusion, LoRA and all weights
training_models/*.json        the same with --model            at the shapes of real models of any family
"""

import json
from pathlib import Path
from typing import Any

from dpvr.reports.documents import read, table

MINI = "dpvr_mini"
METHODS = {
    "late_fusion": "late fusion",
    "read_everywhere": "split at an eighth, read everywhere",
    "latent": "latent",
    "lora_r16": "LoRA, r = 16",
    "lora_r64": "LoRA, r = 64",
    "full": "all weights",
}
NAMES = {
    "vanilla": "vanilla LLaVA",
    "untrained": "late fusion, untrained side branch",
    "late_fusion": "late fusion, trained side branch",
    "blind": "vanilla LLaVA, blind",
    "constant reply": "the best constant reply",
}


def render_accuracy(results: Path) -> str:
    """The scores of all rows, and what is behind them."""
    accuracy, training = (read(results / MINI / f"{name}.json") for name in ("accuracy", "training"))
    rows = [*accuracy["rows"], {"name": "constant reply", **accuracy["constant_reply"]}]
    vanilla, blind = (next(row for row in rows if row["name"] == name) for name in ("vanilla", "blind"))
    lines = table(
        ["", *vanilla["tasks"], "mean", "95% interval of the mean", "six-bench mean"],
        [
            [
                NAMES[row["name"]],
                *map(_percent, row["tasks"].values()),
                _percent(row["mean"]),
                f"{_percent(row['low'])} to {_percent(row['high'])}",
                _percent(row["six_bench_mean"]),
            ]
            for row in rows
        ],
    )
    details = blind["details"]
    lines += ["", "Blind against chance, in single questions answered right (the scores above are stricter):", ""]
    lines += table(
        ["", *details],
        [
            ["blind", *(_percent(detail["accuracy"]) for detail in details.values())],
            ["a guess among the possible replies", *(_percent(detail["chance"]) for detail in details.values())],
            ["single questions", *(str(detail["questions"]) for detail in details.values())],
        ],
    )
    pope = ("precision", "recall", "f1", "yes_ratio")
    lines += ["", "Existence, as POPE reports it:", ""]
    lines += table(
        ["", *pope],
        [
            [NAMES[row["name"]], *(_percent(row["details"]["existence"][name]) for name in pope)]
            for row in accuracy["rows"]
        ],
    )
    return "\n".join([*lines, "", *_protocol(accuracy, training, vanilla)]) + "\n"


def _protocol(accuracy: dict[str, Any], training: dict[str, Any], vanilla: dict[str, Any]) -> list[str]:
    """How the scores were measured, and on what."""
    plan = ", ".join(f"{name}={value!r}" for name, value in accuracy["dpvr"].items() if value is not None)
    return [
        f"{accuracy['limit']} test questions of each task, seed {accuracy['seed']}; the 95% half-width of one task's "
        f"score is at most {_widest(accuracy['rows'])} points. {vanilla['ended']:.1%} of the vanilla model's replies "
        f"ended by themselves. Config: `{plan}`; {training['trainable_parameters']:,} parameters were trained, for "
        f"{training['train_seconds']:.0f} s.",
        f"Made by `{accuracy['command']}` and `{training['command']}`",
        *_machine(accuracy),
    ]


def render_pretraining(results: Path) -> str:
    """The validation scores in the course of pretraining."""
    log = [
        json.loads(line) for line in (results / MINI / "pretraining.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    starts = [entry for entry in log if entry["stage"] == "start"]
    validations = [entry for entry in log if "validation" in entry]
    losses = {entry["step"]: entry["loss"] for entry in log if entry["stage"] == "llava" and "loss" in entry}
    lines = table(
        ["step", "loss", *validations[0]["validation"], "mean"],
        [
            [
                str(entry["step"]),
                f"{losses[max(step for step in losses if step <= entry['step'])]:.3f}",
                *map(_percent, entry["validation"].values()),
                _percent(entry["mean"]),
            ]
            for entry in validations
        ],
    )
    made = ["Made by these commands, each of which went on from the last checkpoint of the one before:", ""]
    made += [f"- `{command}`" for command in dict.fromkeys(entry["command"] for entry in starts)]
    return "\n".join([*lines, "", *made, "", *_machine(starts[-1])]) + "\n"


def render_training(results: Path) -> str:
    """One row per method: what a training step takes, at a LLaVA's shape."""
    return "\n".join(_steps(read(results / "training_cpu.json"))) + "\n"


def render_family_training(results: Path) -> str:
    """The same at the shapes of real models of any family, a table each."""
    tables = [_steps(read(path)) for path in sorted((results / "training_models").glob("*.json"))]
    return "\n\n".join("\n".join(lines) for lines in tables) + "\n"


def _steps(training: dict[str, Any]) -> list[str]:
    first = training["rows"][0]["seconds_per_step"]
    lines = table(
        ["", "seconds a step (10th to 90th percentile)", "ratio", "saved for backward", "peak memory", "trained"],
        [
            [
                METHODS[row["method"]],
                f"{row['seconds_per_step']:.2f} ({row['spread'][0]:.2f} to {row['spread'][1]:.2f})",
                f"{row['seconds_per_step'] / first:.2f}",
                f"{row['saved_activation_bytes'] / 1e6:,.0f} MB",
                f"{row['peak_bytes'] / 1e6:,.0f} MB",
                f"{row['trainable_parameters']:,}",
            ]
            for row in training["rows"]
        ],
    )
    return [
        *lines,
        "",
        f"Shape {training['shape']}, batch {training['batch_size']}, {training['image_tokens']} image and "
        f"{training['text_tokens']} text tokens, {training['dtype']}; medians of {training['steps']} interleaved "
        f"rounds. Made by `{training['command']}`",
        *_machine(training),
    ]


def _machine(record: dict[str, Any]) -> list[str]:
    versions = record["versions"]
    return [f"on {record['hardware']}, torch {versions['torch']}, transformers {versions['transformers']}."]


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _widest(rows: list[dict[str, Any]]) -> str:
    widths = [detail["high"] - detail["low"] for row in rows for detail in row["details"].values()]
    return f"{100 * max(widths) / 2:.1f}"
