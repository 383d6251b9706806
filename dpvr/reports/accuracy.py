"""Tables of the accuracy grid, made from what `dpvr.benchmarks.grid` wrote and from nothing else.

grid.json, cells/*.json
    |
rows                  scores: the mean over seeds; intervals: paired over questions, against vanilla on the same ones
    |
table2                the rows of the paper's Table 2, as table2.json has them
blocks                docs/accuracy.md: Table 2 in short, what the grid says of the paper's claims, and all tables

A model that was not measured yet reads "not measured"; so does every comparison with it.
"""

from typing import Any

from dpvr.benchmarks.cells import Cell
from dpvr.reports.claims import NONE_FITS, NOT_MEASURED, Claim, Comparison, claims
from dpvr.reports.documents import COVERED
from dpvr.reports.documents import table as markdown
from dpvr.reports.grid_results import Interval, Measured, Results
from minibench.tasks import TASKS

NAMES = {
    "vanilla": "vanilla LLaVA",
    "full": "all weights",
    "lora_r16": "LoRA, r = 16",
    "lora_r64": "LoRA, r = 64",
    "fastv": "FastV, half of the tokens after layer 3",
    "vtw": "VTW, no image after layer 8",
    "random_pruning": "random pruning, the same cut",
    "untrained": "late fusion, untrained branch",
    "persistent_context": "DPVR-PC",
    "kv_substitution": "DPVR-KV",
    "late_fusion": "late fusion",
    "text_only": "text only past the split",
}


def table2(results: Results) -> list[dict[str, Any]]:
    """The measured rows of Table 2, as dpvr.benchmarks.accuracy has them, and what they cost."""
    rows = {row.name: row for row in results.tables["table2"] if row.cells}
    return [as_json(rows[name], results.vanilla) for name in NAMES if name in rows]


def as_json(row: Measured, vanilla: Measured | None) -> dict[str, Any]:
    return {
        "name": row.name,
        "routing": row.cells[0]["cell"]["fields"]["routing"],
        "tasks": row.tasks,
        "mean": row.mean,
        "std": row.std,
        "six_bench_mean": row.six_bench_mean,
        "n": row.cells[0]["row"]["n"],
        "seeds": [cell["cell"]["seed"] for cell in row.cells if cell["training"]],
        "trainable_parameters": row.trainable_parameters,
        "prefill_flops_ratio": row.flops,
        "final_loss": row.final_loss,
        "minus_vanilla": dict(zip(("estimate", "low", "high"), row.minus(vanilla), strict=True))
        if vanilla and row.name != "vanilla"
        else None,
        "cells": [cell["name"] for cell in row.cells],
    }


def render_table(results: Results, table: str, with_tasks: bool = True) -> str:
    """One row per model: costs, scores in per cent, difference to vanilla in points."""
    tasks = TASKS if with_tasks else ()
    header = ["", "prefill FLOPs", "trained", *tasks, "mean", "six-bench mean", "minus vanilla", "final loss"]
    rows = results.tables[table]
    if table == "table2":
        rows = sorted(rows, key=lambda row: list(NAMES).index(row.name))
    return "\n".join(markdown(header, [_cells(row, results, tasks) for row in rows])) + "\n"


def _cells(row: Measured, results: Results, tasks: tuple[str, ...]) -> list[str]:
    name = NAMES.get(row.name, row.name)
    if not row.cells:
        missing = NOT_MEASURED if row.planned else NONE_FITS
        return [name, missing, *[""] * (len(tasks) + 5)]
    seeds = f", {len(row.cells)} of {len(row.planned)} seeds" if len(row.planned) > 1 else ""
    spread = f" ± {100 * row.std:.1f}" if row.std is not None else ""
    same_questions = results.vanilla and row.cells[0]["cell"]["split"] == "test" and row.name != "vanilla"
    return [
        name + seeds,
        f"{row.flops:.3f}",
        f"{row.trainable_parameters:,}",
        *(f"{100 * row.tasks[task]:.1f}" for task in tasks),
        f"{100 * row.mean:.1f}{spread}",
        f"{100 * row.six_bench_mean:.1f}",
        points(row.minus(results.vanilla)) if same_questions else "",
        "" if row.final_loss is None else f"{row.final_loss:.4f}",
    ]


def points(interval: Interval) -> str:
    estimate, low, high = (100 * value for value in interval)
    return f"{estimate:+.1f} ({low:+.1f} to {high:+.1f})"


def render_claims(results: Results, in_short: bool = False) -> str:
    """Each claim with its comparisons and answers; all of them, or the short list."""
    chosen = [claim for claim in claims(results) if claim.in_short or not in_short]
    rows = [[claim.question if not index else "", *_compared(one)] for claim, index, one in _numbered(chosen)]
    return "\n".join(markdown(["", "compared", "points (95% interval)", ""], rows)) + "\n"


def _numbered(chosen: list[Claim]) -> list[tuple[Claim, int, Comparison]]:
    return [(claim, index, one) for claim in chosen for index, one in enumerate(claim.comparisons)]


def _compared(comparison: Comparison) -> list[str]:
    interval = points(comparison.interval) if comparison.interval else ""
    return [comparison.label, interval, f"**{comparison.answer}**"]


def render_run(results: Results) -> str:
    """What was measured with which settings, and on what."""
    cells, settings = list(results.measured.values()), results.settings
    lines = [
        f"{len(cells)} of {len(results.definitions)} cells were measured, each on the same {settings['limit']} "
        f"questions of each task, seed {settings['seed']}. Prefill FLOPs are those of the median prompt, "
        f"{results.prompt['image_tokens']} image and {results.prompt['text_tokens']} text tokens, as a share of "
        "vanilla's.",
    ]
    trained = [(cell["cell"]["training"]["num_rows"], Cell(**cell["cell"])) for cell in cells if cell["training"]]
    usual = {num_rows for num_rows, cell in trained if cell.split == "test" and cell.length == 1}
    if usual:
        lines.append(f"Trained models saw {_listed(usual)} pictures.")
    if others := {num_rows for num_rows, _ in trained} - usual:
        lines.append(f"In the tables of training length and learning rates some saw {_listed(others)}.")
    machines = {(cell["hardware"], cell["versions"]["torch"], cell["versions"]["transformers"]) for cell in cells}
    lines += [f"{machine}: torch {torch}, transformers {version}." for machine, torch, version in sorted(machines)]
    commands = dict.fromkeys(cell["command"] for cell in cells)
    return "\n".join([*lines, "", "Made by", "", *(f"- `{command}`" for command in commands)]) + "\n"


def _listed(numbers: set[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def render_plans(results: Results) -> str:
    """The plan of each budget, and whether it was found or is a provisional one."""
    rows = []
    for row in results.tables["frontier"]:
        if row.name.endswith(" plan") and row.planned:
            fields, budget = results.definitions[row.planned[0]]["fields"], row.name.split()[0]
            source = "dpvr.analysis.probe --find_plan" if float(budget) in results.found_plans else "provisional"
            split, layers = fields["split_layer"], fields["fusion_layers"]
            rows.append([budget, str(split), " ".join(map(str, layers)), source])
    return "\n".join(markdown(["budget", "split", "layers that read the image", "plan"], rows)) + "\n"


def render_summary(results: Results) -> str:
    """Table 2 and the claims in short."""
    return "\n".join(
        [
            render_table(results, "table2", with_tasks=False),
            render_claims(results, in_short=True),
            f"*yes* and *no*: the whole interval is on that side; *open*: it reaches both sides. {COVERED}",
            "",
        ]
    )


def blocks(results: Results) -> dict[str, str]:
    """{block: text} of docs/accuracy.md."""
    return {
        "accuracy_grid": render_summary(results),
        "grid_run": render_run(results),
        "grid_findings": render_claims(results),
        "grid_plans": render_plans(results),
        **{f"grid_{table}": render_table(results, table) for table in results.tables},
    }
