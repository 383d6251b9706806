"""MiniBench as rows for training and as items to ask.

    MiniBench[i]   {"images": [PIL], "messages": [user, assistant, user, assistant, ...]}   TRL's vision format
    make_items     the questions of every task with their pictures, for a test

Rows are drawn on access, from the split, the seed and their index, so nothing is downloaded or stored. The questions
of one row share its pictures, so the pictures' tokens are processed once. A row of one picture has questions of every
task but multi_image; a row of two pictures has multi_image questions alone.
"""

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from tqdm import tqdm

from .scenes import Scene, Split, draw_scene
from .tasks import ONE_PICTURE, TASKS, Item, Question, ask, make_item

Row = dict[str, Any]

PAIR_SHARE = 0.2


class MiniBench:
    """A map-style data set of `size` rows.

    Args:
        split: which pictures and handwritten digits; the splits share none.
        size: how many rows.
        questions_per_row: how many questions of the tasks, in turn, not counting the free-form questions that precede
            some of them.
        seed: another seed is another data set of the same split.
    """

    def __init__(self, split: Split, size: int, questions_per_row: int = 7, seed: int = 0) -> None:
        self.split = split
        self.size = size
        self.questions_per_row = questions_per_row
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.size:
            raise IndexError(f"There is no row {index} in a data set of {self.size} rows.")
        rng = random.Random(f"rows/{self.split}/{self.seed}/{index}")
        while not (row := self.make_row(rng))["messages"]:
            pass  # the scenes were such that the tasks ask nothing of them: others are drawn
        return row

    def make_row(self, rng: random.Random) -> Row:
        """One picture, or in `PAIR_SHARE` of the rows two, and questions about it."""
        scene = draw_scene(self.split, rng)
        # Two numbers are drawn and not used: a subclass decides by them whether a row is of another kind, and so its
        # question rows equal these.
        rng.random()
        scenes = (scene, draw_scene(self.split, rng)) if rng.random() < PAIR_SHARE else (scene,)
        rng.random()
        return self.question_row(scenes, ONE_PICTURE, rng)

    def question_row(self, scenes: tuple[Scene, ...], tasks: Sequence[str], rng: random.Random) -> Row:
        """A row of questions: about one picture of these tasks in turn, about two of multi_image."""
        if len(scenes) == 2:
            tasks = ["multi_image"] * self.questions_per_row
        else:
            tasks = rng.sample(tasks, len(tasks))
            tasks = [tasks[turn % len(tasks)] for turn in range(self.questions_per_row)]
        return to_row(scenes, _ask_all(tasks, scenes, rng))


def make_items(split: Split, num_questions: int, seed: int = 0, tasks: Sequence[str] = TASKS) -> list[Item]:
    """Return items with `num_questions` questions of each task.

    A pair of perception or cognition is two questions, a question of a choice task in four rotations is one.

    Raises:
        ValueError: num_questions is below 2, or a task is unknown.
    """
    if num_questions < 2:
        raise ValueError(f"Each task needs at least 2 questions, as a pair of MME is two; got {num_questions}.")
    if unknown := sorted(set(tasks) - set(TASKS)):
        raise ValueError(f"MiniBench has no task named {unknown[0]!r}: its tasks are {', '.join(TASKS)}.")
    pairs = {"perception": num_questions // 2, "cognition": num_questions // 2}
    return [make_item(task, split, seed, index) for task in tasks for index in range(pairs.get(task, num_questions))]


def _ask_all(tasks: list[str], scenes: tuple[Scene, ...], rng: random.Random) -> list[tuple[str, str]]:
    """Return questions of these tasks with their answers, without duplicates; a task that does not fit is left out."""
    asked: dict[str, Question] = {}
    for task in tasks:
        for question in ask(task, scenes, rng):
            asked.setdefault(question.text, question)
    return [(question.text, question.answer) for question in asked.values()]


def to_row(scenes: tuple[Scene, ...], turns: list[tuple[str, str]]) -> Row:
    return {"images": [scene.draw() for scene in scenes], "messages": to_messages(turns, len(scenes))}


def to_messages(turns: list[tuple[str, str | None]], num_pictures: int = 1) -> list[dict[str, Any]]:
    """Return a conversation that starts with the pictures; a last answer of None is left for the model to write."""
    messages = []
    for question, answer in turns:
        pictures = [] if messages else [{"type": "image"}] * num_pictures
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def swapped(picture: Image.Image) -> Image.Image:
    """A picture with red and blue exchanged, as a program shows it that takes RGB for BGR."""
    return Image.merge("RGB", picture.split()[::-1])


def to_hf_dataset(
    split: Split, size: int, questions_per_row: int = 7, seed: int = 0, *, swap: bool = False
) -> Dataset:
    """Return the rows as a `datasets.Dataset` with the columns images and messages, ready for TRL's SFTTrainer.

    With `swap` the images are `swapped`, and a column teacher_images has them as they were.
    """
    part = {"type": Value("string"), "text": Value("string")}
    features = Features(
        {"images": [ImageFeature()], "messages": [{"role": Value("string"), "content": [part]}]}
        | ({"teacher_images": [ImageFeature()]} if swap else {}),
    )
    rows = MiniBench(split, size, questions_per_row, seed)
    made = (_with_texts(rows[index]) for index in tqdm(range(size), desc=f"MiniBench {split}", unit="row"))
    return Dataset.from_list([_with_swapped(row) if swap else row for row in made], features=features)


def _with_swapped(row: Row) -> Row:
    return {**row, "images": [swapped(picture) for picture in row["images"]], "teacher_images": row["images"]}


def _with_texts(row: Row) -> Row:
    """Give every part of a message a text, None for a picture: an Arrow column needs the same fields in every part."""
    messages = [
        {**message, "content": [{"type": part["type"], "text": part.get("text")} for part in message["content"]]}
        for message in row["messages"]
    ]
    return {**row, "messages": messages}
