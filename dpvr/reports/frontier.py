"""The frontier's tables and its figure: what answers are kept at how much of the prefill, on the same test questions.

results/frontier/ --Results--> frontier, reduction, rows, ranks      blocks of docs/latent.md
                          --> docs/accuracy_by_cost.png             for the front page
"""

import gzip
import json
from itertools import chain
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpvr.reports.accuracy import points
from dpvr.reports.claims import NOT_MEASURED
from dpvr.reports.documents import COVERED, table
from dpvr.reports.grid_results import Measured, Results
from dpvr.reports.latents import made_on
from minibench.tasks import TASKS

HEADINGS = ["", "prefill FLOPs", "mean, %", "minus vanilla (95%)", "replies equal", "seeds"]
TABLES = ("frontier", "reduction", "rows", "ranks")
LISTED = 24  # rows named that were not measured
KINDS = {  # of rows, by what their names hold, the first that fits: colour (Okabe and Ito), marker
    "vanilla": ("#000000", "*"),
    "latent": ("#0072B2", "o"),
    "kv_substitution": ("#009E73", "v"),
    "persistent_context": ("#009E73", "v"),
    "late_fusion": ("#D55E00", "s"),
    "fastv": ("#E69F00", "P"),
    "random_pruning": ("#CC79A7", "X"),
    "vtw": ("#999999", "^"),
    "lora": ("#56B4E9", "D"),
    "full": ("#56B4E9", "D"),
}
LEGEND = {
    "vanilla": "vanilla",
    "latent": "latent (docs/latent.md); open: read\nat a half or a quarter of its tokens",
    "late_fusion": "late fusion; rightmost the paper's",
    "kv_substitution": "DPVR-KV; right of vanilla DPVR-PC",
    "fastv": "FastV",
    "random_pruning": "random pruning",
    "vtw": "text only (VTW)",
    "lora": "LoRA, all weights",
}


def blocks(results: Path) -> dict[str, str]:
    """{block: text} of docs/latent.md."""
    grid = Results(results / "frontier")
    replies = {name: _replies(results / "frontier", name) for name in grid.measured}
    return {name: _render(grid, name, replies) for name in TABLES}


def _render(grid: Results, name: str, replies: dict[str, list[str]]) -> str:
    """A row per model that was measured, and below which are still to be; and of the first table what was asked."""
    vanilla = grid.row("frontier", "vanilla")
    measured = [row for row in grid.tables[name] if row.cells]
    rows, headings = [_row(row, vanilla, replies) for row in measured], HEADINGS
    if name == TABLES[0]:  # the names of the others' rows say it
        headings = ["", "plan", *HEADINGS[1:]]
        rows = [[row[0], _plan(each.cells[0]["cell"]), *row[1:]] for row, each in zip(rows, measured, strict=True)]
    missing = [row.name for row in grid.tables[name] if row.planned and not row.cells]
    none = [row.name for row in grid.tables[name] if not row.planned]
    lines = [*table(headings, rows), *(["", _note(grid, vanilla)] if name == TABLES[0] else [])]
    if missing:
        listed = "; ".join(missing) if len(missing) <= LISTED else f"{len(missing)} more rows of this table"
        lines += ["", f"{NOT_MEASURED.capitalize()}: {listed}."]
    if none:
        lines += ["", f"Nothing fits these budgets: {'; '.join(none)}."]
    return "\n".join(lines) + "\n"


def _row(row: Measured, vanilla: Measured, replies: dict[str, list[str]]) -> list[str]:
    base = replies[vanilla.cells[0]["name"]]
    shares = [sum(map(str.__eq__, replies[cell["name"]], base)) / len(base) for cell in row.cells]
    return [
        row.name,
        f"{row.flops:.3f}",
        f"{100 * row.mean:.1f}",
        "" if row is vanilla else points(row.minus(vanilla)),
        f"{sum(shares) / len(shares):.1%}",
        seeds_of(row) if len(row.planned) > 1 else "",
    ]


def seeds_of(row: Measured) -> str:
    """How many there are and, of several, the lowest and the highest mean."""
    apart = f" ({100 * row.means[0]:.1f} to {100 * row.means[-1]:.1f})" if len(row.cells) > 1 else ""
    return f"{len(row.cells)}{apart}"


def _plan(cell: dict[str, Any]) -> str:
    """What the row's model does, in words; nothing of vanilla and of what only trains it."""
    fields, cut = cell["fields"], cell["pruning"]
    if cut and "layer" in cut:
        return f"{cut['keep']:.0%} kept after {cut['layer']}"
    split = fields.get("latent_split_layer", fields.get("split_layer"))
    rank = f", rank {fields['latent_rank']}" if "latent_rank" in fields else ""
    stride = f", one token in {fields['latent_stride']}" if "latent_stride" in fields else ""
    side = ", after a side layer" if fields.get("latent_side_layers") else ""
    read = ", read in " + " ".join(map(str, fields["fusion_layers"])) if "fusion_layers" in fields else ""
    return "" if split is None else f"split {split}{rank}{stride}{side}{read}"


def _note(grid: Results, vanilla: Measured) -> str:
    image, text = (grid.prompt[name] for name in ("image_tokens", "text_tokens"))
    return (
        f"dpvr-mini, {grid.settings['limit']} questions of each of the {len(TASKS)} tasks, test split, the same for "
        "all rows; rows with several seeds are their means, and in brackets are the lowest and the highest. "
        f"{COVERED} Prefill FLOPs of a prompt of {image} image and {text} text tokens, as a share of vanilla's whose "
        "last layer has one query too. `python -m "
        f"dpvr.benchmarks.grid --grid frontier --limit {grid.settings['limit']}`, {made_on(vanilla.cells[0])}."
    )


def _replies(folder: Path, name: str) -> list[str]:
    texts = json.loads(gzip.decompress((folder / "cells" / f"{name}.replies.json.gz").read_bytes()))
    return list(chain.from_iterable(texts))


def draw(results: Path, docs: Path) -> list[Path]:
    """Write accuracy_by_cost.png, and return it."""
    grid = Results(results / "frontier")
    figure = Figure(figsize=(9, 4.8), facecolor="white", layout="constrained")
    axis, vanilla = figure.subplots(), grid.row("frontier", "vanilla")
    shown = [row for name in ("frontier", "reduction") for row in grid.tables[name] if row.cells]
    for row in shown:
        _point(axis, row, vanilla)
    axis.axhline(100 * vanilla.mean, color="black", linestyle=":", linewidth=1)
    axis.grid(alpha=0.3)
    axis.set(xlabel="prefill FLOPs, share of vanilla's", ylabel="accuracy, mean of eight tasks, %")
    axis.set_title("dpvr-mini on MiniBench; bars: 95% interval of the difference to vanilla", fontsize="medium")
    looks = {KINDS[kind_of(row)] for row in shown}
    handles = [
        axis.scatter([], [], color=KINDS[kind][0], marker=KINDS[kind][1], label=name)
        for kind, name in LEGEND.items()
        if KINDS[kind] in looks
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    path = docs / "accuracy_by_cost.png"
    figure.savefig(path, dpi=150)
    return [path]


def kind_of(row: Measured) -> str:
    name = "latent" if row.cells[0]["cell"]["fields"]["routing"] == "latent" else row.name
    return next(kind for kind in KINDS if kind in name)


def _point(axis: Axes, row: Measured, vanilla: Measured) -> None:
    colour, marker = KINDS[kind_of(row)]
    estimate, low, _ = row.minus(vanilla)
    axis.errorbar(
        row.flops,
        100 * row.mean,
        yerr=None if row is vanilla else 100 * (estimate - low),
        fmt=marker,
        color=colour,
        fillstyle="none" if "latent_stride" in row.cells[0]["cell"]["fields"] else "full",
        markersize=11 if row is vanilla else 6,
        zorder=3 if kind_of(row) in ("vanilla", "latent") else 2,
        elinewidth=0.6,
    )
