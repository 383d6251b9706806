"""The paper's Figure 1 at mini scale: accuracy by prefill FLOPs, and by trained parameters.

    pareto.png, pareto.svg     both, for docs/accuracy.md

Bars are paired 95 % intervals of the difference to vanilla, which is asked the same questions.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dpvr.analysis.curves import save
from dpvr.reports.grid_results import Measured, Results

COLOURS = {  # Okabe and Ito
    "vanilla": "#000000",
    "late fusion": "#D55E00",
    "chosen reading layers": "#0072B2",
    "DPVR-KV, DPVR-PC": "#009E73",
    "text only, VTW": "#999999",
    "FastV": "#E69F00",
    "random pruning": "#CC79A7",
    "LoRA, all weights": "#56B4E9",
}
MARKERS = dict(zip(COLOURS, "*osDv^PX", strict=True))


def family(cell: dict[str, Any]) -> str:
    """Which entry of the legend a cell belongs to."""
    fields, training, pruning = (cell["cell"][name] for name in ("fields", "training", "pruning"))
    if pruning:
        return "random pruning" if pruning["rank"] == "random" else "FastV"
    if training and training["method"] != "dpvr":
        return "LoRA, all weights"
    if fields["routing"] == "late_fusion":
        return "chosen reading layers" if "fusion_layers" in fields else "late fusion"
    return {"none": "vanilla", "text_only": "text only, VTW"}.get(fields["routing"], "DPVR-KV, DPVR-PC")


def rows(results: Results, tables: Iterable[str]) -> list[Measured]:
    """The models of some tables that were measured on test questions, each once."""
    found: dict[frozenset[str], Measured] = {}
    for row in (row for table in tables for row in results.tables[table]):
        if row.cells and row.cells[0]["cell"]["split"] == "test":
            names = frozenset(cell["name"] for cell in row.cells)
            found.setdefault(names, row)
    return list(found.values())


def draw(results: Results, folder: Path) -> list[Path]:
    """Write pareto.png and pareto.svg, and return them; nothing without vanilla, which all are compared with."""
    vanilla = results.vanilla
    if vanilla is None:
        return []
    figure = Figure(figsize=(11, 5), facecolor="white", layout="constrained")
    costs, sizes = figure.subplots(1, 2, sharey=True)
    _by_cost(costs, results, vanilla)
    costs.set_title("filled: trained; hollow: not trained", fontsize="medium")
    costs.legend(handles=_legend(), fontsize="small", loc="lower right")
    for row in rows(results, ("table2", "side_branch")):
        _point(sizes, row.trainable_parameters, row, vanilla)
    _lines(sizes, vanilla)
    sizes.set_title("Table 2 and the side branch's depth and start", fontsize="medium")
    sizes.set_xscale("symlog", linthresh=1e5)
    sizes.set(xlabel="trained parameters", xlim=(-2e4, 1e7))
    save(figure, folder / "pareto")
    return [folder / "pareto.png", folder / "pareto.svg"]


def _by_cost(axis: Axes, results: Results, vanilla: Measured) -> None:
    for row in rows(results, results.tables):
        _point(axis, row.flops, row, vanilla)
    _lines(axis, vanilla)
    axis.set(xlabel="prefill FLOPs, share of vanilla's", ylabel="accuracy, mean of eight tasks, %")


def _lines(axis: Axes, vanilla: Measured) -> None:
    axis.axhline(100 * vanilla.mean, color="black", linestyle=":", linewidth=1)
    axis.grid(alpha=0.3)


def _legend() -> list[Line2D]:
    return [
        Line2D([], [], linestyle="", marker=MARKERS[name], color=colour, label=name)
        for name, colour in COLOURS.items()
    ]


def _point(axis: Axes, x: float, row: Measured, vanilla: Measured) -> None:
    name = family(row.cells[0])
    estimate, low, _ = row.minus(vanilla)
    is_filled = bool(row.cells[0]["training"]) or name == "vanilla"
    axis.errorbar(
        x,
        100 * row.mean,
        yerr=100 * (estimate - low) if row is not vanilla else None,
        fmt=MARKERS[name],
        color=COLOURS[name],
        markerfacecolor=COLOURS[name] if is_filled else "white",
        markersize=11 if name == "vanilla" else 6,
        zorder=4 if name == "vanilla" else 2 + is_filled,
        elinewidth=0.6,
    )
