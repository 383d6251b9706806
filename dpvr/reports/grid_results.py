"""What `dpvr.benchmarks.grid` measured, read back: rows of tables as means over their seeds, with paired intervals.

grid.json   tables -> rows -> cells' names  --+
cells/*.json                                  +-->  Results.row(table, name) -> Measured
"""

from pathlib import Path
from statistics import fmean, mean, stdev
from typing import Any, NamedTuple

from dpvr.benchmarks.cells import Cell
from dpvr.reports.documents import read
from minibench.scoring import SIX_BENCH, Units, paired_difference, unit
from minibench.tasks import TASKS

Interval = tuple[float, float, float]  # estimate, low, high


class Measured(NamedTuple):
    """A row of a table: one cell per seed that was measured, of those planned."""

    name: str
    cells: list[dict[str, Any]]
    planned: list[str]

    @property
    def tasks(self) -> dict[str, float]:
        """{task: mean score over seeds}."""
        return {
            task: mean(cell["row"]["tasks"][task] for cell in self.cells) for task in self.cells[0]["row"]["tasks"]
        }

    @property
    def mean(self) -> float:
        return mean(self.tasks.values())

    @property
    def six_bench_mean(self) -> float:
        return mean(self.tasks[task] for task in SIX_BENCH)

    @property
    def means(self) -> list[float]:
        """The mean over tasks of each seed, the lowest first."""
        return sorted(cell["row"]["mean"] for cell in self.cells)

    @property
    def std(self) -> float | None:
        """Standard deviation of the mean over tasks between seeds; None for a single one."""
        return stdev(self.means) if len(self.means) > 1 else None

    @property
    def flops(self) -> float:
        """Prefill FLOPs of the median prompt as a share of vanilla's."""
        return self.cells[0]["prefill_flops_ratio"]

    @property
    def trainable_parameters(self) -> int:
        return self.cells[0]["trainable_parameters"]

    @property
    def final_loss(self) -> float | None:
        """The mean of the last logged training losses, and over seeds; None if nothing was trained."""
        losses = [cell["training"]["final_loss"] for cell in self.cells if cell["training"]]
        return mean(losses) if losses else None

    @property
    def units(self) -> Units:
        """{task: the score of every item, its mean over seeds}."""
        return _mean_units(self.cells)

    def minus(self, other: "Measured", tasks: tuple[str, ...] = TASKS) -> Interval:
        """The difference of the mean over tasks, and its 95 % interval over questions.

        Of two rows that were trained, the seeds that both have count: what a seed does is then on both sides.
        """
        return paired_difference(_mean_units(self._of_seeds(other)), _mean_units(other._of_seeds(self)), tasks)

    def _of_seeds(self, other: "Measured") -> list[dict[str, Any]]:
        seeds = {cell["cell"]["seed"] for cell in other.cells if cell["training"]}
        shared = [cell for cell in self.cells if cell["training"] and cell["cell"]["seed"] in seeds]
        return shared or self.cells


def _mean_units(cells: list[dict[str, Any]]) -> Units:
    """{task: the score of every item, its mean over cells}."""
    per_seed = [units(cell) for cell in cells]
    if len(per_seed) == 1:
        return per_seed[0]
    return {
        task: [fmean(scores) for scores in zip(*(one[task] for one in per_seed), strict=True)] for task in per_seed[0]
    }


def units(cell: dict[str, Any]) -> Units:
    """{task: the score of every item} of a cell, from its answers."""
    scores = {}
    for task, marks in cell["right"].items():
        several = len(marks) // cell["row"]["details"][task]["n"]
        scores[task] = [
            unit(task, [mark == "1" for mark in marks[start : start + several]])
            for start in range(0, len(marks), several)
        ]
    return scores


class Results:
    """A folder that `dpvr.benchmarks.grid` wrote.

    A cell counts as not measured if its settings or its definition have changed since: its questions or its training
    differ then.

    Raises:
        ValueError: for a folder without grid.json.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "grid.json").exists():
            raise ValueError(f"There is no grid.json in {folder}: run python -m dpvr.benchmarks.grid first.")
        grid = read(folder / "grid.json")
        self.settings, self.prompt, self.found_plans = grid["settings"], grid["prompt"], grid["found_plans"]
        self.definitions: dict[str, dict[str, Any]] = grid["cells"]
        self.measured: dict[str, dict[str, Any]] = {}
        for name, definition in self.definitions.items():
            path = folder / "cells" / f"{name}.json"
            cell = read(path) if path.exists() else None
            if cell and (Cell(**cell["cell"]), cell["settings"]) == (Cell(**definition), self.settings):
                self.measured[name] = cell
        self.tables = {
            table: [Measured(row["name"], self._cells(row["cells"]), row["cells"]) for row in rows]
            for table, rows in grid["tables"].items()
        }

    def _cells(self, names: list[str]) -> list[dict[str, Any]]:
        return [self.measured[name] for name in names if name in self.measured]

    def row(self, table: str, name: str) -> Measured | None:
        """The row, or None if none of its cells was measured."""
        found = next((row for row in self.tables[table] if row.name == name), None)
        return found if found and found.cells else None

    @property
    def vanilla(self) -> Measured | None:
        return self.row("table2", "vanilla")
