"""What a number of the documents comes from: a field of a file in results/, or of code, or a sum of such.

    "dpvr_mini/depth.json rows/-1/mean"          a file of results/, and the path of a field in it
    {"ratio": [SOURCE, SOURCE]}                  arithmetic on sources (ARITHMETIC)
    {"grid": ["table2", "late_fusion"]}          what is counted or averaged first (COUNTED)

A step of a path is a key, a place in a list ("-1"), "*" for everything in it, or "method=fastv&batch_size=4" for the
one row with these values.
"""

import importlib
import json
from argparse import Namespace
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dpvr.cost_table import Model, load_config, make_model, row
from dpvr.reports.claims import weak_spot
from dpvr.reports.documents import read
from dpvr.reports.grid_results import Measured, Results
from minibench.tasks import TASKS

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "configs" / "shapes"


def value(source: Any, results: Path) -> Any:
    """What a source comes to.

    Raises:
        ValueError: for a source of another form, or a file or field that is not there.
    """
    if isinstance(source, str):
        name, _, path = source.partition(" ")
        return field(document(results / name), path)
    if not isinstance(source, dict) or len(source) != 1:
        raise ValueError(f"A source is a file and a field, or one operation, not {source!r}.")
    ((name, operands),) = source.items()
    if name in COUNTED:
        return COUNTED[name](results, operands)
    if name not in ARITHMETIC:
        raise ValueError(f"There is no operation {name!r}: there are {', '.join([*ARITHMETIC, *COUNTED])}.")
    several = operands if isinstance(operands, list) else [operands]
    return ARITHMETIC[name](*(each if isinstance(each, int | float) else value(each, results) for each in several))


@cache
def document(path: Path) -> Any:
    """A JSON file, or the list of a file of JSON lines."""
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return read(path)


def field(inside: Any, path: str) -> Any:
    """The field of a document at a path.

    Raises:
        ValueError: if a step leads nowhere, or to more than one row.
    """
    step, _, rest = path.partition("/")
    if not step:
        return inside
    if step == "*":
        return [field(each, rest) for each in (inside.values() if isinstance(inside, dict) else inside)]
    if isinstance(inside, list) and "=" in step:
        wanted = dict(part.split("=") for part in step.split("&"))
        found = [row for row in inside if all(str(row.get(key)) == text for key, text in wanted.items())]
        if len(found) != 1:
            raise ValueError(f"{len(found)} rows have {step}, and one is needed.")
        return field(found[0], rest)
    try:
        return field(inside[int(step) if isinstance(inside, list) else step], rest)
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"There is no {step!r} on the path {path!r}.") from None


# -- what is counted, not read --------------------------------------------------------------------------------------


def of_code(_: Path, name: str) -> Any:
    """ "module:NAME", a constant."""
    module, _, constant = name.partition(":")
    found = vars(importlib.import_module(module))
    if constant not in found:
        raise ValueError(f"There is no {constant} in {module}.")
    return found[constant]


def grid_mean(results: Path, row: list[str]) -> float:
    """The mean over tasks and seeds of a row of the accuracy grid, [table, row]."""
    return _row(results, *row).mean


def grid_flops(results: Path, row: list[str]) -> float:
    """The prefill FLOPs of a row of the accuracy grid, as a share of vanilla's."""
    return _row(results, *row).flops


def grid_difference(results: Path, rows: list[str]) -> list[float]:
    """First row minus second, [table, row, table, row, tasks if not all], and the paired 95% interval's limits."""
    return list(_row(results, *rows[:2]).minus(_row(results, *rows[2:4]), tuple(rows[4:]) or TASKS))


def grid_apart(results: Path, rows: list[str]) -> float:
    """How far the means of a row's seeds are apart, [table, row, ...]; of several rows the most."""
    found = [_row(results, rows[0], name) for name in rows[1:]]
    return max(row.means[-1] - row.means[0] for row in found)


def weak_spot_of_late_fusion(results: Path, grid: str) -> list[float]:
    """What late fusion of a table loses on multi_image, less what it loses elsewhere, with its interval's limits."""
    compared = weak_spot(_row(results, grid, "late_fusion"), _row(results, grid, "vanilla"))
    return list(compared.interval)


def _row(results: Path, table: str, name: str) -> Measured:
    """A row of a table of the paper's grid, or of "frontier/TABLE" of the other one."""
    folder, _, table = table.rpartition("/")
    row = _grid(results / (folder or "minibench")).row(table, name)
    if row is None:
        raise ValueError(f"The row {name!r} of {table} was not measured.")
    return row


@cache
def _grid(folder: Path) -> Results:
    return Results(folder)


def counted(_: Path, wanted: dict[str, Any]) -> int:
    """What `python -m dpvr.costs` counts at the shape of a real model.

    Args:
        wanted: "shape", a file of configs/shapes; "plan", fields of a plan; "tokens", image and text tokens (576 and
            128); "what", prefill_flops, kv_bytes, trained_parameters or parameters; with "short" vanilla's last layer
            has one query, too.
    """
    model, what = _shape(wanted["shape"]), wanted.get("what", "prefill_flops")
    image_tokens, text_tokens = wanted.get("tokens", (576, 128))
    args = Namespace(
        image_tokens=image_tokens, text_tokens=text_tokens, dtype="bfloat16", short_vanilla="short" in wanted
    )
    return model.num_parameters if what == "parameters" else row(model, wanted["plan"], args)[what]


def counted_share(results: Path, wanted: dict[str, Any]) -> float:
    """The same as a share of vanilla's."""
    return counted(results, wanted) / counted(results, wanted | {"plan": {"routing": "none"}})


def weights(_: Path, without: str) -> int:
    """Parameters of dpvr-mini, whose files are the root's, but for those whose names hold a word."""
    with safe_open(ROOT / "model.safetensors", "pt") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys() if without not in name)


def option(results: Path, wanted: list[str]) -> float:
    """The number behind an option of a recorded command: [SOURCE of the command, "--fit_rows"]."""
    words = value(wanted[0], results).split()
    return float(words[words.index(wanted[1]) + 1])


@cache
def _shape(name: str) -> Model:
    return make_model(load_config(str(SHAPES / f"{name}.json")))


COUNTED: dict[str, Callable[[Path, Any], Any]] = {
    "code": of_code,
    "grid": grid_mean,
    "grid_flops": grid_flops,
    "grid_difference": grid_difference,
    "grid_apart": grid_apart,
    "weak_spot": weak_spot_of_late_fusion,
    "counted": counted,
    "counted_share": counted_share,
    "weights": weights,
    "option": option,
}
ARITHMETIC: dict[str, Callable[..., Any]] = {
    "minus": lambda first, second: first - second,
    "plus": lambda *terms: sum(terms),
    "ratio": lambda first, second: first / second,
    "times": lambda first, second: first * second,
    "points": lambda share: 100 * share,
    "apart": lambda first, second: abs(first / second - 1),
    "mean": lambda found: sum(found) / len(found),
    "count": len,
    "max": lambda *found: max(found[0] if len(found) == 1 else found),
    "min": lambda *found: min(found[0] if len(found) == 1 else found),
    "megabytes": lambda text: float(text.removesuffix("mb")),
    "at": lambda found, index: found[index],
}
