"""MiniBench as lmms-eval tasks: the functions that the files in tasks/minibench call, and a run with these files.

    write_questions --> lmms-eval: model "dpvr_llava", group "minibench_all" --> rows as of dpvr.benchmarks.accuracy

lmms-eval scores single questions and puts them together at the end. Here the result of a question says which one of
which item it is, and `scoring.score_task` puts them together, so that a pair, or four rotations, count as one item.
"""

import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from minibench.files import write_questions
from minibench.scoring import score_task
from minibench.tasks import TASKS, Item

TASKS_FOLDER = Path(__file__).parent / "tasks"


def to_pictures(row: dict[str, Any]) -> list[Image.Image]:
    return row["images"]


def to_question(row: dict[str, Any]) -> str:
    return row["question"]


def to_results(row: dict[str, Any], replies: list[str]) -> dict[str, dict[str, Any]]:
    """Return what `score` and `accuracy` need of one question: its row without the pictures, and the reply."""
    result = {**{name: row[name] for name in row if name != "images"}, "reply": replies[0]}
    return {"score": result, "accuracy": result}


def score(results: list[dict[str, Any]]) -> float:
    return score_task(*to_items(results))["score"]


def accuracy(results: list[dict[str, Any]]) -> float:
    return score_task(*to_items(results))["accuracy"]


def to_items(results: list[dict[str, Any]]) -> tuple[list[Item], list[list[str]]]:
    """Return the items of one task's questions, without pictures, and the replies to each.

    Raises:
        ValueError: unless every question of every item was asked once.
    """
    asked: dict[int, dict[int, dict[str, Any]]] = {}
    for result in results:
        asked.setdefault(result["item"], {})[result["turn"]] = result
    turns = [[item[turn] for turn in sorted(item)] for _, item in sorted(asked.items())]
    whole = sum(item[0]["turns"] for item in turns)
    if not len(results) == sum(map(len, turns)) == whole:
        raise ValueError(
            f"There are {len(results)} replies to the {whole} questions of {len(turns)} items of "
            f"{results[0]['task']!r}, and an item is scored as a whole: leave out lmms-eval's --limit, and export "
            "fewer questions (--size)."
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
    write_questions(folder / "outputs" / "questions", "test", limit, seed)
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
