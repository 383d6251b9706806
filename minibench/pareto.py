"""The paper's Figure 1 at mini scale: accuracy by prefill FLOPs, and by trained parameters.

Bars are paired 95 % intervals of the difference to vanilla, which is asked the same questions.
"""

from pathlib import Path
from typing import Any

from .results import Measured, Results

COLOURS = {  # Okabe and Ito
    "vanilla": "#000000",
    "late fusion": "#D55E00",
    "sparse fusion": "#0072B2",
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
        return "sparse fusion" if "fusion_layers" in fields else "late fusion"
    return {"none": "vanilla", "text_only": "text only, VTW"}.get(fields["routing"], "DPVR-KV, DPVR-PC")


def rows(results: Results) -> list[Measured]:
    """All measured models on test questions, each once."""
    found = {}
    for row in (row for measured in results.tables.values() for row in measured):
        if row.cells and row.cells[0]["cell"]["split"] == "test":
            names = frozenset(cell["name"] for cell in row.cells)
            found.setdefault(names, row)
    return list(found.values())


def draw(results: Results, folder: Path) -> None:
    """Write pareto.png and pareto.svg; nothing without vanilla, which all are compared with."""
    from matplotlib.figure import Figure  # not at the top: a figure is wanted here alone

    vanilla, models = results.vanilla, rows(results)
    if vanilla is None:
        return
    figure = Figure(figsize=(11, 5), facecolor="white", layout="constrained")
    costs, sizes = figure.subplots(1, 2, sharey=True)
    for name in COLOURS:
        own = [row for row in models if family(row.cells[0]) == name]
        for trained in (True, False):
            chosen = [row for row in own if bool(row.cells[0]["training"]) == trained]
            _scatter(costs, [row.flops for row in chosen], chosen, vanilla, name, trained)
            _scatter(sizes, [row.trainable_parameters for row in chosen], chosen, vanilla, name, trained)
    for axis in (costs, sizes):
        axis.axhline(100 * vanilla.mean, color="black", linestyle=":", linewidth=1)
        axis.grid(alpha=0.3)
    costs.set(xlabel="prefill FLOPs, share of vanilla's", ylabel="accuracy, mean of eight tasks, %")
    costs.set_title("filled: trained; hollow: not trained", fontsize="medium")
    sizes.set_xscale("symlog", linthresh=1e5)
    sizes.set(xlabel="trained parameters", xlim=(-2e4, None))
    costs.legend(fontsize="small", loc="lower right")
    for kind in ("png", "svg"):
        figure.savefig(folder / f"pareto.{kind}", dpi=150, metadata={"Date": None} if kind == "svg" else None)


def _scatter(axis: Any, x: list[float], models: list[Measured], vanilla: Measured, name: str, trained: bool) -> None:
    if not models:
        return
    intervals = [row.minus(vanilla) for row in models]
    errors = [100 * (estimate - low) for estimate, low, _ in intervals]
    axis.errorbar(
        x,
        [100 * row.mean for row in models],
        yerr=errors,
        fmt=MARKERS[name],
        color=COLOURS[name],
        markerfacecolor=COLOURS[name] if trained or name == "vanilla" else "white",
        markersize=11 if name == "vanilla" else 6,
        elinewidth=0.6,
        label=name if trained or name in ("vanilla", "text only, VTW", "FastV", "random pruning") else None,
    )
