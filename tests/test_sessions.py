"""sessions.py: a few chats at once; `python -m tests.sessions` is the long version."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

import app
from dpvr.inference.chat import Answerer
from dpvr.inference.loading import load
from dpvr.inference.page import build, launch
from dpvr.inference.uploads import own_folder
from tests import sessions
from tests.sessions import Session, compare, main, parse_args


@contextmanager
def served_here(command: list[str], *_: Any) -> Iterator[SimpleNamespace]:
    """What the command would serve, without the start of another process."""
    args = app.parse_args(command[2:])
    with own_folder():
        served = build(Answerer(*load(args.model)), "About.", [])
        launch(served, args.host, args.port, prevent_thread_lock=True, quiet=True)
        yield SimpleNamespace(pid=os.getpid())
        served.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory in use from Linux's /proc")
def test_chats_at_the_same_time_get_what_the_model_alone_answers(random_mini, tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "running", served_here)
    output = tmp_path / "found.json"
    size = ["--sessions", "6", "--questions", "2", "--waves", "2"]
    main(parse_args([*size, "--model", random_mini, "--output", str(output)]))
    found = json.loads(output.read_text())["sessions"]
    assert (found["sessions"], found["answers"], found["different_chats"]) == (6, 24, 6)
    assert (found["wrong_answers"], found["crossed_chats"]) == (0, 0)
    assert [wave["answers"] for wave in found["waves"]] == [12, 12]
    assert all(0 < wave["resident_mib"] <= wave["resident_mib_peak"] for wave in found["waves"])


def test_a_wrong_answer_and_a_message_of_another_chat_are_found():
    asked = [Session((b"",), (("What?", "red"), ("Where?", "left"))), Session((b"",), (("Who?", "blue"),))]

    def chats(first: str = "red", picture: str = "0-0.png", question: str = "What?") -> list:
        early = [("picture", picture), ("user", question), ("assistant", first)]
        later = [*early, ("user", "Where?"), ("assistant", "left")]
        return [[early, later], [[("picture", "1-0.png"), ("user", "Who?"), ("assistant", "blue")]]]

    right = {"answers": 3, "wrong_answers": 0, "crossed_chats": 0}
    assert compare(asked, chats()) == right
    assert compare(asked, chats(first="blue")) == right | {"wrong_answers": 1}
    assert compare(asked, chats(picture="1-0.png")) == right | {"crossed_chats": 2}
    assert compare(asked, chats(question="Who?")) == right | {"crossed_chats": 2}
