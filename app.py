"""Image chat with a DPVR model: streamed answers and where their time went, vanilla beside DPVR, a look inside.

    browser, gradio_client -> queue, one answer at a time -> answering.Answerer -> app_views

    python app.py                                                     dpvr-mini, nothing downloaded
    python app.py --model me/x --port 7861                            any DPVR repository
    python app.py --model my-adapter --base llava-hf/llava-1.5-7b-hf  a PEFT adapter and its base

A Hugging Face Space as it stands. The README says how to call it from Python.
"""

import argparse
import hashlib
import html
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from PIL import Image
from sklearn.datasets import load_sample_images

from answering import Answerer, Comparison, Partial, Turn, load
from app_views import CSS, curve, overlay, ratios, show_comparison, show_readout
from minibench.scenes import make_scene
from pictures import open_picture

try:
    from spaces import GPU as on_gpu  # a Space with shared GPUs lends one for as long as such a function runs
except ImportError:

    def on_gpu(function: Any) -> Any:
        return function


ROOT = str(Path(__file__).parent)
MAX_PICTURES = 8
MAX_NEW_TOKENS = 256
MAX_UPLOAD = "20mb"
REPETITIONS = 5
KEPT_SECONDS = 3600
MINI = """\
This is **dpvr-mini**, a LLaVA of 6 million parameters. It was trained on pictures of three to six coloured shapes and
handwritten digits, and on nothing else. It can answer short questions about those, in English and Chinese: *What
colour is the star? Which digit is at the top left? How many squares are there? Is there a red circle?*, or with
options, as in the examples. **It cannot answer anything about photographs**, people or text, and will name shapes all
the same. Of its own kind of pictures it does not know everything either: the README has its scores."""
OTHER = "This is **{name}**. Ask about one picture or several."
PROGRESS = gr.Progress()
SETTINGS = {"max_new_tokens": 64, "temperature": 0.0}

Gallery = list[tuple[str, str | None]] | None


@dataclass(frozen=True)
class Asked:
    """A turn of a chat as the server keeps it for a page: pictures by their paths in the upload folder."""

    question: str
    paths: tuple[str, ...] = ()
    answer: str | None = None


@contextmanager
def in_the_page() -> Iterator[None]:
    """Show what is wrong with the input in the page; the server goes on."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error


def continued(turns: list[Asked], question: str, gallery: Gallery) -> list[Asked]:
    """Return the chat with another question; pictures that are new in the gallery belong to it.

    Where the gallery lacks a picture that was talked about, a new chat begins. Pictures are told by what they show:
    the page may show an upload's own file for a while before it shows the model's view of it.
    """
    paths = tuple(path for path, _ in gallery or ())
    if len(paths) > MAX_PICTURES:
        raise ValueError(f"Expected at most {MAX_PICTURES} pictures; got {len(paths)}. Remedy: remove some.")
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


class Page:
    """What the page's controls do. Chats are kept by the page; here, only who may stop which answer."""

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer
        self.stops: dict[str, threading.Event] = {}

    def accept(self, gallery: Gallery) -> list[Image.Image]:
        """Return the gallery as the model will see it, upright and in RGB, without files that are no good."""
        pictures = []
        for path, _ in gallery or ():
            try:
                pictures.append(open_picture(path))
            except ValueError as error:
                gr.Warning(html.escape(f"{Path(path).name} is left out. {error}", quote=False))
        return pictures

    def ask(
        self,
        question: str,
        gallery: Gallery,
        turns: list[Asked],
        longest: int,
        temperature: float,
        request: gr.Request,
    ) -> Iterator[tuple]:
        """Answer a question; yield the chat, its turns, the readout and an emptied question box."""
        with in_the_page():
            asked = continued(turns, question, gallery)
            if len(asked) <= len(turns):
                gr.Info("A picture that the chat was about is gone, so this is a new chat.")
            yield from self._answer(asked, longest, temperature, request)

    def regenerate(self, turns: list[Asked], longest: int, temperature: float, request: gr.Request) -> Iterator[tuple]:
        with in_the_page():
            if not turns:
                raise ValueError("Expected an answer to make again; got an empty chat. Remedy: ask something.")
            yield from self._answer([*turns[:-1], replace(turns[-1], answer=None)], longest, temperature, request)

    def _answer(self, turns: list[Asked], longest: int, temperature: float, request: gr.Request) -> Iterator[tuple]:
        stop = self.stops[request.session_hash] = threading.Event()
        *before, asked = turns
        try:
            settings = {"max_new_tokens": int(longest), "temperature": temperature, "stop": stop}
            for partial in answers(self.answerer, opened(turns), **settings):
                turns = [*before, replace(asked, answer=partial.text)]
                yield shown(turns), turns, show_readout(partial.readout) if partial.readout else gr.skip(), ""
        finally:
            self.stops.pop(request.session_hash, None)

    def stop(self, request: gr.Request) -> None:
        if request.session_hash in self.stops:
            self.stops[request.session_hash].set()

    def compare(
        self, question: str, gallery: Gallery, turns: list[Asked], longest: int, progress: gr.Progress = PROGRESS
    ) -> str:
        with in_the_page():
            turns = self._question_at_hand(question, gallery, turns)
            return show_comparison(compared(self.answerer, opened(turns), int(longest), progress))

    def look_inside(self, question: str, gallery: Gallery, turns: list[Asked]) -> tuple[list, pd.DataFrame]:
        with in_the_page():
            turns = self._question_at_hand(question, gallery, turns)
            vanilla, own, pictures = looked_inside(self.answerer, opened(turns))
        found = {"vanilla": vanilla, self.answerer.routing: own}
        overlays = [
            (overlay(picture, heat), f"{name}, layer {attention.layer}")
            for name, attention in found.items()
            for picture, heat in zip(pictures, attention.heat, strict=True)
        ]
        return overlays, pd.DataFrame(curve(found))

    def _question_at_hand(self, question: str, gallery: Gallery, turns: list[Asked]) -> list[Asked]:
        """Return the chat up to the question in the box, or to its last question if the box is empty."""
        if question.strip() or not turns:
            return continued(turns, question, gallery)
        return [*turns[:-1], replace(turns[-1], answer=None)]


class Api:
    """The same for programs: one question at a time, pictures as files, JSON as the answer."""

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer

    def ask(
        self, question: str, pictures: list[str] | None, routing: str, longest: int, temperature: float
    ) -> Iterator[dict[str, Any]]:
        """Answer a question about pictures, as {"answer", "readout"}; the answer grows, the readout comes last."""
        with in_the_page():
            settings = {"max_new_tokens": int(longest), "temperature": temperature}
            for partial in answers(self.answerer, self._turn(question, pictures), routing=routing, **settings):
                yield {"answer": partial.text, "readout": partial.readout and asdict(partial.readout)}

    def compare(self, question: str, pictures: list[str] | None, longest: int) -> dict[str, Any]:
        """Answer under vanilla and under the model's routing: answers, medians of the readouts, and their ratios."""
        with in_the_page():
            found = compared(self.answerer, self._turn(question, pictures), int(longest), None)
        vanilla, own = (
            {"answer": text, "medians": asdict(readout)}
            for text, readout in zip(found.texts, found.medians, strict=True)
        )
        return {"vanilla": vanilla, "dpvr": own, "ratios": ratios(found), "repetitions": found.repetitions}

    def look_inside(self, question: str, pictures: list[str] | None) -> dict[str, Any]:
        """Return the text's attention to the pictures: the share per layer, and the reading layer's map of patches."""
        with in_the_page():
            vanilla, own, _ = looked_inside(self.answerer, self._turn(question, pictures))
        return {
            name: {"mass": found.mass, "layer": found.layer, "heat": found.heat.tolist()}
            for name, found in (("vanilla", vanilla), ("dpvr", own))
        }

    def _turn(self, question: str, pictures: list[str] | None) -> list[Turn]:
        return opened(continued([], question, [(path, None) for path in pictures or ()]))


@on_gpu
def answers(answerer: Answerer, turns: list[Turn], **settings: Any) -> Iterator[Partial]:
    yield from answerer.stream(turns, **settings)


@on_gpu
def compared(answerer: Answerer, turns: list[Turn], longest: int, progress: gr.Progress | None) -> Comparison:
    for share, comparison in answerer.compare(turns, repetitions=REPETITIONS, max_new_tokens=longest):
        if comparison is not None:
            return comparison
        if progress is not None:
            progress(share, desc="Answering both ways in turn")


@on_gpu
def looked_inside(answerer: Answerer, turns: list[Turn]) -> tuple:
    return answerer.look_inside(turns)


def write_examples(folder: Path) -> list[list]:
    """Draw MiniBench scenes, and save scikit-learn's two photographs, with a question each."""
    asked = [
        ((6,), "Options: red A blue B green C yellow D\nWhat colour is the star?"),
        ((2,), "How many objects are there?"),
        ((11,), "Is there a red circle?"),
        ((4,), "请描述这张图片。"),
        ((0, 1), "Same or different: the number of objects?"),
    ]
    examples = []
    for indices, question in asked:
        paths = [str(folder / f"scene-{index}.png") for index in indices]
        for index, path in zip(indices, paths, strict=True):
            make_scene("test", 0, index).draw().save(path)
        examples.append([paths, question])
    photographs = load_sample_images()
    for name, pixels in zip(("temple.jpg", "flower.jpg"), photographs.images, strict=True):
        Image.fromarray(pixels).save(folder / name, quality=95)
        examples.append([[str(folder / name)], "Describe the picture."])
    return examples


def build(answerer: Answerer, about: str, examples: list[list]) -> gr.Blocks:
    """Return the app: inputs on the left, answers on the right; below each other on a phone."""
    page, api = Page(answerer), Api(answerer)
    with gr.Blocks(title="DPVR image chat", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as app:
        gr.Markdown(f"# DPVR image chat\n{about}")
        add_api(api)
        turns = gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                gallery = gr.Gallery(
                    label="Pictures",
                    sources=["upload", "webcam", "clipboard"],
                    format="png",
                    columns=3,
                    fit_columns=False,
                    height=220,
                    object_fit="contain",
                    interactive=True,
                    elem_id="pictures",
                )
                question = gr.Textbox(
                    label="Question", placeholder="What colour is the star?", max_lines=6, elem_id="question"
                )
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", min_width=110, elem_id="ask")
                    stop = gr.Button("Stop", min_width=110, elem_id="stop")
                    again = gr.Button("Regenerate", min_width=110, elem_id="regenerate")
                    clear = gr.Button("New chat", min_width=110, elem_id="clear")
                with gr.Accordion("Settings", open=False):
                    longest = gr.Slider(
                        1, MAX_NEW_TOKENS, SETTINGS["max_new_tokens"], step=1, label="Longest answer, tokens"
                    )
                    temperature = gr.Slider(
                        0,
                        2,
                        SETTINGS["temperature"],
                        step=0.1,
                        label="Temperature",
                        info="0: the same answer each time",
                    )
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                with gr.Tab("Chat"):
                    chat = gr.Chatbot(
                        label="Chat",
                        render_markdown=False,
                        sanitize_html=True,
                        height=420,
                        elem_id="chat",
                        feedback_options=None,
                        buttons=["copy"],
                    )
                    readout = gr.HTML(label="Where the time went", elem_id="readout")
                with gr.Tab("Side by side"):
                    gr.Markdown(
                        "The question in the box, or the chat's last one, through vanilla LLaVA and through DPVR on "
                        "the same weights."
                    )
                    compare = gr.Button("Compare", variant="primary", elem_id="compare")
                    comparison = gr.HTML(elem_id="comparison")
                with gr.Tab("Look inside"):
                    gr.Markdown(
                        "Where the prompt's last token looks in the deepest layer that reads the picture, and how "
                        "much of the text's attention goes to the picture in every layer."
                    )
                    look = gr.Button("Look inside", variant="primary", elem_id="look")
                    overlays = gr.Gallery(
                        label="Attention over the picture",
                        show_label=False,
                        columns=2,
                        height="auto",
                        object_fit="contain",
                        elem_id="overlays",
                    )
                    plot = gr.LinePlot(
                        x="layer",
                        y="share",
                        color="routing",
                        y_lim=[0, 1],
                        x_title="layer",
                        x_axis_format="d",
                        y_title="share of attention on the picture",
                        label="Text-to-image attention",
                        elem_id="curve",
                    )
        gr.Examples(examples, [gallery, question], label="Examples", elem_id="examples")

        answer = {"outputs": [chat, turns, readout, question], "concurrency_id": "model", "api_visibility": "private"}
        asked = [question, gallery, turns, longest, temperature]
        gr.on([ask.click, question.submit], page.ask, asked, **answer)
        again.click(page.regenerate, [turns, longest, temperature], **answer)
        stop.click(page.stop, queue=False, api_visibility="private")
        clear.click(lambda: ([], [], "", None), None, [chat, turns, question, gallery], api_visibility="private")
        gallery.upload(page.accept, gallery, gallery, api_visibility="private")
        looking = {"concurrency_id": "model", "api_visibility": "private"}
        compare.click(page.compare, [question, gallery, turns, longest], comparison, **looking)
        look.click(page.look_inside, [question, gallery, turns], [overlays, plot], **looking)
    return app.queue(default_concurrency_limit=1, max_size=32)


def add_api(api: Api) -> None:
    """Add the endpoints for programs, whose inputs the page does not show."""
    with gr.Column(visible=False):
        question = gr.Textbox(label="question")
        pictures = gr.File(label="pictures", file_count="multiple", type="filepath")
        routing = gr.Textbox(label="routing", value=api.answerer.routing)
        longest = gr.Slider(1, MAX_NEW_TOKENS, SETTINGS["max_new_tokens"], step=1, label="longest")
        temperature = gr.Slider(0, 2, SETTINGS["temperature"], label="temperature")
        result = gr.JSON()
        for name, function, inputs in (
            ("ask", api.ask, [question, pictures, routing, longest, temperature]),
            ("compare", api.compare, [question, pictures, longest]),
            ("look_inside", api.look_inside, [question, pictures]),
        ):
            gr.Button().click(function, inputs, result, api_name=name, concurrency_id="model")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Chat about pictures with a DPVR model.")
    parser.add_argument("--model", default=ROOT, help="a DPVR repository or a PEFT adapter, Hub id or folder")
    parser.add_argument("--base", help="the LLaVA under an adapter; default: the one that the adapter names")
    parser.add_argument("--revision", default="main")
    parser.add_argument("--host", help="default: GRADIO_SERVER_NAME, else this machine alone, 127.0.0.1")
    parser.add_argument("--port", type=int, help="default: GRADIO_SERVER_PORT, else the first free one from 7860 on")
    return parser.parse_args(argv)


def launch(app: gr.Blocks, host: str | None, port: int | None, **options: Any) -> None:
    """Serve the app within the limits on uploads."""
    app.launch(
        server_name=host,
        server_port=port,
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        css=CSS,
        theme=gr.themes.Default(font="system-ui", font_mono="monospace"),
        footer_links=["api"],
        **options,
    )


def main(args: argparse.Namespace) -> None:
    model, processor = load(args.model, args.base, args.revision)
    about = MINI if args.model == ROOT else OTHER.format(name=args.model)
    with tempfile.TemporaryDirectory() as folder:
        launch(build(Answerer(model, processor), about, write_examples(Path(folder))), args.host, args.port)


if __name__ == "__main__":
    main(parse_args())
