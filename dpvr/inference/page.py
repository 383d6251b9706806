"""The page of the image chat, and how it is served.

pictures, question, settings | Chat, Side by side, Look inside          below each other on a phone
/ask, /compare, /look_inside                                            the same for programs
"""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image
from sklearn.datasets import load_sample_images
from starlette.middleware import Middleware

from dpvr.inference.calls import HANDLERS, CheckedBlocks
from dpvr.inference.chat import HOTTEST, ONE_WAY, Answerer
from dpvr.inference.controls import Api, Page
from dpvr.inference.uploads import KEPT_SECONDS, UploadLimits
from dpvr.inference.views import CSS
from dpvr.inference.ways import VANILLA, StockWays
from minibench.scenes import make_scene

MAX_NEW_TOKENS = 256
LONGEST = 64
MAX_UPLOAD = "20mb"
CLEANING_SECONDS = 600
MAX_SESSIONS = 200  # whose chats are kept while nobody looks at them
MAX_WAITING = MAX_SESSIONS  # one question of each


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
    """Return the app, with a few examples and a text about the model."""
    page = Page(answerer)
    with CheckedBlocks(
        title="DPVR image chat", analytics_enabled=False, delete_cache=(CLEANING_SECONDS, KEPT_SECONDS)
    ) as app:
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
                    compare, comparison = add_comparison(answerer.ways)
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
    return app.queue(default_concurrency_limit=1, max_size=MAX_WAITING, api_open=False)  # all calls wait in the queue


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
    return gallery, question, buttons, longest, temperature


def add_chat() -> tuple[gr.Chatbot, gr.HTML]:
    """Add the chat and the readout of its last answer."""
    chat = gr.Chatbot(
        label="Chat", render_markdown=False, height=420, feedback_options=None, buttons=["copy"], elem_id="chat"
    )
    return chat, gr.HTML(elem_id="readout")


def add_comparison(ways: StockWays) -> tuple[gr.Button, gr.HTML]:
    """Add the button and the place for vanilla beside DPVR."""
    both = "The question in the box, or the chat's last one, through vanilla and through DPVR on the same weights."
    gr.Markdown(f"There is nothing to compare: {ONE_WAY}" if ways.own == VANILLA else both)
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


def launch(app: gr.Blocks, host: str | None, port: int | None, **options: Any) -> None:
    """Serve the app within the limits on uploads."""
    limits = Middleware(UploadLimits, folder=get_upload_folder())
    app.launch(
        app_kwargs={"middleware": [limits], "exception_handlers": HANDLERS},
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
