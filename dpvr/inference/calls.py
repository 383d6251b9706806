"""What a page or a program may send to the app: checked before Gradio reads it, so that each fault has its sentence.

{"data": [question, pictures, ...]}  ->  as many values as inputs, each of its input's type, files that are uploads
"""

import json
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import BlockFunction
from gradio.components import Component
from gradio.utils import get_upload_folder
from gradio_client.utils import is_http_url_like

SHOWN = 40  # characters of a wrong value that a message repeats


class CheckedBlocks(gr.Blocks):
    """A page whose inputs are checked; it takes uploads and no web addresses, which Gradio would fetch whole."""

    def validate_inputs(self, block_fn: BlockFunction, inputs: list[Any]) -> None:
        try:
            check_call(block_fn.inputs, inputs)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        super().validate_inputs(block_fn, inputs)

    async def preprocess_data(self, *args: Any, **settings: Any) -> list[Any]:
        """As Gradio does; what its own data models refuse is said without their internals."""
        try:
            return await super().preprocess_data(*args, **settings)
        except gr.Error:  # a ValueError, and has its sentence
            raise
        except (ValueError, TypeError, AttributeError, LookupError, OSError) as error:
            message = "A value of this call has a wrong form: send it as the page's API description shows."
            raise gr.Error(message, print_exception=False) from error


def check_call(blocks: list[Component], values: list[Any]) -> None:
    """Check the values of a call against the inputs that take them.

    Raises:
        ValueError: for too few values, values of other types, numbers out of range, and files that are no uploads.
    """
    if len(values) < len(blocks):
        names = ", ".join(str(block.label) for block in blocks)
        raise ValueError(f"This call has {len(values)} values and needs {len(blocks)}: send {names}.")
    for block, value in zip(blocks, values, strict=False):
        if isinstance(block, gr.Textbox) and not isinstance(value, str | None):
            raise ValueError(f"{block.label} is {_shown(value)}: send a text.")
        elif isinstance(block, gr.Slider):
            _check_number(block, value)
        elif isinstance(block, gr.File | gr.Gallery):
            _check_files(block.label, value)


def _check_number(slider: gr.Slider, value: Any) -> None:
    """NaN is in no range."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and slider.minimum <= value <= slider.maximum):
        span = f"from {slider.minimum} to {slider.maximum}"
        raise ValueError(f"{slider.label} is {_shown(value)}: send a number {span}.")
    if slider.step == 1 and value != int(value):
        raise ValueError(f"{slider.label} is {_shown(value)}: send a whole number.")


def _check_files(label: str, value: Any) -> None:
    if not isinstance(value, list | None):
        raise ValueError(f"{label} is {_shown(value)}: send a list of uploaded pictures, or null for none.")
    for entry in value or []:
        file = entry.get("image", entry) if isinstance(entry, dict) else None
        path = file.get("path") if isinstance(file, dict) else None
        if not isinstance(path, str) or not path:
            raise ValueError(
                f'{label} holds {_shown(entry)}, which is no file: upload the picture, and send {{"path": ...}} with '
                "the path that the upload returns."
            )
        if is_http_url_like(path):
            raise ValueError("The picture is a web address: upload the picture itself.")
        if not _is_upload(path):
            raise ValueError(f"{label} holds a path that is no upload to this app: upload the picture first.")


def _is_upload(path: str) -> bool:
    """Whether a path lies in the folder of uploads, where the page's examples and shown pictures lie, too."""
    try:
        return Path(get_upload_folder()).resolve() in Path(path).resolve().parents
    except (ValueError, OSError, RuntimeError):  # a null byte, a name too long, a loop of links
        return False


def _shown(value: Any) -> str:
    """A value as it was sent, shortened; lists and objects by their type, as they may be deep."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    try:
        text = json.dumps(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
