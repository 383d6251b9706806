"""MiniBench in lmms-eval: what the files in tasks/minibench call, and a command that measures a model with them.

    export --format questions --> lmms-eval: model "dpvr_llava", group "minibench_all" --> benchmark_accuracy.py's rows

    python -m dpvr.lmms_eval.minibench --limit 100 --output results/lmms_eval/minibench.json

lmms-eval scores single rows and has them put together at the end. Here a row's result says which question of which
item it is, and `scoring.score_task` puts them together, so that a pair, or four rotations, count as one item.
"""

import argparse
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from configuration_dpvr import DpvrLlavaConfig
from dpvr.record import publish, run_record
from minibench import export
from minibench.scoring import score_task
from minibench.tasks import TASKS, Item

TASKS_FOLDER = Path(__file__).parent / "tasks"


def to_pictures(row: dict[str, Any]) -> list[Image.Image]:
    return row["images"]


def to_question(row: dict[str, Any]) -> str:
    return row["question"]


def to_results(row: dict[str, Any], replies: list[str]) -> dict[str, dict[str, Any]]:
    """Return what `score` and `accuracy` want of one question, whose pictures have been left out."""
    told = {**{name: row[name] for name in row if name != "images"}, "reply": replies[0]}
    return {"score": told, "accuracy": told}


def score(results: list[dict[str, Any]]) -> float:
    return score_task(*to_items(results))["score"]


def accuracy(results: list[dict[str, Any]]) -> float:
    return score_task(*to_items(results))["accuracy"]


def to_items(results: list[dict[str, Any]]) -> tuple[list[Item], list[list[str]]]:
    """Return the items of one task's questions, without pictures, and the replies to each.

    Raises:
        ValueError: if some item's questions have not all been asked once.
    """
    asked: dict[int, dict[int, dict[str, Any]]] = {}
    for result in results:
        asked.setdefault(result["item"], {})[result["turn"]] = result
    turns = [[item[turn] for turn in sorted(item)] for _, item in sorted(asked.items())]
    whole = sum(item[0]["turns"] for item in turns)
    if not len(results) == sum(map(len, turns)) == whole:
        raise ValueError(
            f"Expected all {whole} questions of {len(turns)} items of {results[0]['task']!r}, each once; got "
            f"{len(results)}. Remedy: leave --limit of lmms-eval out, and export fewer questions (--size)."
        )
    items = [
        Item(
            item[0]["task"],
            item[0]["skill"],
            item[0]["chance"],
            scenes=(),
            questions=tuple((turn["question"], turn["answer"]) for turn in item),
            options=(),
        )
        for item in turns
    ]
    return items, [[turn["reply"] for turn in item] for item in turns]


def write_tasks(folder: Path, limit: int, seed: int) -> Path:
    """Write the questions and the task files that ask them to a folder, and return where the task files are."""
    questions = ["--output_dir", str(folder / "outputs" / "questions"), "--size", str(limit), "--seed", str(seed)]
    export.main(export.parse_args(["--format", "questions", "--split", "test", *questions]))
    return Path(shutil.copytree(TASKS_FOLDER, folder / "dpvr" / "lmms_eval" / "tasks"))


def measure(name_or_path: str, routing: str, task_files: Path, batch_size: int) -> dict[str, Any]:
    """Return a routing's row, by lmms-eval's own evaluator."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    found = simple_evaluate(
        "dpvr_llava",
        model_args=f"pretrained={name_or_path},routing={routing}",
        tasks=["minibench_all"],
        task_manager=TaskManager(include_path=str(task_files), include_defaults=False),
        batch_size=batch_size,
        bootstrap_iters=0,
        log_samples=False,
    )
    tasks = {task: found["results"][f"minibench_{task}"] for task in TASKS}
    return {
        "name": "vanilla" if routing == "none" else routing,
        "routing": routing,
        "tasks": {task: result["score,none"] for task, result in tasks.items()},
        "mean": found["results"]["minibench_all"]["score,none"],
        "accuracy": {task: result["accuracy,none"] for task, result in tasks.items()},
        "questions": {task: found["n-samples"][f"minibench_{task}"]["effective"] for task in TASKS},
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="MiniBench's scores of a model under vanilla and its own routing.")
    parser.add_argument("--model_name_or_path", default=".", help="a DPVR repository (id or path)")
    parser.add_argument("--limit", type=int, default=100, help="questions per task")
    parser.add_argument("--seed", type=int, default=0, help="as in benchmark_accuracy.py")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--output", type=Path, help="also write the JSON document to this file")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, Any]:
    routing = DpvrLlavaConfig.from_pretrained(args.model_name_or_path).routing
    record = {
        **run_record("-m dpvr.lmms_eval.minibench"),
        **{name: vars(args)[name] for name in ("limit", "seed", "batch_size")},
    }
    record["versions"]["lmms_eval"] = version("lmms_eval")
    with tempfile.TemporaryDirectory() as folder:
        task_files = write_tasks(Path(folder), args.limit, args.seed)
        rows = [measure(args.model_name_or_path, each, task_files, args.batch_size) for each in ("none", routing)]
    document = {"rows": rows, **record}
    publish(document, args.output)
    return document


if __name__ == "__main__":
    main(parse_args())
