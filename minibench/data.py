"""MiniBench as rows for training.

    MiniBench[i]   {"images": [PIL], "messages": [user, assistant, user, assistant, ...]}   TRL's vision format

Rows are made when they are asked for, from the split, the seed and their index, so nothing is downloaded or stored.
The questions of one row share its pictures: the pictures' tokens are paid for once. Every task is asked in every row
of one picture; some rows have two pictures.
"""

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from tqdm import tqdm

from .drills import Turn, drill
from .questions import CAPTION_REQUESTS, caption
from .scenes import Scene, Split, draw_scene, draw_scene_with_repeats
from .tasks import ONE_PICTURE, Question, ask

Row = dict[str, Any]

PAIR_SHARE = 0.2
# What takes longest to learn is asked more often.
ASKED = (
    "free",
    "existence",
    *["perception"] * 3,
    *["cognition"] * 4,
    *["choice_en"] * 2,
    "choice_cn",
    *["science"] * 2,
    *["scene"] * 2,
)
CHINESE_CAPTIONS = 0.25
TABLES_PER_ROW = 5
TABLES_PER_TOLD_ROW = 3


class MiniBench:
    """A map-style data set of `size` rows.

    Args:
        split: which pictures and handwritten digits; the splits share none.
        size: how many rows.
        questions_per_row: how many questions of the tasks, in turn, without the free ones before some of them.
        seed: another seed is another data set of the same split.
        caption_share: the share of rows that ask for a caption in place of questions.
        drill_share: the share of the other rows that are drills in place of questions.
        told_share: the share of drills that are text alone: half have a picture's caption in its place, half are about
            nothing but words.
        tasks: what rows of one picture ask, of the tasks of one picture and "free".
        pair_share: the share of rows with two pictures and multi_image questions.
        repeat_share: the share of rows whose pictures are sure to have something more than once, to be counted.
    """

    def __init__(
        self,
        split: Split,
        size: int,
        questions_per_row: int = 7,
        seed: int = 0,
        caption_share: float = 0.0,
        tasks: Sequence[str] = ONE_PICTURE,
        pair_share: float = PAIR_SHARE,
        drill_share: float = 0.0,
        told_share: float = 0.0,
        repeat_share: float = 0.0,
    ) -> None:
        self.split = split
        self.size = size
        self.questions_per_row = questions_per_row
        self.seed = seed
        self.caption_share = caption_share
        self.tasks = tasks
        self.pair_share = pair_share
        self.drill_share = drill_share
        self.told_share = told_share
        self.repeat_share = repeat_share

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.size:
            raise IndexError(f"row {index} of a data set with {self.size} rows.")
        rng = random.Random(f"rows/{self.split}/{self.seed}/{index}")
        draw = draw_scene_with_repeats if self.repeat_share and rng.random() < self.repeat_share else draw_scene
        scene = draw(self.split, rng)
        if rng.random() < self.caption_share:
            chinese = rng.random() < CHINESE_CAPTIONS
            return to_row((scene,), [(CAPTION_REQUESTS[chinese], caption(scene, chinese))])
        scenes = (scene, draw(self.split, rng)) if rng.random() < self.pair_share else (scene,)
        if rng.random() < self.drill_share:
            if rng.random() < self.told_share:
                if rng.random() < 0.5:
                    return drill_row((), drill((), rng, TABLES_PER_TOLD_ROW))
                return told(scene, drill((scene,), rng, TABLES_PER_TOLD_ROW))
            return drill_row(scenes, drill(scenes, rng, TABLES_PER_ROW))
        if len(scenes) == 2:
            tasks = ["multi_image"] * self.questions_per_row
        else:
            tasks = rng.sample(self.tasks, len(self.tasks))
            tasks = [tasks[turn % len(tasks)] for turn in range(self.questions_per_row)]
        return to_row(scenes, _ask_all(tasks, scenes, rng))


def _ask_all(tasks: list[str], scenes: tuple[Scene, ...], rng: random.Random) -> list[tuple[str, str]]:
    """Return questions of these tasks with their answers, none twice, without those that do not fit the scenes."""
    asked: dict[str, Question] = {}
    for task in tasks:
        for question in ask(task, scenes, rng):
            asked.setdefault(question.text, question)
    return [(question.text, question.answer) for question in asked.values()]


def told(scene: Scene, turns: list[Turn]) -> Row:
    """Return a row of text alone, which begins with the caption."""
    first, *others = turns
    return drill_row((), [first._replace(request=f"{caption(scene)}\n{first.request}"), *others])


def drill_row(scenes: tuple[Scene, ...], turns: list[Turn]) -> Row:
    """Return a row that says besides, of every word of every reply, whether it is to be learnt."""
    row = to_row(scenes, [(turn.request, turn.reply) for turn in turns])
    return {**row, "learnt": [turn.learnt for turn in turns]}


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


def to_hf_dataset(split: Split, size: int, questions_per_row: int = 7, seed: int = 0) -> Dataset:
    """Return the rows as a `datasets.Dataset` with the columns images and messages, ready for TRL's SFTTrainer."""
    part = {"type": Value("string"), "text": Value("string")}
    features = Features(
        {"images": [ImageFeature()], "messages": [{"role": Value("string"), "content": [part]}]},
    )
    rows = MiniBench(split, size, questions_per_row, seed)
    indices = tqdm(range(size), desc=f"MiniBench {split}", unit="row")
    return Dataset.from_list([_with_texts(rows[index]) for index in indices], features=features)


def _with_texts(row: Row) -> Row:
    """Give every part of a message a text, None for a picture: Arrow columns want the same fields in every part."""
    messages = [
        {**message, "content": [{"type": part["type"], "text": part.get("text")} for part in message["content"]]}
        for message in row["messages"]
    ]
    return {**row, "messages": messages}
