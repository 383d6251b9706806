"""MiniBench's rows and questions as files.

MiniBench[i] --+-- write_datasets    DIR/data/train-00000-of-00001.parquet    columns images and messages
               +-- write_llava       DIR/train.json and DIR/images/           LLaVA-665k's JSON, pictures as PNG
make_items   ----- write_questions   DIR/existence.parquet, DIR/perception.parquet, ...   a row per question
"""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from tqdm import tqdm

from .data import MiniBench, Row, make_items, to_hf_dataset
from .scenes import Split
from .tasks import TASKS, Item

SPEAKERS = {"user": "human", "assistant": "gpt"}
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


def write_datasets(folder: Path, rows: MiniBench) -> Path:
    """Write one Parquet file, named so that `load_dataset` finds the split, and return its path."""
    path = folder / "data" / f"{rows.split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    to_hf_dataset(rows.split, rows.size, rows.questions_per_row, rows.seed).to_parquet(path)
    return path


def write_llava(folder: Path, rows: MiniBench) -> Path:
    """Write the JSON and its pictures, and return the JSON's path."""
    (folder / "images").mkdir(parents=True)
    records = []
    for index in tqdm(range(rows.size), desc=f"MiniBench {rows.split}", unit="row"):
        row, name = rows[index], f"{rows.split}-{rows.seed}-{index:06d}"
        names = [f"images/{name}-{number}.png" for number in range(len(row["images"]))]
        for path, picture in zip(names, row["images"], strict=True):
            picture.save(folder / path)
        image = names if len(names) > 1 else names[0]
        records.append({"id": name, "image": image, "conversations": to_conversations(row)})
    path = folder / f"{rows.split}.json"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path


def write_questions(folder: Path, split: Split, num_questions: int, seed: int) -> Path:
    """Write one Parquet file per task, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in tqdm(TASKS, desc="MiniBench questions", unit="task"):
        items = enumerate(make_items(split, num_questions, seed, [task]))
        rows = [row for index, item in items for row in to_questions(item, index)]
        Dataset.from_list(rows, features=QUESTION).to_parquet(folder / f"{task}.parquet")
    return folder


def to_questions(item: Item, index: int) -> list[dict[str, Any]]:
    """Return a row per question of an item, with all the item's pictures."""
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
