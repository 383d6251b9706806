"""The page of the image chat, and how it is served.

title, two sentences                                                            | drawer: method, its curve,
the conversation, or the examples: answers, a line under each, cards            | length, temperature, camera,
Compare, Look inside, Regenerate, New chat      once there is an answer         | about the model
box: text, pictures (drop, paste, clip), send or stop
/ask, /compare, /look_inside                                                    for programs
"""

from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image
from sklearn.datasets import load_sample_images
from starlette.middleware import Middleware

from dpvr.inference.about import describe
from dpvr.inference.api import LONGEST, MAX_NEW_TOKENS, Api, add_api
from dpvr.inference.calls import HANDLERS, CheckedBlocks
from dpvr.inference.chat import HOTTEST, Answerer
from dpvr.inference.controls import Page
from dpvr.inference.uploads import KEPT_SECONDS, UploadLimits
from minibench.questions import caption
from minibench.scenes import make_scene

MAX_UPLOAD = "20mb"
CLEANING_SECONDS = 600
MAX_SESSIONS = 200  # whose chats are kept while nobody looks at them
MAX_WAITING = MAX_SESSIONS  # one question of each
SCENES = [  # pictures of MiniBench's test split, by their index, and a question
    ((0,), "What colour is the ring?"),
    ((0, 1, 2, 3), "Is there a red cross?"),
    ((4, 5, 6, 7), "Is there a red square?"),
    ((2,), "请描述这张图片。"),
]
LONG = 2  # the scenes whose question comes after a long text: captions of pictures that are not shown
CAPTIONED = range(50, 58)
PHOTOGRAPHS = [
    ((0,), "Describe the picture."),
    ((0, 1), "What do these two pictures have in common?"),
    ((1,), "What colour is the flower?"),
]
# Gradio calls its examples a list and gives it buttons for items, which a screen reader cannot make sense of. And it
# scrolls to the end of the chat before the actions take their place from it, which would cut the last line off.
HEAD = """<script>
const followed = new WeakSet()
const follow = new ResizeObserver(changes => changes.forEach(({target}) => {
    if (target.scrollHeight - target.scrollTop - target.clientHeight < 120) target.scrollTop = target.scrollHeight
}))
new MutationObserver(() => {
    document.querySelectorAll("#chat .examples[role=list]").forEach(found => found.setAttribute("role", "group"))
    document.querySelectorAll("#chat .bubble-wrap").forEach(found => {
        if (!followed.has(found)) { followed.add(found); follow.observe(found) }
    })
}).observe(document.documentElement, {childList: true, subtree: true})
</script>"""
FAINT = {"": "*neutral_600", "_dark": "*neutral_300"}  # Gradio's own is too faint to be read
THEME = gr.themes.Default(font="system-ui", font_mono="monospace").set(
    **{f"body_text_color_subdued{mode}": colour for mode, colour in FAINT.items()},
    **{f"input_placeholder_color{mode}": colour for mode, colour in FAINT.items()},
)
PRIVATE = {"concurrency_id": "model", "api_visibility": "private"}
Examples = list[tuple[list[str], str]]


def write_examples(folder: Path, *, photographs: bool = False) -> Examples:
    """Draw MiniBench scenes, or save scikit-learn's two photographs; return a few questions about them."""
    examples = []
    for number, (indices, question) in enumerate(PHOTOGRAPHS if photographs else SCENES):
        if number == LONG and not photographs:
            question = f"{notes()}\n{question}"
        paths = [str(folder / f"example-{index}.png") for index in indices]
        for index, path in zip(indices, paths, strict=True):
            picture = (
                Image.fromarray(load_sample_images().images[index])
                if photographs
                else make_scene("test", 0, index).draw()
            )
            picture.save(path)
        examples.append((paths, question))
    return examples


def notes() -> str:
    """A text about pictures that are not shown: what MiniBench's captions say of them."""
    captions = (caption(make_scene("test", 0, index)) for index in CAPTIONED)
    return "\n".join(["Notes on other pictures:", *(f"{number}. {said}" for number, said in enumerate(captions, 1))])


def on_card(question: str) -> str:
    """What an example's card shows of its question."""
    *text, last = question.splitlines()
    return f"{len(text)} lines of text, then: {last}" if text else last


class Drawer(NamedTuple):
    """The settings, and the camera."""

    method: gr.Radio
    longest: gr.Slider
    temperature: gr.Slider
    camera: gr.Image


def build(answerer: Answerer, about: str, examples: Examples) -> gr.Blocks:
    """Return the app, with a few examples and one or two sentences about the model."""
    page = Page(answerer, examples)
    with CheckedBlocks(
        title="DPVR image chat",
        analytics_enabled=False,
        fill_height=True,
        delete_cache=(CLEANING_SECONDS, KEPT_SECONDS),
    ) as app:
        add_api(Api(answerer))
        turns = gr.State([])
        drawer = add_drawer(page)
        gr.Markdown(f"# DPVR image chat\n{about}", elem_id="head")
        chat = add_chat(examples)
        actions, compare, look, again, clear = add_actions(page)
        box = add_box()

        settings, shows = [drawer.method, drawer.longest, drawer.temperature], [chat, turns, box, actions]
        running = [
            box.submit(page.ask, [box, turns, *settings], shows, **PRIVATE),
            chat.example_select(page.ask_example, settings, shows, **PRIVATE),
            again.click(page.regenerate, [turns, *settings], shows, **PRIVATE),
            compare.click(page.compare, [turns, drawer.method, drawer.longest], shows, **PRIVATE),
            look.click(page.look_inside, [turns, drawer.method], shows, **PRIVATE),
        ]
        ready = {"fn": page.ready, "inputs": turns, "outputs": [box, actions], "api_visibility": "private"}
        for event in running:
            event.then(**ready)
        drawer.camera.input(page.add_picture, [drawer.camera, box], [box, drawer.camera], api_visibility="private")
        box.stop(None, cancels=running, api_visibility="private").then(**ready)
        clear.click(
            lambda: ([], [], {"text": "", "files": []}, gr.Row(visible=False)),
            None,
            shows,
            cancels=running,
            api_visibility="private",
        )
    return app.queue(default_concurrency_limit=1, max_size=MAX_WAITING, api_open=False)  # all calls wait in the queue


def add_chat(examples: Examples) -> gr.Chatbot:
    """Add the conversation; while it is empty it shows the examples."""
    return gr.Chatbot(
        label="Conversation",
        show_label=False,
        render_markdown=False,
        scale=1,
        min_height=180,
        feedback_options=None,
        buttons=[],
        placeholder="Click an example, or add a picture and ask.",
        examples=[
            {"text": question, "display_text": on_card(question), "files": [*paths]} for paths, question in examples
        ],
        elem_id="chat",
    )


def add_actions(page: Page) -> tuple[gr.Row, gr.Button, gr.Button, gr.Button, gr.Button]:
    """Add what can be done once there is an answer."""
    with gr.Row(visible=False, elem_id="actions") as actions:
        compare = gr.Button("Compare", size="sm", visible=page.can_compare)
        look = gr.Button("Look inside", size="sm", visible=page.can_look_inside)
        again = gr.Button("Regenerate", size="sm")
        clear = gr.Button("New chat", size="sm")
    return actions, compare, look, again, clear


def add_box() -> gr.MultimodalTextbox:
    """Add the place for question and pictures."""
    return gr.MultimodalTextbox(
        label="Question",
        show_label=False,
        placeholder="Ask about a picture",
        file_count="multiple",
        file_types=["image"],
        max_plain_text_length=20_001,  # more is refused, and never becomes a file
        elem_id="box",
    )


def add_drawer(page: Page) -> Drawer:
    """Add the settings, the camera and what is known of the model."""
    with gr.Sidebar(position="right", open=False, width="min(360px, 92vw)", elem_id="drawer"):
        gr.Markdown("## Settings")
        method = gr.Radio(
            [(setting.label, routing) for routing, setting in page.settings.items()],
            value=page.setting.routing,
            label="Method",
        )
        dial = gr.HTML(page.dial(page.setting.routing), elem_id="dial")
        method.change(page.dial, method, dial, api_visibility="private", queue=False)
        longest = gr.Slider(1, MAX_NEW_TOKENS, LONGEST, step=1, label="Longest answer, tokens")
        hint = "0: the same answer each time"
        temperature = gr.Slider(0, HOTTEST, 0, step=0.1, label="Temperature", info=hint)
        with gr.Accordion("Take a picture", open=False):
            camera = gr.Image(sources=["webcam"], type="filepath", label="Camera", format="png", elem_id="camera")
        gr.Markdown(f"## About this model\n{describe(page.answerer)}", elem_id="about")
    return Drawer(method, longest, temperature, camera)


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
        show_error=True,
        head=HEAD,
        css_paths=Path(__file__).with_name("page.css"),
        theme=THEME,
        footer_links=["api"],
        **options,
    )
