"""What the controls of the page, and the endpoints for programs, do with a model.

    page: question, gallery, chat  --> Page --> Answerer, one answer at a time --> chat, readout, comparison, overlays
    programs: question, files      --> Api  --> the same                       --> JSON

A user's error becomes a message, HTML for a page and plain text for a program, and the server goes on.
"""

import hashlib
import html
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from PIL import Image

from dpvr.data.pictures import open_picture
from dpvr.inference.chat import Answerer, Turn
from dpvr.inference.views import curve, overlay, ratios, show_comparison, show_readout

try:
    from spaces import GPU as on_gpu  # a Space with shared GPUs gives one for as long as such a function runs
except ImportError:

    def on_gpu(function: Any) -> Any:
        return function


MAX_PICTURES = 8
REPETITIONS = 5
PROGRESS = gr.Progress()

Gallery = list[tuple[str, str | None]] | None


@dataclass(frozen=True)
class Asked:
    """A turn of a chat as the server keeps it for a page: pictures by their paths in the upload folder."""

    question: str
    paths: tuple[str, ...] = ()
    answer: str | None = None


@contextmanager
def user_errors(*, escape: bool) -> Iterator[None]:
    """Turn a user's error into a message: HTML for a page, plain text for a program."""
    try:
        yield
    except ValueError as error:
        message = html.escape(str(error), quote=False) if escape else str(error)
        raise gr.Error(message, print_exception=False) from error


def continued(turns: list[Asked], question: str, gallery: Gallery) -> list[Asked]:
    """Return the chat with another question; pictures that are new in the gallery belong to it.

    Where the gallery lacks a picture that was talked about, a new chat begins. Pictures are told by what they show:
    the page may show an upload's own file for a while before it shows the model's view of it.
    """
    paths = tuple(path for path, _ in gallery or ())
    if len(paths) > MAX_PICTURES:
        raise ValueError(f"There are {len(paths)} pictures, and the chat takes at most {MAX_PICTURES}: remove some.")
    known = tuple(path for turn in turns for path in turn.paths)
    if [*map(content_of, paths[: len(known)])] != [*map(content_of, known)]:
        turns, known = [], ()
    return [*turns, Asked(question, paths[len(known) :])]


@lru_cache(maxsize=1024)
def content_of(path: str) -> str:
    picture = open_picture(path)
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def opened(turns: list[Asked]) -> list[Turn]:
    return [Turn(turn.question, tuple(map(open_picture, turn.paths)), turn.answer) for turn in turns]


def shown(turns: list[Asked]) -> list[dict[str, Any]]:
    """Return a chat in the chatbot's form; it takes text for HTML, also when it renders no Markdown."""
    messages = []
    for turn in turns:
        pictures = [{"path": path, "alt_text": "picture"} for path in turn.paths]
        messages += [
            {"role": "user", "content": content} for content in (*pictures, html.escape(turn.question, quote=False))
        ]
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": html.escape(turn.answer, quote=False)})
    return messages


class Model:
    """An answerer's ways to answer; where a Space shares GPUs, each runs in a fork and gets copies of its input."""

    def __init__(self, answerer: Answerer) -> None:
        self.routing = answerer.routing
        self.stream = on_gpu(answerer.stream)
        self.compare_both = on_gpu(answerer.compare)
        self.inside = on_gpu(answerer.look_inside)


class Page(Model):
    """What the page's controls do; chats are kept by the page, nothing is kept here."""

    def accept(self, gallery: Gallery) -> list[Image.Image]:
        """Return the gallery as the model will see it, upright and in RGB, without files that are no good."""
        if gallery and len(gallery) > MAX_PICTURES:
            gr.Warning(
                f"There are {len(gallery)} pictures, and the chat takes {MAX_PICTURES}: the last ones are left out."
            )
        pictures = []
        for path, _ in (gallery or [])[:MAX_PICTURES]:
            try:
                pictures.append(open_picture(path))
            except ValueError as error:
                gr.Warning(html.escape(f"{Path(path).name} is left out. {error}", quote=False))
        return pictures

    def ask(
        self, question: str | None, gallery: Gallery, turns: list[Asked], longest: int, temperature: float
    ) -> Iterator[tuple]:
        """Answer a question; yield the chat, its turns, the readout, and once an emptied question box."""
        emptied = ""
        with user_errors(escape=True):
            asked = continued(turns, question or "", gallery)
            if len(asked) <= len(turns):
                gr.Info("A picture that the chat was about is gone, so this is a new chat.")
            for shows in self._answer(asked, longest, temperature):
                yield *shows, emptied
                emptied = gr.skip()

    def regenerate(self, turns: list[Asked], longest: int, temperature: float) -> Iterator[tuple]:
        """Answer the last question again; yield the chat, its turns and the readout."""
        with user_errors(escape=True):
            if not turns:
                raise ValueError("The chat is empty, so there is no answer to make again: ask something first.")
            yield from self._answer(turns, longest, temperature)

    def _answer(self, turns: list[Asked], longest: int, temperature: float) -> Iterator[tuple]:
        *before, asked = turns
        waiting = [*before, replace(asked, answer=None)]
        for partial in self.stream(opened(waiting), max_new_tokens=int(longest), temperature=temperature):
            turns = [*before, replace(asked, answer=partial.text)]
            yield shown(turns), turns, show_readout(partial.readout) if partial.readout else ""

    def compare(
        self,
        question: str | None,
        gallery: Gallery,
        turns: list[Asked],
        longest: int,
        progress: gr.Progress = PROGRESS,
    ) -> Iterator[str]:
        """Answer the question at hand both ways; yield the comparison, and nothing at each step on the way to it."""
        with user_errors(escape=True):
            turns = opened(question_at_hand(question, gallery, turns))
            for share, found in self.compare_both(turns, repetitions=REPETITIONS, max_new_tokens=int(longest)):
                progress(share, desc="Answering both ways in turn")
                yield show_comparison(found) if found else gr.skip()

    def look_inside(
        self, question: str | None, gallery: Gallery, turns: list[Asked]
    ) -> tuple[list[tuple[Image.Image, str]], pd.DataFrame]:
        """Return the pictures with the attention to them, vanilla's first, and the curves."""
        with user_errors(escape=True):
            vanilla, own, pictures = self.inside(opened(question_at_hand(question, gallery, turns)))
        found = {"vanilla": vanilla, self.routing: own}
        overlays = [
            (overlay(picture, heat), f"{name}, layer {attention.layer}")
            for name, attention in found.items()
            for picture, heat in zip(pictures, attention.heat, strict=True)
        ]
        return overlays, pd.DataFrame(curve(found))


def question_at_hand(question: str | None, gallery: Gallery, turns: list[Asked]) -> list[Asked]:
    """Return the chat up to the question in the box, or to its last question if the box is empty."""
    if (question or "").strip() or not turns:
        return continued(turns, question or "", gallery)
    return [*turns[:-1], replace(turns[-1], answer=None)]


class Api(Model):
    """The same for programs: one question at a time, pictures as files, JSON as the answer."""

    def ask(
        self, question: str | None, pictures: list[str] | None, routing: str, longest: int, temperature: float
    ) -> Iterator[dict[str, Any]]:
        """Answer a question about pictures, as {"answer", "readout"}; the answer grows, the readout comes last."""
        with user_errors(escape=False):
            settings = {"routing": routing, "max_new_tokens": int(longest), "temperature": temperature}
            for partial in self.stream(self._turn(question, pictures), **settings):
                yield {"answer": partial.text, "readout": partial.readout and asdict(partial.readout)}

    def compare(self, question: str | None, pictures: list[str] | None, longest: int) -> dict[str, Any]:
        """Answer under vanilla and under the model's routing: answers, medians of the readouts, and their ratios."""
        with user_errors(escape=False):
            turns = self._turn(question, pictures)
            *_, (_, found) = self.compare_both(turns, repetitions=REPETITIONS, max_new_tokens=int(longest))
        vanilla, own = (
            {"answer": text, "medians": asdict(readout)}
            for text, readout in zip(found.texts, found.medians, strict=True)
        )
        return {"vanilla": vanilla, "dpvr": own, "ratios": ratios(found), "repetitions": found.repetitions}

    def look_inside(self, question: str | None, pictures: list[str] | None) -> dict[str, Any]:
        """Return the text's attention to the pictures: the share per layer, and the reading layer's map of patches."""
        with user_errors(escape=False):
            vanilla, own, _ = self.inside(self._turn(question, pictures))
        return {
            name: {"mass": found.mass, "layer": found.layer, "heat": found.heat.tolist()}
            for name, found in (("vanilla", vanilla), ("dpvr", own))
        }

    def _turn(self, question: str | None, pictures: list[str] | None) -> list[Turn]:
        return opened(continued([], question or "", [(path, None) for path in pictures or ()]))
