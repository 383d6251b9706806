"""MiniBench as rows for training and as items for testing.

    MiniBench[i]       {"images": [PIL], "messages": [user, assistant, user, assistant, ...]}   TRL's vision format
    evaluation_items   (kind, image, question, answer)                                         one question a picture

Rows are made when they are asked for, from the split, the seed and their index, so nothing is downloaded or stored.
The questions of one row share its picture: the picture's tokens are paid for once.
"""

import random
from typing import Any, NamedTuple

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from .questions import CAPTION_REQUEST, KINDS, ask, ask_many, caption
from .scenes import Split, make_scene

Row = dict[str, Any]


class Item(NamedTuple):
    """One question for the evaluation."""

    kind: str
    image: Image.Image
    question: str
    answer: str


class MiniBench:
    """A map-style data set of `size` rows.

    Args:
        split: which pictures and handwritten digits; the splits share none.
        size: how many rows.
        questions_per_row: how many questions about one picture.
        seed: another seed is another data set of the same split.
        caption_share: the share of rows that ask for a caption in place of questions.
    """

    def __init__(
        self, split: Split, size: int, questions_per_row: int = 6, seed: int = 0, caption_share: float = 0.0
    ) -> None:
        self.split = split
        self.size = size
        self.questions_per_row = questions_per_row
        self.seed = seed
        self.caption_share = caption_share

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.size:
            raise IndexError(f"row {index} of a data set with {self.size} rows.")
        scene = make_scene(self.split, self.seed, index)
        rng = random.Random(f"rows/{self.split}/{self.seed}/{index}")
        if rng.random() < self.caption_share:
            turns = [(CAPTION_REQUEST, caption(scene))]
        else:
            turns = [(question.text, question.answer) for question in ask_many(scene, self.questions_per_row, rng)]
        return {"images": [scene.draw()], "messages": to_messages(turns)}


def to_messages(turns: list[tuple[str, str | None]]) -> list[dict[str, Any]]:
    """Return a conversation that starts with the picture; a last answer of None is left for the model to write."""
    messages = []
    for question, answer in turns:
        picture = [{"type": "image"}] if not messages else []
        messages.append({"role": "user", "content": [*picture, {"type": "text", "text": question}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def evaluation_items(split: Split, num_questions: int, seed: int = 0) -> list[Item]:
    """Return `num_questions` items of each kind, every one about a picture of its own."""
    items = []
    for index in range(num_questions * len(KINDS)):
        scene = make_scene(split, seed, index)
        question = ask(scene, KINDS[index % len(KINDS)], random.Random(f"items/{split}/{seed}/{index}"))
        items.append(Item(question.kind, scene.draw(), question.text, question.answer))
    return items


def to_hf_dataset(split: Split, size: int, questions_per_row: int = 6, seed: int = 0) -> Dataset:
    """Return the rows as a `datasets.Dataset` with the columns images and messages, ready for TRL's SFTTrainer."""
    part = {"type": Value("string"), "text": Value("string")}
    features = Features(
        {"images": [ImageFeature()], "messages": [{"role": Value("string"), "content": [part]}]},
    )
    rows = MiniBench(split, size, questions_per_row, seed)
    return Dataset.from_list([_with_texts(rows[index]) for index in range(size)], features=features)


def _with_texts(row: Row) -> Row:
    """Give every part of a message a text, None for a picture: Arrow columns want the same fields in every part."""
    messages = [
        {**message, "content": [{"type": part["type"], "text": part.get("text")} for part in message["content"]]}
        for message in row["messages"]
    ]
    return {**row, "messages": messages}
