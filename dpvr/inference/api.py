"""The endpoints for programs: one question at a time, pictures as files, JSON as the answer; see docs/chat.md."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import gradio as gr

from dpvr.inference.chat import HOTTEST, Turn
from dpvr.inference.controls import Model
from dpvr.inference.conversation import continued, opened, user_errors
from dpvr.inference.unlike import warning
from dpvr.inference.views import ratios

MAX_NEW_TOKENS = 256
LONGEST = 64


class Api(Model):
    """What the endpoints do."""

    def ask(
        self, question: str | None, pictures: list[str] | None, routing: str, longest: int, temperature: float
    ) -> Iterator[dict[str, Any]]:
        """Answer a question about pictures, as {"answer", "readout", "note"}; the answer grows, the rest comes last.

        The note says that a picture is unlike those that the model was trained on, and is null else.
        """
        with user_errors(escape=False):
            settings = {"routing": routing, "max_new_tokens": int(longest), "temperature": temperature}
            turns = self._turn(question, pictures)
            for partial in self.stream(turns, **settings):
                note = warning(self.unlike(turns[-1].pictures)) if partial.readout else None
                readout = partial.readout and asdict(partial.readout)
                yield {"answer": partial.text, "readout": readout, "note": note}

    def compare(self, question: str | None, pictures: list[str] | None, longest: int) -> dict[str, Any]:
        """Answer under vanilla and under the model's routing, and time both prefills in turn.

        Answers, readouts with the medians of the rounds, their ratios, and the ratio of the prefill times with its 95%
        interval; it is conclusive if that is narrow.
        """
        with user_errors(escape=False):
            turns = self._turn(question, pictures)
            *_, (_, found) = self.compare_both(turns, max_new_tokens=int(longest))
        vanilla, own = (
            {"answer": text, "medians": asdict(readout)}
            for text, readout in zip(found.texts, found.medians, strict=True)
        )
        return {
            "vanilla": vanilla,
            "dpvr": own,
            "same_answer": found.is_same_answer,
            "ratios": ratios(found),
            "prefill_ratio": {**found.ratio._asdict(), "conclusive": found.ratio.is_narrow},
            "repetitions": found.repetitions,
        }

    def look_inside(self, question: str | None, pictures: list[str] | None) -> dict[str, Any]:
        """Return the attention to the pictures: per layer the text's share and the answer's first word's, and a map.

        The map is of the patches, in the deepest layer that reads the picture.
        """
        with user_errors(escape=False):
            vanilla, own, _ = self.inside(self._turn(question, pictures))
        return {
            name: {
                "mass": found.mass,
                "answer_mass": found.maps.sum((1, 2)).tolist(),
                "layer": found.layer,
                "heat": found.heat.tolist(),
            }
            for name, found in (("vanilla", vanilla), ("dpvr", own))
        }

    def _turn(self, question: str | None, pictures: list[str] | None) -> list[Turn]:
        return opened(continued([], question or "", pictures or []))


def add_api(api: Api) -> None:
    """Add the endpoints, whose inputs the page does not show."""
    with gr.Column(visible=False):
        question = gr.Textbox(label="question")
        pictures = gr.File(label="pictures", file_count="multiple", type="filepath")
        routing = gr.Textbox(label="routing", value=api.routing, max_length=40)
        longest = gr.Slider(1, MAX_NEW_TOKENS, LONGEST, step=1, label="longest")
        temperature = gr.Slider(0, HOTTEST, 0, label="temperature")
        result = gr.JSON()
        for name, function, inputs in (
            ("ask", api.ask, [question, pictures, routing, longest, temperature]),
            ("compare", api.compare, [question, pictures, longest]),
            ("look_inside", api.look_inside, [question, pictures]),
        ):
            gr.Button().click(function, inputs, result, api_name=name, concurrency_id="model")
