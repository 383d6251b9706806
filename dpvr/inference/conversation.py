"""A chat as the server keeps it for a page, as the model is asked it, and as the page shows it.

Asked, Asked ...  --opened-->  Turn, Turn ...    for the model: questions that were answered, pictures read
                  --shown--->  messages          for Gradio's chatbot: text, pictures, and what stands below them
"""

import html
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from dpvr.data.pictures import open_picture
from dpvr.inference.chat import Turn
from dpvr.inference.views import show_note, show_pictures

MAX_PICTURES = 8
PICTURE_WORDS = re.compile(r"\b(?:picture|image|photo|photograph|screenshot)s?\b|图|照片", re.IGNORECASE)
WHICH_PICTURE = "Which picture? Add one with the paper clip, drop it or paste it, and send: the question waits."


@dataclass(frozen=True)
class Asked:
    """A turn of a chat: pictures by their paths in the upload folder, and HTML that stands below the answer.

    A question without an answer waits for a picture.
    """

    question: str
    paths: tuple[str, ...] = ()
    answer: str | None = None
    line: str = ""
    note: str = ""
    comparison: str = ""
    inside: str = ""

    @property
    def below(self) -> list[str]:
        return [part for part in (self.note, self.line, self.comparison, self.inside) if part]


@contextmanager
def user_errors(*, escape: bool) -> Iterator[None]:
    """Turn a user's error into a message: HTML for a page, plain text for a program."""
    try:
        yield
    except ValueError as error:
        message = html.escape(str(error), quote=False) if escape else str(error)
        raise gr.Error(message, print_exception=False) from error


def continued(turns: Sequence[Asked], question: str, paths: Sequence[str]) -> list[Asked]:
    """Return the chat with another question and the pictures that come with it.

    A question that waits for its picture gets it here, if no other is asked.

    Raises:
        ValueError: for too many pictures.
    """
    if turns and turns[-1].answer is None and paths and not question.strip():
        question = turns[-1].question
    before = [turn for turn in turns if turn.answer is not None]
    number = len(paths) + sum(len(turn.paths) for turn in before)
    if number > MAX_PICTURES:
        raise ValueError(f"There are {number} pictures, and the chat takes at most {MAX_PICTURES}: remove some.")
    return [*before, Asked(question, tuple(paths))]


def opened(turns: Sequence[Asked]) -> list[Turn]:
    return [Turn(turn.question, tuple(map(open_picture, turn.paths)), turn.answer) for turn in turns]


def readable(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files that are pictures, and a sentence about each that is none."""
    good, faults = [], []
    for path in paths:
        try:
            open_picture(path)
            good.append(path)
        except ValueError as error:
            faults.append(f"{Path(path).name} is left out. {error}")
    return good, faults


def needs_picture(turns: Sequence[Asked], *, only_pictures: bool) -> bool:
    """Whether the last question is about a picture and the chat has none.

    Args:
        only_pictures: whether the model can speak of nothing else.
    """
    if any(turn.paths for turn in turns):
        return False
    return only_pictures or PICTURE_WORDS.search(turns[-1].question) is not None


def shown(turns: Sequence[Asked]) -> list[dict[str, Any]]:
    """Return a chat in the chatbot's form; it takes text for HTML, also when it renders no Markdown."""
    messages = []
    for turn in turns:
        if turn.paths:
            messages.append({"role": "user", "content": gr.HTML(show_pictures(turn.paths), render=False)})
        if turn.question:
            messages.append({"role": "user", "content": html.escape(turn.question, quote=False)})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": html.escape(turn.answer, quote=False) or "…"})
        messages += [{"role": "assistant", "content": gr.HTML(part, render=False)} for part in turn.below]
    return messages


def waiting_for_picture(turn: Asked) -> Asked:
    return Asked(turn.question, note=show_note(WHICH_PICTURE))
