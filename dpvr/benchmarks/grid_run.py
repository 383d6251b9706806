"""How the accuracy grid is run: cell by cell, each with files of its own, so that a killed run loses one cell.

make_questions, make_grid     the questions that all cells are asked, and the tables of cells (cells.py)
    |
select                        the cells to measure, the slow baselines last
    |
run_grid: claimed             a lock, so that several runs share the work
     measure: train, load     train_sft.py in a process of its own, then the model with what was trained
              ask, score      the same questions for all
              write           scores, right answers, replies
"""

import fcntl
import gzip
import hashlib
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, ProcessorMixin
from transformers.utils import cached_file

from dpvr.benchmarks.cells import BUDGETS, DEFAULTS, Cell, Fields, Grid, GridCosts, Row, unique_cells
from dpvr.benchmarks.frontier_cells import FrontierGrid, ShortCosts
from dpvr.benchmarks.latents_run import fit_new
from dpvr.benchmarks.pruning import prune
from dpvr.benchmarks.reduction import choose
from dpvr.inference.evaluation import Reply, ask, median_prompt, score
from dpvr.record import run_record, without_folders
from minibench.data import make_items
from minibench.tasks import Item
from modeling_dpvr import DpvrLlavaConfig, DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor

FRONTIER = "frontier"  # of --grid
LAST_LOSSES = 3  # logged losses, of ten steps each, whose mean is a run's final loss


PLANS = Path("results/saturation")  # where dpvr.analysis.probe writes plans.json, unless another folder is named


class Questions(NamedTuple):
    """What all cells are asked."""

    items: dict[str, list[Item]]  # by split
    image_tokens: int  # of the median test prompt
    text_tokens: int


def make_questions(processor: ProcessorMixin, limit: int, seed: int) -> Questions:
    """The items of both splits, and the lengths of the median test prompt."""
    items = {split: make_items(split, limit, seed) for split in ("test", "validation")}
    return Questions(items, *median_prompt(processor, items["test"]))


def make_grid(args: Namespace, questions: Questions) -> tuple[dict[str, list[Row]], list[float]]:
    """The tables, and the budgets whose plans were found."""
    config = DpvrLlavaConfig.from_pretrained(args.model_name_or_path)
    if others := {name: value for name, usual in DEFAULTS.items() if (value := getattr(config, name)) != usual}:
        raise ValueError(
            f"The config of {args.model_name_or_path!r} sets {others}, but cells take for granted that it has "
            f"{ {name: DEFAULTS[name] for name in others} }: set these in its config.json, the cells have plans of "
            "their own."
        )
    kind = ShortCosts if args.grid == FRONTIER else GridCosts
    costs = kind(config.text_config, questions.image_tokens, questions.text_tokens)
    if args.plans and not (args.plans / "plans.json").exists():
        raise ValueError(
            f"There is no plans.json in {args.plans}: make it with python -m dpvr.analysis.probe --find_plan 0.7 0.55 "
            f"0.45 --output_dir {args.plans}, or leave --plans out."
        )
    plans = read_plans(args.plans or PLANS, costs)
    if args.grid == FRONTIER:
        return FrontierGrid(costs, args.num_rows, plans).tables(), []
    return Grid(costs, args.num_rows, plans).tables(), sorted(plans)


def read_plans(folder: Path, costs: GridCosts) -> dict[float, Fields]:
    """{budget: DPVR fields}: of the plans that the finder tried, the one nearest to vanilla within each budget.

    A budget is of this grid's median prompt, which need not be the one that the finder's own budgets were of. Without
    plans.json, and where nothing fits, plans are provisional.
    """
    path = folder / "plans.json"
    tried = json.loads(path.read_text(encoding="utf-8"))["frontier"] if path.exists() else []
    plans: dict[float, Fields] = {}
    for point in sorted(tried, key=lambda point: point["kl"]):
        fields = {"split_layer": point["split_layer"], "fusion_layers": point["fusion_layers"]}
        if fields["fusion_layers"]:
            cost = costs.ratio({"routing": "late_fusion", **fields})
            for budget in BUDGETS:
                if cost <= budget:
                    plans.setdefault(budget, {"routing": "late_fusion", **fields})
    return plans


def select(tables: dict[str, list[Row]], patterns: list[str]) -> list[Cell]:
    """The cells that a pattern names, or whose table one names, in the grid's order, the slow baselines last.

    Raises:
        ValueError: if a pattern names nothing.
    """
    cells = unique_cells([row for rows in tables.values() for row in rows])
    named = {cell.name: {cell.name} for cell in cells}
    for table, rows in tables.items():
        for cell in unique_cells(rows):
            named[cell.name].add(table)
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for names in named.values() for name in names):
            raise ValueError(f"No table and no cell is named {pattern!r}. There are {', '.join([*tables, *named])}.")
    chosen = [cell for cell in cells if any(fnmatch(name, p) for name in named[cell.name] for p in patterns)]
    return sorted(chosen, key=lambda cell: (cell.is_baseline, cell.split == "test"))


@contextmanager
def claimed(cell: Cell, work_dir: Path) -> Iterator[Any]:
    """A lock on a cell, or None if another run has it; a training process keeps it if this one is killed."""
    work_dir.mkdir(parents=True, exist_ok=True)
    with (work_dir / f"{cell.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield lock


def train(cell: Cell, folder: Path, base: str, lock: Any) -> dict[str, Any]:
    """Run train_sft.py and return its record; its output goes to `folder`.log."""
    shutil.rmtree(folder, ignore_errors=True)
    flags = {
        **cell.training,
        **(cell.fields if cell.training["method"] == "dpvr" else {}),
        "seed": cell.seed,
        "model_name_or_path": base,
        "data": "minibench",
        "eval_questions": 0,
        "report_to": "none",
        "output_dir": folder.resolve(),
    }
    command = [sys.executable, str(Path(__file__).parents[2] / "train_sft.py")]
    for name, value in flags.items():
        command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    with folder.with_suffix(".log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True, pass_fds=[lock.fileno()])
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


def load(cell: Cell, folder: Path, base: str) -> LlavaForConditionalGeneration:
    """The model of a cell, from what was trained into `folder`."""
    method = cell.training["method"] if cell.training else None
    if method in ("dpvr", "full"):
        return DpvrLlavaForConditionalGeneration.from_pretrained(folder)
    if cell.fields["routing"] == "latent":
        model = DpvrLlavaForConditionalGeneration.from_pretrained(base, routing="latent")
        if cell.fit_rows:
            usual = {"latent_layers": None, "latent_side_layers": 0, "latent_stride": 1, "latent_score": None}
            fields = {name: value for name, value in cell.fields.items() if name != "routing"}
            fit_new(model, load_processor(base), usual | fields, cell.fit_rows, cell.seed)
        return choose(model.eval(), **cell.pruning) if cell.pruning else model.eval()
    model = DpvrLlavaForConditionalGeneration.from_pretrained(base, new_side_branch=True, **cell.fields)
    if method == "lora":
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return prune(model, **cell.pruning) if cell.pruning else model


def measure(cell: Cell, folder: Path, args: Namespace, questions: Questions, lock: Any) -> dict[str, Any]:
    """Train a cell if it is to be trained, ask it all questions, write its files and return its document."""
    training = train(cell, folder, args.model_name_or_path, lock) if cell.training else None
    model, processor = load(cell, folder, args.model_name_or_path), load_processor(args.model_name_or_path)
    items = questions.items[cell.split]
    replies = ask(model, processor, items, batch_size=args.batch_size, description=cell.name)
    prompt = (questions.image_tokens, questions.text_tokens)
    costs = (ShortCosts if args.grid == FRONTIER else GridCosts)(model.config.text_config, *prompt)
    document = {
        "name": cell.name,
        "cell": asdict(cell),
        "settings": settings(args),
        "row": score(items, replies),
        "right": right(items, replies),
        "trainable_parameters": training["trainable_parameters"] if training else 0,
        "prefill_flops_ratio": costs.of(model),
        "prompt": {"image_tokens": questions.image_tokens, "text_tokens": questions.text_tokens},
        "training": summary(training) if training else None,
        **run_record("-m dpvr.benchmarks.grid"),
    }
    texts = [[reply.text for reply in several] for several in replies]
    write(
        args.output_dir / "cells" / f"{cell.name}.replies.json.gz", gzip.compress(json.dumps(texts).encode(), mtime=0)
    )
    write(cell_file(args.output_dir, cell), (json.dumps(document) + "\n").encode())
    return document


def right(items: list[Item], replies: list[list[Reply]]) -> dict[str, str]:
    """{task: a "1" for every question that was answered right, else a "0"}, in the items' order."""
    marks: dict[str, str] = {}
    for item, several in zip(items, replies, strict=True):
        for reply, (_, answer) in zip(several, item.questions, strict=True):
            marks[item.task] = marks.get(item.task, "") + str(int(reply.text == answer))
    return marks


def summary(training: dict[str, Any]) -> dict[str, Any]:
    """What a cell keeps of training.json."""
    losses = [entry["loss"] for entry in training["log"] if "loss" in entry]
    last = losses[-LAST_LOSSES:]
    kept = {name: training[name] for name in ("command", "recipe", "data", "train_seconds", "versions")}
    return {**kept, "final_loss": sum(last) / len(last) if last else None, "losses": losses}


def settings(args: Namespace) -> dict[str, Any]:
    """What all cells of a grid share."""
    return {"model": without_folders(args.model_name_or_path), "limit": args.limit, "seed": args.seed}


def training_settings(args: Namespace) -> dict[str, Any]:
    """What the trained cells of a grid share beside them: how many pictures, and the weights that they start from."""
    weights = Path(cached_file(args.model_name_or_path, "model.safetensors")).read_bytes()
    return {"num_rows": args.num_rows, "weights": hashlib.sha256(weights).hexdigest()[:16]}


def is_finished(cell: Cell, args: Namespace) -> bool:
    path = cell_file(args.output_dir, cell)
    if not path.exists():
        return False
    document = json.loads(path.read_text(encoding="utf-8"))
    return (Cell(**document["cell"]), document["settings"]) == (cell, settings(args))


def cell_file(output_dir: Path, cell: Cell) -> Path:
    return output_dir / "cells" / f"{cell.name}.json"


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a run may be killed here as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def refuse_other_settings(args: Namespace) -> None:
    """Raise ValueError rather than write over results of other questions, other training or another base."""
    path = args.output_dir / "grid.json"
    ours = {"settings": settings(args), "training": training_settings(args)}
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else ours
    for name, own in ours.items():
        if found.get(name, own) != own:
            raise ValueError(
                f"The {name} of this run, {own}, differ from those of the results in {path}, {found[name]}: choose "
                "another --output_dir."
            )


def describe(tables: dict[str, list[Row]], args: Namespace, questions: Questions, found_plans: list[float]) -> bytes:
    """grid.json: all cells, and the tables with their names, measured or not."""
    cells = unique_cells([row for rows in tables.values() for row in rows])
    document = {
        "settings": settings(args),
        "training": training_settings(args),
        "prompt": {"image_tokens": questions.image_tokens, "text_tokens": questions.text_tokens},
        "found_plans": found_plans,
        "tables": {
            table: [{"name": row.name, "cells": [cell.name for cell in row.cells]} for row in rows]
            for table, rows in tables.items()
        },
        "cells": {cell.name: asdict(cell) for cell in cells},
    }
    return (json.dumps(document, indent=1) + "\n").encode()


def run_grid(args: Namespace) -> dict[str, list[str]]:
    """The names of cells by what became of them: measured, finished before, busy in another run, failed."""
    processor = load_processor(args.model_name_or_path)
    questions = make_questions(processor, args.limit, args.seed)
    tables, found_plans = make_grid(args, questions)
    cells = select(tables, args.cells)
    refuse_other_settings(args)
    write(args.output_dir / "grid.json", describe(tables, args, questions, found_plans))
    outcome: dict[str, list[str]] = {"measured": [], "finished": [], "busy": [], "failed": []}
    for cell in tqdm(cells, desc="cells", unit="cell"):
        folder = args.work_dir / cell.name
        with claimed(cell, args.work_dir) as lock:
            if is_finished(cell, args):
                outcome["finished"].append(cell.name)
            elif lock is None:
                outcome["busy"].append(cell.name)
            else:
                outcome[run_cell(cell, folder, args, questions, lock)].append(cell.name)
    return outcome


def run_cell(cell: Cell, folder: Path, args: Namespace, questions: Questions, lock: Any) -> str:
    """Measure a cell and say how it went: the others are measured even if this one cannot be trained."""
    try:
        document = measure(cell, folder, args, questions, lock)
    except subprocess.CalledProcessError as error:
        log = folder.with_suffix(".log")
        print(f"{cell.name}: training ended with exit status {error.returncode}, see {log}", flush=True)
        return "failed"
    print(f"{cell.name}: mean {document['row']['mean']:.1%}, {document['prefill_flops_ratio']:.3f} FLOPs", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    return "measured"
