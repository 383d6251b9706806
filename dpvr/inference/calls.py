"""What a page or a program may send to the app: checked before Gradio reads it, so that each fault has its sentence.

request                             a call of a form that Gradio cannot read  ->  `HANDLERS`, 400
{"data": [question, pictures, ...]} as many values as inputs, each of its input's type, files that are uploads
the function behind the call        what it says of its input, or else that it failed; the reason is in the log
"""

import json
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from gradio.blocks import BlockFunction
from gradio.components import Component
from gradio.route_utils import FnIndexInferError
from gradio.utils import get_upload_folder
from gradio_client.utils import is_http_url_like
from starlette.exceptions import HTTPException

SHOWN = 40  # characters of a wrong value that a message repeats
MAX_FILES = 64  # of one call, each of which Gradio reads whole
FORM = "as the page's API description, at its foot, shows"
UNREADABLE = f'This call cannot be read: name one of the app\'s calls, and send its values {FORM}, {{"data": [...]}}.'
WRONG_FORM = f"A value of this call has a wrong form: send it {FORM}."
FAILED = "The app failed at this call: try it again; whoever runs the app finds the reason in its log."


async def refuse_request(request: Request, error: Exception) -> Response:
    """Answer a request that no function was found for, or whose body is not of the form of a call."""
    if isinstance(error, HTTPException) and error.__cause__ is None:  # Gradio has refused it, in its own words
        return await http_exception_handler(request, error)
    return JSONResponse({"error": UNREADABLE}, status_code=400)


async def report_failure(request: Request, error: Exception) -> Response:
    """Answer a request that failed for no fault of its own; the server's log has the traceback."""
    return JSONResponse({"error": FAILED}, status_code=500)


OF_THE_REQUEST = (HTTPException, RequestValidationError, FnIndexInferError, LookupError, TypeError, ValueError)
HANDLERS = {**dict.fromkeys(OF_THE_REQUEST, refuse_request), Exception: report_failure}


class CheckedBlocks(gr.Blocks):
    """A page whose inputs are checked; it takes uploads and no web addresses, which Gradio would fetch whole."""

    async def process_api(self, *args: Any, **settings: Any) -> dict[str, Any]:
        """As Gradio does; whatever else goes wrong, the caller gets a sentence and the log the rest."""
        try:
            return await super().process_api(*args, **settings)
        except gr.Error:
            raise
        except Exception as error:
            raise gr.Error(FAILED) from error

    def validate_inputs(self, block_fn: BlockFunction, inputs: list[Any]) -> None:
        try:
            check_call(block_fn.inputs, [] if block_fn.cancels else inputs)  # to which Gradio adds the session
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        super().validate_inputs(block_fn, inputs)

    async def preprocess_data(self, *args: Any, **settings: Any) -> list[Any]:
        """As Gradio does; what its own data models refuse is said without their internals."""
        try:
            return await super().preprocess_data(*args, **settings)
        except gr.Error:  # a ValueError, and has its sentence
            raise
        except (ValueError, TypeError, AttributeError, LookupError, OSError, RecursionError) as error:
            raise gr.Error(WRONG_FORM, print_exception=False) from error


def check_call(blocks: list[Component], values: list[Any]) -> None:
    """Check the values of a call against the inputs that take them.

    Raises:
        ValueError: for too few or too many values, values of other types, numbers out of range, and files that are no
            uploads.
    """
    if len(values) != len(blocks):
        names = ", ".join(block.label or "null for the chat" for block in blocks) or "none"
        raise ValueError(f"This call has {len(values)} values and needs {len(blocks)}: send {names}.")
    for block, value in zip(blocks, values, strict=True):
        if isinstance(block, gr.Textbox):
            _check_text(block, value)
        elif isinstance(block, gr.MultimodalTextbox):
            _check_box(block, value)
        elif isinstance(block, gr.Slider):
            _check_number(block, value)
        elif isinstance(block, gr.File | gr.Gallery):
            _check_files(block.label, value)


def _check_text(box: gr.Textbox, value: Any) -> None:
    if not isinstance(value, str | None):
        raise ValueError(f"{box.label} is {_shown(value)}: send a text.")
    if value and box.max_length is not None and len(value) > box.max_length:
        raise ValueError(f"{box.label} is {_shown(value)}: send at most {box.max_length} characters.")


def _check_box(box: gr.MultimodalTextbox, value: Any) -> None:
    if not isinstance(value, dict | None):
        raise ValueError(f'{box.label} is {_shown(value)}: send {{"text": ..., "files": [...]}}.')
    text = (value or {}).get("text")
    if not isinstance(text, str | None):
        raise ValueError(f"The text of {box.label} is {_shown(text)}: send a text.")
    _check_files(box.label, (value or {}).get("files"))


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
    if len(value or []) > MAX_FILES:
        raise ValueError(f"{label} holds {len(value)} files: send at most {MAX_FILES}.")
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
