"""The table on the front page: accuracy and costs of six methods.

results/frontier/               accuracy and prefill FLOPs of dpvr-mini
results/latency/models/         ratios to vanilla in the shapes of real models: counted at LLaVA-1.5-7B's, timed at
                                SmolVLM2-500M's
"""

from pathlib import Path
from typing import Any, NamedTuple

from dpvr.reports.accuracy import points
from dpvr.reports.claims import NOT_MEASURED
from dpvr.reports.documents import COVERED, read, table
from dpvr.reports.grid_results import Measured, Results
from minibench.tasks import TASKS

LARGE, TIMED = "llava-1.5-7b", "smolvlm2-500m"


class Method(NamedTuple):
    """A row: its name, its row in the grid, and its name in the records of latency."""

    name: str
    row: str
    latency: str


METHODS = (
    Method("vanilla", "vanilla", "vanilla"),
    Method("[latent](docs/latent.md), every deep layer reads", "latent of dpvr-mini", "latent"),
    Method("DPVR-KV, early split", "kv_substitution, split 2, untrained", "read_everywhere"),
    Method("late fusion (the paper's method)", "late_fusion", "late_fusion"),
    Method("FastV", "fastv", "fastv"),
    Method("random pruning", "random_pruning", "random_pruning"),
)
HEADER = [
    "",
    "accuracy, %",
    "minus vanilla, points (95% interval)",
    "prefill FLOPs",
    "prefill FLOPs, 7B",
    "keys and values, 7B",
    "prefill time, 500M, CPU",
]


def render_front(results: Path) -> str:
    """The table, and below it what was measured on what."""
    grid = Results(results / "frontier")
    large, timed = (read(results / "latency" / "models" / f"{shape}.json") for shape in (LARGE, TIMED))
    rows = [[method.name, *_accuracy(method, grid), *_costs(method, large, timed)] for method in METHODS]
    return "\n".join([*table(HEADER, rows), "", _note(grid, large, timed)]) + "\n"


def _measured(method: Method, grid: Results) -> Measured | None:
    return grid.row("frontier", method.row)


def _accuracy(method: Method, grid: Results) -> list[str]:
    row, vanilla = _measured(method, grid), _measured(METHODS[0], grid)
    if row is None:
        return [NOT_MEASURED, "", ""]
    difference = points(row.minus(vanilla)) if row.name != vanilla.name else ""
    return [f"{100 * row.mean:.1f}", difference, f"{row.flops:.3f}"]


def _costs(method: Method, large: dict[str, Any], timed: dict[str, Any]) -> list[str]:
    counted, measured = (_of(record, method.latency)["ratio_to_vanilla"] for record in (large, timed))
    time = measured["prefill_without_tower_ms"]
    return [f"{counted['prefill_flops']:.3f}", f"{counted['kv_bytes']:.3f}", f"{time:.3f}"]


def _of(record: dict[str, Any], method: str) -> dict[str, Any]:
    """The method's row of the smallest prompt."""
    return min((row for row in record["rows"] if row["method"] == method), key=lambda row: row["image_tokens"])


def _note(grid: Results, large: dict[str, Any], timed: dict[str, Any]) -> str:
    """What was measured on what."""
    (images, texts), prompt = (grid.prompt[name] for name in ("image_tokens", "text_tokens")), _of(large, "latent")
    splits = {name: _of(large, name)["plan"].index("|") for name in ("latent", "read_everywhere", "late_fusion")}
    return (
        f"Costs are ratios to vanilla. Accuracy and *prefill FLOPs* are those of dpvr-mini: the mean of MiniBench's "
        f"{len(TASKS)} tasks, {grid.settings['limit']} questions each, a prompt of {images} image and {texts} text "
        f"tokens. {COVERED} *7B* is counted at LLaVA-1.5-7B's shape, for {prompt['image_tokens']} image and "
        f"{prompt['text_tokens']} text tokens, with splits after {splits['latent']} (latent), "
        f"{splits['read_everywhere']} (DPVR-KV) and {splits['late_fusion']} (late fusion) of its layers; FastV and "
        "random pruning keep half of the image tokens after three. No such model was run. The time is that of the "
        "language model's prefill of this prompt in SmolVLM2-500M's shape, random weights, "
        f"on {timed['hardware']}."
    )
