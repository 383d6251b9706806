"""The table on the front page: accuracy and costs of six methods.

results/minibench/              accuracy, prefill FLOPs and trained parameters of dpvr-mini
results/latency/SHAPE.json      ratios to vanilla: counted at LLaVA-1.5-7B's shape, timed on a CPU at a smaller one
"""

from pathlib import Path
from typing import Any, NamedTuple

from configuration_dpvr import CONTEXT, LETTERS
from dpvr.benchmarks.cells import DEPTH
from dpvr.reports.accuracy import points
from dpvr.reports.claims import NOT_MEASURED
from dpvr.reports.documents import COVERED, read, table
from dpvr.reports.grid_results import Measured, Results
from minibench.tasks import TASKS

LARGE, TIMED, EARLY = "llava-1.5-7b", "512x32", "early_reading_4"
BUDGET = "0.45"


class Method(NamedTuple):
    """A row: its name, where its accuracy stands in the grid, and its name in the records of latency."""

    name: str
    table: str
    row: str
    latency: str


METHODS = (
    Method("vanilla LLaVA", "table2", "vanilla", "vanilla"),
    Method("late fusion (the paper's method)", "table2", "late_fusion", "late_fusion"),
    Method("DPVR-KV", "table2", "kv_substitution", "kv_substitution"),
    Method("early split, chosen reading layers", "frontier", f"{BUDGET} plan", EARLY),
    Method("FastV", "table2", "fastv", "fastv"),
    Method("text only after the split (VTW)", "table2", "vtw", "text_only"),
)
HEADER = [
    "",
    "accuracy, %",
    "minus vanilla, points (95% interval)",
    "prefill FLOPs",
    "prefill FLOPs, 7B",
    "keys and values, 7B",
    "prefill time, CPU",
    "trained parameters",
]


def render_front(results: Path) -> str:
    """The table, and below it what was measured on what."""
    grid = Results(results / "minibench")
    large, timed = (read(results / "latency" / f"{shape}.json") for shape in (LARGE, TIMED))
    rows = [
        [method.name, *_accuracy(method, grid), *_costs(method, large, timed), _trained(method, grid)]
        for method in METHODS
    ]
    return "\n".join([*table(HEADER, rows), "", _note(grid, large, timed)]) + "\n"


def _measured(method: Method, grid: Results) -> Measured | None:
    return grid.row(method.table, method.row)


def _accuracy(method: Method, grid: Results) -> list[str]:
    row, vanilla = _measured(method, grid), grid.vanilla
    if row is None:
        return [NOT_MEASURED, "", ""]
    difference = points(row.minus(vanilla)) if vanilla and row.name != vanilla.name else ""
    return [f"{100 * row.mean:.1f}", difference, f"{row.flops:.3f}"]


def _trained(method: Method, grid: Results) -> str:
    row = _measured(method, grid)
    return "" if row is None else f"{row.trainable_parameters:,}"


def _costs(method: Method, large: dict[str, Any], timed: dict[str, Any]) -> list[str]:
    counted, measured = (_of(record, method.latency)["ratio_to_vanilla"] for record in (large, timed))
    return [f"{value:.3f}" for value in (counted["prefill_flops"], counted["kv_bytes"], measured["prefill_ms"])]


def _of(record: dict[str, Any], method: str) -> dict[str, Any]:
    return next(row for row in record["rows"] if row["method"] == method)


def _note(grid: Results, large: dict[str, Any], timed: dict[str, Any]) -> str:
    """What was measured on what."""
    tasks, (images, texts) = len(TASKS), (grid.prompt[name] for name in ("image_tokens", "text_tokens"))
    fields = {method.latency: grid.definitions[_planned(method, grid)] for method in METHODS}
    split, plan, pruning = fields["late_fusion"]["fields"], fields[EARLY]["fields"], fields["fastv"]["pruning"]
    row, (width, depth) = _of(large, EARLY), TIMED.split("x")
    shared, deep = row["plan"].split("|")
    layers = [index for index, letter in enumerate(shared + deep) if letter == LETTERS[CONTEXT]]
    return (
        f"Costs are ratios to vanilla. {COVERED} Accuracy, *prefill FLOPs* and trained parameters are those of "
        f"dpvr-mini, which has {DEPTH} layers: the mean of MiniBench's {tasks} tasks, {grid.settings['limit']} "
        f"questions each, and a prompt of {images} image and {texts} text tokens. There late fusion, DPVR-KV and "
        f"VTW split after {split['split_layer']} layers, and FastV keeps {pruning['keep']:.0%} of the image tokens "
        f"after {pruning['layer']} layers. *7B* is counted at LLaVA-1.5-7B's shape, for {row['image_tokens']} image "
        f"and {row['text_tokens']} text tokens; no such model was run. The time is measured for that prompt on a "
        f"model of random weights, {width} wide and {depth} layers deep, on {timed['hardware']}. The accuracy of the "
        f"early split is that of the plan found for dpvr-mini: split after {_layers(plan['split_layer'])}, reading in "
        f"layers {_listed(plan['fusion_layers'])}, counted from 0. Its 7B and time columns are those of another plan, "
        f"with {len(layers)} reading layers: split after {_layers(len(shared))} of {len(shared + deep)}, reading in "
        f"layers {_listed(layers)}."
    )


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count > 1)}"


def _planned(method: Method, grid: Results) -> str:
    """The name of a row's first cell, measured or not."""
    return next(row for row in grid.tables[method.table] if row.name == method.row).planned[0]


def _listed(layers: list[int]) -> str:
    *most, last = map(str, layers)
    return f"{', '.join(most)} and {last}" if most else last
