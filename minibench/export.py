"""MiniBench as files, for other training and evaluation code.

    MiniBench[i] --+-- datasets   DIR/data/train-00000-of-00001.parquet    columns images and messages, pictures inside
                   |              datasets.load_dataset(DIR); TRL's SFTTrainer takes it as it is
                   +-- llava      DIR/train.json and DIR/images/           the JSON of LLaVA-665k, pictures as PNG
    make_item(i) ----- questions  DIR/existence.parquet, DIR/perception.parquet, ...   one row per question

    python -m minibench.export --output_dir outputs/train --format datasets --split train --size 5000

The first two hold the rows of `MiniBench(split, size, questions_per_row, seed)`. In LLaVA's JSON a row of two pictures
has a list of names as its "image", and one "<image>" per picture at the start of its first question. "questions" are
the `size` questions of each task that `benchmark_accuracy.py --limit size --seed seed` asks, if the split is test;
the files in lmms_tasks make lmms-eval ask them. A row is the "turn"-th of "turns" questions of the "item"-th item.
"""

import argparse
import json
from pathlib import Path
from typing import Any, get_args

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from tqdm import tqdm

from .data import MiniBench, Row, make_items, to_hf_dataset
from .scenes import Split
from .tasks import TASKS, Item

SPEAKERS = {"user": "human", "assistant": "gpt"}
FORMATS = ("datasets", "llava", "questions")
QUESTION = Features(
    {
        "task": Value("string"),
        "skill": Value("string"),
        "chance": Value("float64"),
        "item": Value("int64"),
        "turn": Value("int64"),
        "turns": Value("int64"),
        "images": [ImageFeature()],
        "question": Value("string"),
        "answer": Value("string"),
    }
)


def write_datasets(args: argparse.Namespace) -> Path:
    """Write one Parquet file under the name by which `load_dataset` knows the split, and return its path."""
    path = args.output_dir / "data" / f"{args.split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    to_hf_dataset(args.split, args.size, args.questions_per_row, args.seed).to_parquet(path)
    return path


def write_llava(args: argparse.Namespace) -> Path:
    """Write the JSON and its pictures, and return the JSON's path."""
    rows = MiniBench(args.split, args.size, args.questions_per_row, args.seed)
    (args.output_dir / "images").mkdir(parents=True)
    records = []
    for index in tqdm(range(args.size), desc=f"MiniBench {args.split}", unit="row"):
        row, name = rows[index], f"{args.split}-{args.seed}-{index:06d}"
        names = [f"images/{name}-{number}.png" for number in range(len(row["images"]))]
        for path, picture in zip(names, row["images"], strict=True):
            picture.save(args.output_dir / path)
        image = names if len(names) > 1 else names[0]
        records.append({"id": name, "image": image, "conversations": to_conversations(row)})
    path = args.output_dir / f"{args.split}.json"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path


def write_questions(args: argparse.Namespace) -> Path:
    """Write one Parquet file per task, and return the folder."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for task in tqdm(TASKS, desc="questions", unit="task"):
        items = enumerate(make_items(args.split, args.size, args.seed, [task]))
        rows = [row for index, item in items for row in to_questions(item, index)]
        Dataset.from_list(rows, features=QUESTION).to_parquet(args.output_dir / f"{task}.parquet")
    return args.output_dir


def to_questions(item: Item, index: int) -> list[dict[str, Any]]:
    """Return an item's questions, each a row with all its pictures."""
    about = {
        "task": item.task,
        "skill": item.skill,
        "chance": item.chance,
        "item": index,
        "turns": len(item.questions),
    }
    pictures = [scene.draw() for scene in item.scenes]
    return [
        {**about, "turn": turn, "images": pictures, "question": question, "answer": answer}
        for turn, (question, answer) in enumerate(item.questions)
    ]


def to_conversations(row: Row) -> list[dict[str, str]]:
    """Return LLaVA's turns of a row: {"from": "human" or "gpt", "value": text}."""
    return [
        {"from": SPEAKERS[message["role"]], "value": "".join(map(_to_text, message["content"]))}
        for message in row["messages"]
    ]


def _to_text(part: dict[str, Any]) -> str:
    return "<image>\n" if part["type"] == "image" else part["text"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write a split of MiniBench for other code.")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--split", choices=get_args(Split), required=True)
    parser.add_argument("--size", type=int, required=True, help="how many rows, or questions of each task")
    parser.add_argument("--questions_per_row", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Write the files.

    Raises:
        ValueError: output_dir holds something, or size is below 1. Nothing is written then.
    """
    if args.size < 1:
        raise ValueError(f"Expected --size of at least 1 row, got {args.size}.")
    if args.output_dir.is_file() or (args.output_dir.is_dir() and any(args.output_dir.iterdir())):
        raise ValueError(
            f"Expected --output_dir to be a new or an empty folder, got {args.output_dir}, where something is. "
            "Remedy: name another folder, or empty this one."
        )
    write = {"datasets": write_datasets, "llava": write_llava, "questions": write_questions}[args.format]
    what = "questions of each task" if args.format == "questions" else "rows"
    print(f"{args.size} {what} of the {args.split} split, seed {args.seed}, written to {write(args)}")


if __name__ == "__main__":
    main(parse_args())
