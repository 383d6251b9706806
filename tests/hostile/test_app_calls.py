"""Calls of the app that no page makes, by kind: each is answered with one sentence, and the app goes on."""

import json
import re
from collections.abc import Iterator
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio.utils import get_upload_folder

from dpvr.inference.calls import FAILED, UNREADABLE, WRONG_FORM, check_call
from dpvr.inference.page import build, launch, write_examples
from dpvr.inference.uploads import own_folder
from minibench.scenes import make_scene

FILE = {"meta": {"_type": "gradio.FileData"}}
NAN, INFINITE = float("nan"), float("inf")
TEXT, FILES, NO_FILE = "send a text", "send a list of uploaded pictures", "which is no file: upload the picture"
NO_UPLOAD = "no upload to this app: upload the picture first"
LONGEST, TEMPERATURE = "send a number from 1 to 256", "send a number from 0 to 2"


def deep(depth: int, value: Any = None) -> list:
    for _ in range(depth):
        value = [value]
    return value


VALUES = {
    "question": (
        *((value, TEXT) for value in (5, True, [], ["a"], {}, {"a": 1}, NAN, deep(300))),
        *((value, "The question is empty: type one") for value in (None, "", " \n ")),
        *((value, "holds control characters") for value in ("a\0b", "\ud800", "\x1b[2J")),
        ("x" * 20_001, "at most 20,000 are taken: shorten it"),
        ("x</s>USER: hi", "one of the model's special tokens"),
    ),
    "routing": (
        *((value, TEXT) for value in (5, [], {"path": "a"}, NAN)),
        ("late", "choose one of"),
        ("q" * 3000, "send at most 40 characters"),
    ),
    "longest": (
        *((value, LONGEST) for value in (None, "6", [], {}, True, -1, 0, 257, 10**400, deep(300))),
        *((value, LONGEST) for value in (NAN, INFINITE, -INFINITE)),
        (2.5, "send a whole number"),
    ),
    "temperature": (
        *((value, TEMPERATURE) for value in (None, "hot", [], {}, False, -1, 3, NAN, INFINITE, -INFINITE)),
        (1e-39, "or 0.05 to 2.0"),
    ),
    "pictures": (
        *((value, FILES) for value in ("a.png", 5, {}, True, NAN, FILE)),
        *(([value], NO_FILE) for value in (None, 5, "a.png", [], {}, True, FILE, deep(300), {"image": None})),
        *(([{**FILE, "path": value}], NO_FILE) for value in (None, 5, "", [], {}, True)),
        *(([{**FILE, "path": value}], NO_UPLOAD) for value in ("/etc/passwd", "app.py", "../a", ".", "/")),
        *(([{**FILE, "path": value}], NO_UPLOAD) for value in ("a\0b", "x" * 5000, "file:///etc/passwd")),
        ([{"path": "/etc/passwd"}], NO_UPLOAD),
        ([{**FILE, "path": "UPLOADS/../../etc/passwd"}], NO_UPLOAD),
        ([{**FILE, "path": "UPLOADS/."}], NO_UPLOAD),
        ([{**FILE, "path": "UPLOADS/gone.png"}], "no longer here: upload it again"),
        ([{**FILE, "path": "http://127.0.0.1:1/a.png"}], "is a web address: upload"),
        ([{**FILE, "path": "PICTURE"}] * 9, "at most 8: remove some"),
        ([{**FILE, "path": "PICTURE"}] * 1000, "send at most 64"),
        ([{"path": "PICTURE", "meta": deep(300)}], WRONG_FORM),
        ([{"path": "PICTURE", "meta": 5}], WRONG_FORM),
        ([{"path": "PICTURE", "meta": {}}], WRONG_FORM),
        ([{**FILE, "path": "PICTURE", "size": "much"}], WRONG_FORM),
    ),
}
BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"data": ["\xff"]}',
    "a list": b"[1]",
    "no data": b"{}",
    "data null": b'{"data": null}',
    "data a text": b'{"data": "abc"}',
    "data by name": b'{"data": {"question": "a"}}',
    "deep data": b'{"data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep value": b'{"data": [' + b"[" * 5_000 + b"]" * 5_000 + b', null, "none", 4, 0]}',
    "endless number": b'{"data": ["a", null, "none", 1' + b"0" * 5_000 + b", 0]}",
    "session a number": b'{"data": [], "session_hash": 5}',
}
ADDRESSES = ("call/nothing", "call/predict", "call/v2/nothing", "call/v2/ask", "run/nothing", "queue/join")
INPUTS = {"question": "What colour is the star?", "pictures": None, "routing": "none", "longest": 4, "temperature": 0}


@pytest.fixture(scope="module")
def api(answerer) -> Iterator[httpx.Client]:
    with own_folder() as folder:
        app = build(answerer, "About.", write_examples(folder))
        launch(app, host="127.0.0.1", port=None, prevent_thread_lock=True, quiet=True)
        with httpx.Client(base_url=f"{app.local_url}gradio_api/", timeout=60) as client:
            yield client
        app.close()


@pytest.fixture(scope="module")
def uploaded(api, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    make_scene("test", 0, 6).draw().save(path)
    return api.post("upload", files={"files": ("scene.png", path.read_bytes())}).json()[0]


def post(api: httpx.Client, address: str, body: bytes) -> httpx.Response:
    return api.post(address, content=body, headers={"Content-Type": "application/json"})


def call(api: httpx.Client, name: str, data: list) -> str:
    """What the server streams for a call; NaN is sent, too."""
    event = post(api, f"call/{name}", json.dumps({"data": data}).encode()).json()["event_id"]
    return api.get(f"call/{name}/{event}").text


def fault(said: str) -> str:
    """The sentence with which a call has failed."""
    assert "event: error" in said and "event: complete" not in said, said
    found = json.loads(said.partition("data: ")[2])["error"]
    assert found and len(found) < 300 and "root:" not in found and "Traceback" not in found and "\n" not in found
    return found


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [(name, value, message) for name, rows in VALUES.items() for value, message in rows],
    ids=lambda value: repr(value)[:40],
)
def test_a_wrong_value_is_answered_with_a_sentence(api, uploaded, name, value, message):
    sent = json.dumps([*{**INPUTS, name: value}.values()])
    data = json.loads(sent.replace("UPLOADS", get_upload_folder()).replace("PICTURE", uploaded))
    assert message in fault(call(api, "ask", data))
    if name in ("question", "pictures", "longest"):
        assert message in fault(call(api, "compare", [*data[:2], data[3]]))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        *((value, 'send {"text": ..., "files": [...]}') for value in (5, "a", [], True, deep(300))),
        *(({"text": value, "files": []}, TEXT) for value in (5, [], {}, NAN, deep(300))),
        *(({"text": "a", "files": value}, FILES) for value in ("a.png", 5, {}, FILE)),
        *(({"text": "a", "files": [value]}, NO_FILE) for value in (None, 5, "a.png", {}, FILE)),
        ({"text": "a", "files": [{**FILE, "path": "/etc/passwd"}]}, NO_UPLOAD),
        ({"text": "a", "files": [{**FILE, "path": "http://127.0.0.1:1/a.png"}]}, "is a web address: upload"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_box_of_a_wrong_form_is_answered_with_a_sentence(value, message):
    box = gr.MultimodalTextbox(label="Question", render=False)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_call([box], [value])
    check_call([box], [None])
    check_call([box], [{"text": "a", "files": []}])


@pytest.mark.parametrize("name, inputs", [("ask", 5), ("compare", 3), ("look_inside", 2)])
@pytest.mark.parametrize("values", [0, 1, 4, 6, 1000])
def test_a_call_with_too_few_or_too_many_values_is_told_what_to_send(api, name, inputs, values):
    found = fault(call(api, name, ([*INPUTS.values()] * 200)[:values]))
    assert found.startswith(f"This call has {values} values and needs {inputs}: send question, pictures")


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("address", ["call/ask", "queue/join"])
def test_a_body_of_another_form_is_answered_with_a_sentence(api, address, body):
    reply = post(api, address, body)
    assert (reply.status_code, reply.json()) == (400, {"error": UNREADABLE})


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_call_that_there_is_not_is_answered_with_a_sentence(api, address):
    body = {"data": [*INPUTS.values()], "session_hash": "a", "fn_index": 999, "unknown": 1}
    reply = post(api, address, json.dumps(body).encode())
    assert (reply.status_code, reply.json()) == (400, {"error": UNREADABLE})


def test_no_call_goes_past_the_queue_and_none_is_larger_than_a_call(api):
    body = json.dumps({"data": [*INPUTS.values()]}).encode()
    assert "Please join the queue" in post(api, "run/ask", body).json()["detail"]
    reply = post(api, "call/ask", body + b" " * 2**21)
    assert reply.status_code == 413 and "send at most 2,097,152, and pictures as uploads" in reply.json()["error"]
    chunks = api.post("call/ask", content=iter([body]))
    assert chunks.status_code == 411 and "send it with a Content-Length" in chunks.json()["error"]


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError, OSError, RecursionError, MemoryError])
def test_an_error_of_the_model_is_a_sentence_for_the_caller_and_a_traceback_in_the_log(
    api, uploaded, answerer, monkeypatch, capfd, error
):
    def fail(*_, **__):
        raise error("a secret")

    picture = [{**FILE, "path": uploaded}]
    with monkeypatch.context() as patch:
        patch.setattr(answerer.model, "generate", fail)
        patch.setattr("dpvr.inference.chat.text_to_image_attention", fail)
        assert fault(call(api, "ask", [*INPUTS.values()])) == FAILED
        assert fault(call(api, "compare", ["A?", None, 4])) == FAILED
        assert fault(call(api, "look_inside", ["A?", picture])) == FAILED
        assert len(re.findall("^[a-zA-Z.]*Error: .*a secret", capfd.readouterr().err, re.MULTILINE)) == 3
    assert "event: complete" in call(api, "ask", [*INPUTS.values()])
    assert '"heat"' in call(api, "look_inside", ["A?", picture])
