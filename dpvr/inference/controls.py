"""What the controls of the page do with a model.

    box, chat, method  --> Page --> Answerer, one answer at a time --> chat, box, actions under the chat

What goes wrong by the visitor's doing becomes a message in the page, and the server goes on.
"""

import html
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from dpvr.inference.chat import Answerer
from dpvr.inference.conversation import (
    Asked,
    continued,
    needs_picture,
    opened,
    readable,
    shown,
    user_errors,
    waiting_for_picture,
)
from dpvr.inference.dial import Setting, points_of, settings_of, show_dial
from dpvr.inference.unlike import warning
from dpvr.inference.views import show_comparison, show_inside, show_line, show_note
from dpvr.inference.ways import VANILLA, is_dpvr_llava

try:
    from spaces import GPU as on_gpu  # a Space with shared GPUs gives one for as long as such a function runs
except ImportError:

    def on_gpu(function: Any) -> Any:
        return function


AT_ONCE = 10_000  # milliseconds of an answer up to which vanilla is asked, too, without being told to
STEP = 0.1  # of a comparison, after which the page shows how far it is


class Model:
    """An answerer's ways to answer; where a Space shares GPUs, each runs in a fork and gets copies of its input."""

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer
        self.routing = answerer.routing
        self.stream = on_gpu(answerer.stream)
        self.beside = on_gpu(answerer.beside)
        self.compare_both = on_gpu(answerer.compare)
        self.inside = on_gpu(answerer.look_inside)
        self.unlike = on_gpu(answerer.unlike)


class Page(Model):
    """What the page's controls do; chats are kept by the page, nothing is kept here.

    Args:
        examples: pictures by their paths, and the question about them.
    """

    def __init__(self, answerer: Answerer, examples: Sequence[tuple[list[str], str]] = ()) -> None:
        super().__init__(answerer)
        self.examples = examples
        self.points = points_of(answerer.ways) if answerer.criterion else []
        self.settings = {setting.routing: setting for setting in settings_of(answerer.ways, self.points)}

    @property
    def setting(self) -> Setting:
        """The setting with which the page opens: the model's own routing."""
        return self.settings[self.routing]

    def dial(self, routing: str) -> str:
        return show_dial(self.points, self.settings[routing])

    def ask(
        self, box: dict[str, Any] | None, turns: list[Asked], routing: str, longest: int, temperature: float
    ) -> Iterator[tuple]:
        """Answer what the box holds; yield the chat, its turns, the box and the actions.

        Files that are no pictures are named and left out; the rest then stays in the box, to be sent as it is.
        """
        box = box or {}
        question, files = box.get("text") or "", box.get("files") or []
        good, faults = readable(files)
        for fault in faults:
            gr.Warning(html.escape(fault, quote=False))
        if faults:
            yield gr.skip(), gr.skip(), {"text": question, "files": good}, gr.skip()
            return
        with user_errors(escape=True):
            asked = continued(turns, question, files)
        yield from self._ask(asked, routing, longest, temperature, emptied={"text": "", "files": []})

    def ask_example(self, routing: str, longest: int, temperature: float, chosen: gr.SelectData) -> Iterator[tuple]:
        """Answer an example's question in a new chat."""
        paths, question = self.examples[chosen.index]
        yield from self._ask([Asked(question, tuple(paths))], routing, longest, temperature)

    def regenerate(self, turns: list[Asked], routing: str, longest: int, temperature: float) -> Iterator[tuple]:
        """Answer the last question again."""
        with user_errors(escape=True):
            *before, last = _answered(turns)
        asked = [*before, Asked(last.question, last.paths)]
        yield from self._ask(asked, routing, longest, temperature)

    def _ask(
        self,
        asked: list[Asked],
        routing: str,
        longest: int,
        temperature: float,
        emptied: dict[str, Any] | None = None,
    ) -> Iterator[tuple]:
        *before, last = asked
        box = gr.MultimodalTextbox(submit_btn=False, stop_btn=True, **({"value": emptied} if emptied else {}))
        with user_errors(escape=True):
            turns = opened(asked)
            self.answerer.prompt(turns, int(longest))  # a question that cannot be asked stays in the box
            if needs_picture(asked, only_pictures=self.answerer.criterion is not None):
                asked = [*before, waiting_for_picture(last)]
                yield shown(asked), asked, emptied or gr.skip(), gr.skip()
                return
            yield shown(asked), asked, box, gr.Row(visible=False)
            settings = {"routing": routing, "max_new_tokens": int(longest)}
            for partial in self.stream(turns, temperature=temperature, **settings):
                last = replace(last, answer=partial.text)
                if partial.readout is None:
                    yield shown([*before, last]), [*before, last], gr.skip(), gr.skip()
            said = warning(self.unlike(turns[-1].pictures))
            last = replace(last, note=show_note(said) if said else "")
            varies, readout = temperature > 0, partial.readout
            last = replace(last, line=show_line(last.answer, readout))
            yield shown([*before, last]), [*before, last], gr.skip(), gr.skip()
            if routing != VANILLA and readout.first_token + readout.decode < AT_ONCE:
                beside = self.beside(turns, partial, **settings)
                last = replace(last, line=show_line(last.answer, readout, beside, varies=varies))
                yield shown([*before, last]), [*before, last], gr.skip(), gr.skip()

    def compare(self, turns: list[Asked], routing: str, longest: int) -> Iterator[tuple]:
        """Time the last question both ways; yield as `ask`, on the way how far it is."""
        with user_errors(escape=True):
            *before, last = _answered(turns)
            asked = opened([*before, replace(last, answer=None)])
            told = -STEP
            for share, found in self.compare_both(asked, routing=routing, max_new_tokens=int(longest)):
                if found is None and share < told + STEP:
                    continue
                told = share
                card = show_comparison(found) if found else show_note(f"Both ways in turn: {share:.0%} …")
                last = replace(last, comparison=card)
                box = gr.MultimodalTextbox(submit_btn=False, stop_btn=True)
                yield shown([*before, last]), [*before, last], box, gr.Row(visible=False)

    def look_inside(self, turns: list[Asked], routing: str) -> tuple:
        """Show where the answer's first word looks; return as `ask`."""
        with user_errors(escape=True):
            *before, last = _answered(turns)
            vanilla, own, pictures = self.inside(opened([*before, replace(last, answer=None)]), routing)
        last = replace(last, inside=show_inside({VANILLA: vanilla, routing: own}, pictures))
        return shown([*before, last]), [*before, last], gr.skip(), gr.skip()

    def ready(self, turns: list[Asked]) -> tuple:
        """Return the box and the actions as they are while nothing runs."""
        box = gr.MultimodalTextbox(submit_btn=True, stop_btn=False)
        return box, gr.Row(visible=bool(turns) and turns[-1].answer is not None)

    def add_picture(self, picture: str | None, box: dict[str, Any] | None) -> tuple:
        """Put a picture of the camera into the box; return the box and the emptied camera."""
        box = box or {}
        files = [*(box.get("files") or []), picture]
        return {"text": box.get("text") or "", "files": files}, None

    @property
    def can_compare(self) -> bool:
        return self.routing != VANILLA

    @property
    def can_look_inside(self) -> bool:
        return is_dpvr_llava(self.answerer.model)


def _answered(turns: list[Asked]) -> list[Asked]:
    if not turns or turns[-1].answer is None:
        raise ValueError("There is no answer yet: ask something first.")
    return turns
