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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from gradio_client.utils import is_http_url_like
from PIL import Image
from sklearn.datasets import load_sample_images

from dpvr.data.pictures import open_picture
from dpvr.inference.chat import HOTTEST, Answerer, Turn, load
from dpvr.inference.views import CSS, curve, overlay, ratios, show_comparison, show_readout
from minibench.scenes import make_scene

try:
    from spaces import GPU as on_gpu  # a Space with shared GPUs gives one for as long as such a function runs
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
MAX_WAITING = 32
MAX_SESSIONS = 200  # whose chats are kept while nobody looks at them
LONGEST = 64
PROGRESS = gr.Progress()

Gallery = list[tuple[str, str | None]] | None


@dataclass(frozen=True)
class Asked:
    """A turn of a chat as the server keeps it for a page: pictures by their paths in the upload folder."""

    question: str
    paths: tuple[str, ...] = ()
    answer: str | None = None


@contextmanager
def plainly(*, escape: bool) -> Iterator[None]:
    """Say what is wrong with the input, to a page as HTML, to a program as it is; the server goes on."""
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
            gr.Warning(f"Expected at most {MAX_PICTURES} pictures; got {len(gallery)}. The last ones are left out.")
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
        with plainly(escape=True):
            asked = continued(turns, question or "", gallery)
            if len(asked) <= len(turns):
                gr.Info("A picture that the chat was about is gone, so this is a new chat.")
            for shows in self._answer(asked, longest, temperature):
                yield *shows, emptied
                emptied = gr.skip()

    def regenerate(self, turns: list[Asked], longest: int, temperature: float) -> Iterator[tuple]:
        """Answer the last question again; yield the chat, its turns and the readout."""
        with plainly(escape=True):
            if not turns:
                raise ValueError("Expected an answer to make again; got an empty chat. Remedy: ask something.")
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
        with plainly(escape=True):
            turns = opened(question_at_hand(question, gallery, turns))
            for share, found in self.compare_both(turns, repetitions=REPETITIONS, max_new_tokens=int(longest)):
                progress(share, desc="Answering both ways in turn")
                yield show_comparison(found) if found else gr.skip()

    def look_inside(
        self, question: str | None, gallery: Gallery, turns: list[Asked]
    ) -> tuple[list[tuple[Image.Image, str]], pd.DataFrame]:
        """Return the pictures with the attention to them, vanilla's first, and the curves."""
        with plainly(escape=True):
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
        with plainly(escape=False):
            settings = {"routing": routing, "max_new_tokens": int(longest), "temperature": temperature}
            for partial in self.stream(self._turn(question, pictures), **settings):
                yield {"answer": partial.text, "readout": partial.readout and asdict(partial.readout)}

    def compare(self, question: str | None, pictures: list[str] | None, longest: int) -> dict[str, Any]:
        """Answer under vanilla and under the model's routing: answers, medians of the readouts, and their ratios."""
        with plainly(escape=False):
            turns = self._turn(question, pictures)
            *_, (_, found) = self.compare_both(turns, repetitions=REPETITIONS, max_new_tokens=int(longest))
        vanilla, own = (
            {"answer": text, "medians": asdict(readout)}
            for text, readout in zip(found.texts, found.medians, strict=True)
        )
        return {"vanilla": vanilla, "dpvr": own, "ratios": ratios(found), "repetitions": found.repetitions}

    def look_inside(self, question: str | None, pictures: list[str] | None) -> dict[str, Any]:
        """Return the text's attention to the pictures: the share per layer, and the reading layer's map of patches."""
        with plainly(escape=False):
            vanilla, own, _ = self.inside(self._turn(question, pictures))
        return {
            name: {"mass": found.mass, "layer": found.layer, "heat": found.heat.tolist()}
            for name, found in (("vanilla", vanilla), ("dpvr", own))
        }

    def _turn(self, question: str | None, pictures: list[str] | None) -> list[Turn]:
        return opened(continued([], question or "", [(path, None) for path in pictures or ()]))


def write_examples(folder: Path) -> list[list]:
    """Draw MiniBench scenes, and save scikit-learn's two photographs, with a question each."""
    asked = [
        ((0,), "Options: red A blue B green C yellow D\nWhat colour is the ring?"),
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
    page = Page(answerer)
    with gr.Blocks(title="DPVR image chat", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as app:
        gr.Markdown(f"# DPVR image chat\n{about}")
        add_api(Api(answerer))
        turns = gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                gallery, question, buttons, longest, temperature = add_inputs()
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                with gr.Tab("Chat"):
                    chat, readout = add_chat()
                with gr.Tab("Side by side"):
                    compare, comparison = add_comparison()
                with gr.Tab("Look inside"):
                    look, overlays, plot = add_look_inside()
        gr.Examples(examples, [gallery, question], label="Examples", elem_id="examples")

        model = {"concurrency_id": "model", "api_visibility": "private"}
        ask, stop, again, clear = buttons
        asked, shows = [question, gallery, turns, longest, temperature], [chat, turns, readout]
        running = [
            gr.on([ask.click, question.submit], page.ask, asked, [*shows, question], **model),
            again.click(page.regenerate, [turns, longest, temperature], shows, **model),
            compare.click(page.compare, [question, gallery, turns, longest], comparison, **model),
        ]
        look.click(page.look_inside, [question, gallery, turns], [overlays, plot], **model)
        stop.click(None, cancels=running, api_visibility="private")
        everything = [*shows, question, gallery]
        clear.click(lambda: None, cancels=running, api_visibility="private").then(
            lambda: ([], [], "", "", None), None, everything, api_visibility="private"
        )
        gallery.upload(page.accept, gallery, gallery, trigger_mode="multiple", api_visibility="private")
    return app.queue(default_concurrency_limit=1, max_size=MAX_WAITING)


def add_inputs() -> tuple[gr.Gallery, gr.Textbox, list[gr.Button], gr.Slider, gr.Slider]:
    """Add pictures, question, buttons and settings."""
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
    question = gr.Textbox(label="Question", placeholder="What colour is the star?", max_lines=6, elem_id="question")
    with gr.Row():
        buttons = [
            gr.Button(name, variant=variant, min_width=110)
            for name, variant in (
                ("Ask", "primary"),
                ("Stop", "secondary"),
                ("Regenerate", "secondary"),
                ("New chat", "secondary"),
            )
        ]
    with gr.Accordion("Settings", open=False):
        longest = gr.Slider(1, MAX_NEW_TOKENS, LONGEST, step=1, label="Longest answer, tokens")
        hint = "0: the same answer each time"
        temperature = gr.Slider(0, HOTTEST, 0, step=0.1, label="Temperature", info=hint)
    return uploads_only(gallery), question, buttons, longest, temperature


def add_chat() -> tuple[gr.Chatbot, gr.HTML]:
    """Add the chat and the readout of its last answer."""
    chat = gr.Chatbot(
        label="Chat", render_markdown=False, height=420, feedback_options=None, buttons=["copy"], elem_id="chat"
    )
    return chat, gr.HTML(elem_id="readout")


def add_comparison() -> tuple[gr.Button, gr.HTML]:
    """Add the button and the place for vanilla beside DPVR."""
    gr.Markdown(
        "The question in the box, or the chat's last one, through vanilla LLaVA and through DPVR on the same weights."
    )
    return gr.Button("Compare", variant="primary"), gr.HTML(elem_id="comparison")


def add_look_inside() -> tuple[gr.Button, gr.Gallery, gr.LinePlot]:
    """Add the button and the places for attention over the pictures and layer by layer."""
    gr.Markdown(
        "Where the prompt's last token looks in the deepest layer that reads the picture, and how much of the text's "
        "attention goes to the picture in every layer."
    )
    look = gr.Button("Look inside", variant="primary")
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
    return look, overlays, plot


def add_api(api: Api) -> None:
    """Add the endpoints for programs, whose inputs the page does not show."""
    with gr.Column(visible=False):
        question = gr.Textbox(label="question")
        pictures = uploads_only(gr.File(label="pictures", file_count="multiple", type="filepath"))
        routing = gr.Textbox(label="routing", value=api.routing)
        longest = gr.Slider(1, MAX_NEW_TOKENS, LONGEST, step=1, label="longest")
        temperature = gr.Slider(0, HOTTEST, 0, label="temperature")
        result = gr.JSON()
        for name, function, inputs in (
            ("ask", api.ask, [question, pictures, routing, longest, temperature]),
            ("compare", api.compare, [question, pictures, longest]),
            ("look_inside", api.look_inside, [question, pictures]),
        ):
            gr.Button().click(function, inputs, result, api_name=name, concurrency_id="model")


def uploads_only(component: gr.components.Component) -> gr.components.Component:
    """Have a component refuse web addresses, which Gradio fetches whole, however large, before anyone asks for it."""
    move = component.async_move_resource_to_block_cache

    async def move_unless_address(resource: str | Path | None) -> str | None:
        if resource is not None and is_http_url_like(str(resource)):
            raise gr.Error(
                "Expected an uploaded picture; got a web address. Remedy: upload it.", print_exception=False
            )
        return await move(resource)

    component.async_move_resource_to_block_cache = move_unless_address
    return component


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
        state_session_capacity=MAX_SESSIONS,
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
