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
    Method("[latent](docs/latent.md), every deep layer reads", "0.40 latent, fitted", "latent"),
    Method("DPVR-KV, early split, untrained", "kv_substitution, split 2, untrained", "read_everywhere"),
    Method("late fusion (the paper's method)", "late_fusion", "late_fusion"),
    Method("FastV", "fastv", "fastv"),
    Method("random pruning", "random_pruning", "random_pruning"),
)
SPLIT = {"latent": "latent", "read_everywhere": "DPVR-KV", "late_fusion": "late fusion"}  # those that have one
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
    routed = [method for method in METHODS if method.latency in SPLIT]
    splits = [_of(large, method.latency)["plan"].index("|") for method in routed]
    seeds = {method.latency: len(_planned(method, grid).cells) for method in METHODS}
    return (
        f"Costs are ratios to vanilla. Accuracy and *prefill FLOPs* are those of dpvr-mini: the mean of MiniBench's "
        f"{len(TASKS)} tasks, {grid.settings['limit']} questions each, a prompt of {images} image and {texts} text "
        f"tokens; splits after {_named([_split(method, grid) for method in routed])} of its layers; "
        f"{_several(seeds['latent'], 'fit')} of the latent, {_several(seeds['late_fusion'], 'training run')} of late "
        f"fusion, {_several(seeds['random_pruning'], 'draw')} of random pruning. {COVERED} Vanilla has one query in "
        f"its last layer there, as every method has; *7B* and the time are shares of vanilla as it is. *7B* is "
        f"counted at LLaVA-1.5-7B's shape, for {prompt['image_tokens']} image and {prompt['text_tokens']} text "
        f"tokens, with splits after {_named(splits)} of its layers; FastV and random pruning keep half of the image "
        "tokens after three, here and there. No such model was run. The time is that of the language model's prefill "
        f"of this prompt in SmolVLM2-500M's shape, random weights, on {timed['hardware']}."
    )


def _planned(method: Method, grid: Results) -> Measured:
    """The method's row, measured or not."""
    return next(row for row in grid.tables["frontier"] if row.name == method.row)


def _split(method: Method, grid: Results) -> int:
    """The layers before the split of a method's plan."""
    fields = grid.definitions[_planned(method, grid).planned[0]]["fields"]
    return fields.get("latent_split_layer", fields.get("split_layer"))


def _named(splits: list[int]) -> str:
    """The splits of the rows in `SPLIT`, in their order."""
    *first, last = [f"{split} ({name})" for split, name in zip(splits, SPLIT.values(), strict=True)]
    return f"{', '.join(first)} and {last}"


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
