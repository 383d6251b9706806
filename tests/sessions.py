"""Many chats with the app at the same time, each about its own picture; every answer is compared with the model alone.

    python -m tests.sessions --sessions 200 --questions 1

    python app.py, a process of its own  <--  upload, question, answer, the next question ...   all sessions at once
                                              and again, in equal waves of new chats
    the same model in this process       -->  what each session must be answered

A session asks as the page does, and its chat is kept by the server. Pictures and questions are MiniBench's. What the
page would show at the end of each answer is compared: pictures, questions and answers of the whole chat. The memory is
the resident set of the app's process, after a few sessions to warm up and after each wave. As many chats are kept as
a wave of 200 holds, so the first wave fills the store, and in later ones memory that grows is a leak. Written to a
section of results/reliability.json.
"""

import asyncio
import html
import io
import json
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from PIL import Image
from tqdm import tqdm

from dpvr.command_line import Parser, at_least, run
from dpvr.inference.chat import Answerer, Turn
from dpvr.inference.loading import load
from dpvr.record import publish_section, run_record
from minibench.data import MiniBench
from tests.servers import free_port, running

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 16  # tokens of an answer
WARM_UP = 8  # sessions
PATIENCE = 900  # seconds


class Session(NamedTuple):
    """Pictures as PNG files, and questions with what the model alone answers in a chat of them all."""

    pictures: tuple[bytes, ...]
    turns: tuple[tuple[str, str], ...]


Shown = list[
    tuple[str, str]
]  # a chat's messages in order: ("picture", its file's name), ("user" or "assistant", text)


def parse_args(argv: list[str] | None = None) -> Any:
    parser = Parser(__doc__)
    parser.add_argument("--sessions", type=at_least(1), default=200)
    parser.add_argument("--questions", type=at_least(1), default=3, help="of each session")
    parser.add_argument("--waves", type=at_least(1), default=4, help="of all sessions at once, one after the other")
    parser.add_argument("--section", default="sessions", help="of the file that the record is written to")
    parser.add_argument("--model", default=str(ROOT), help="what the app serves; default: dpvr-mini")
    parser.add_argument("--output", default=str(ROOT / "results" / "reliability.json"))
    return parser.parse_args(argv)


def main(args: Any) -> dict[str, Any]:
    """Returns the section.

    Raises:
        ValueError: if an answer is not what the model alone gives, or stands in another chat.
    """
    sessions = make_sessions(args.model, args.sessions, args.questions)
    warm_up = (sessions * WARM_UP)[:WARM_UP]
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "app.py", "--model", args.model, "--host", "127.0.0.1", "--port", str(port)]
        with running(command, url, Path(folder) / "output.txt", ROOT) as process:
            asyncio.run(hold(url, warm_up))
            before = resident(process.pid)
            waves = [hold_wave(url, sessions, process.pid) for _ in range(args.waves)]
    found = {
        **run_record("-m tests.sessions"),
        "sessions": len(sessions),
        "questions_per_session": args.questions,
        **{name: sum(wave[name] for wave in waves) for name in ("answers", "wrong_answers", "crossed_chats")},
        "different_chats": len({session.turns for session in sessions}),
        "seconds": round(sum(wave["seconds"] for wave in waves), 1),
        "resident_mib_before": before["now"],
        "resident_mib_after": waves[-1]["resident_mib"],
        "resident_mib_peak": waves[-1]["resident_mib_peak"],
        "waves": waves,
    }
    publish_section(args.section, found, args.output)
    if found["wrong_answers"] or found["crossed_chats"]:
        raise ValueError(
            f"Of {found['answers']} answers {found['wrong_answers']} are not what the model alone gives, and "
            f"{found['crossed_chats']} stand in another chat than the session's own."
        )
    print(f"{found['answers']} answers in {len(sessions)} sessions at once, each as the model alone gives it.")
    return found


def hold_wave(url: str, sessions: Sequence[Session], pid: int) -> dict[str, Any]:
    """Hold all sessions at once; return what was answered, in how long, and the memory of the app's process then."""
    begun = time.perf_counter()
    chats = asyncio.run(hold(url, sessions))
    seconds = time.perf_counter() - begun
    memory = resident(pid)
    return {
        **compare(sessions, chats),
        "seconds": round(seconds, 1),
        "resident_mib": memory["now"],
        "resident_mib_peak": memory["peak"],
    }


def make_sessions(model: str, count: int, questions: int) -> list[Session]:
    """Sessions about MiniBench's pictures, with the answers that the model gives to each alone."""
    answerer = Answerer(*load(model))
    rows = MiniBench("test", count, questions, seed=1)
    return [_make_session(answerer, rows[index], questions) for index in tqdm(range(count), desc="the model alone")]


def _make_session(answerer: Answerer, row: dict[str, Any], questions: int) -> Session:
    asked = [part["text"] for message in row["messages"][::2] for part in message["content"] if part["type"] == "text"]
    turns: list[Turn] = []
    for question in asked[:questions]:
        turn = Turn(question, () if turns else tuple(row["images"]))
        answer = answerer.answer([*turns, turn], max_new_tokens=LONGEST).text
        turns.append(replace(turn, answer=answer))
    return Session(tuple(map(to_png, row["images"])), tuple((turn.question, turn.answer) for turn in turns))


def to_png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


async def hold(url: str, sessions: Sequence[Session]) -> list[list[Shown]]:
    """Hold all sessions at once; returns for each what its page shows after each of its answers."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # which the server may close meanwhile
    async with httpx.AsyncClient(base_url=f"{url}/gradio_api/", timeout=PATIENCE, limits=limits) as client:
        config = page_of((await client.get(f"{url}/config")).json())
        progress = tqdm(
            total=sum(len(session.turns) for session in sessions), desc=f"{len(sessions)} sessions at once"
        )
        chats = [_chat(client, config, index, session, progress) for index, session in enumerate(sessions)]
        return await asyncio.gather(*chats)


async def _chat(
    client: httpx.AsyncClient, config: dict[str, Any], index: int, session: Session, progress: tqdm
) -> list[Shown]:
    files = [("files", (name, data)) for name, data in zip(names(index, session), session.pictures, strict=True)]
    paths = (await client.post("upload", files=files)).raise_for_status().json()
    pictures = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in paths]
    key, shown = {"session_hash": f"{index}-{uuid.uuid4().hex}"}, []
    for question, _ in session.turns:
        box = {"text": question, "files": [] if shown else pictures}
        call = {"data": [box, None, config["own"], LONGEST, 0], "fn_index": config["ask"], **key}
        (await client.post("queue/join", json=call)).raise_for_status()
        async with client.stream("GET", "queue/data", params=key) as events:
            async for line in events.aiter_lines():
                if '"msg":"process_completed"' in line:
                    shown.append(_shown(json.loads(line.removeprefix("data:"))))
                elif '"msg":"close_stream"' in line:  # whoever leaves before keeps the app waiting for him
                    break
        progress.update()
    return shown


def page_of(config: dict[str, Any]) -> dict[str, Any]:
    """Of an app's configuration: the number of the call with which its page asks, and the method it opens with."""
    ask = next(one["id"] for one in config["dependencies"] if one["api_name"] == "ask_1")  # "ask" is /ask
    own = next(one["props"]["value"] for one in config["components"] if one["type"] == "radio")
    return {"ask": ask, "own": own}


def _shown(message: dict[str, Any]) -> Shown:
    """The chat in the message with which an answer ends."""
    if not message["success"]:
        raise ValueError(f"The app has failed: {message['output']}")
    found = []
    for said in message["output"]["data"][0]:
        for part in said["content"]:
            if part["type"] == "component" and said["role"] == "user":
                found += [("picture", name) for name in re.findall(r"src='[^']*?([\w.-]+)'", part["value"])]
            elif part["type"] == "text":
                found.append((said["role"], html.unescape(part["text"])))
    return found


def names(index: int, session: Session) -> list[str]:
    """The names of a session's pictures, which no other session's have."""
    return [f"{index}-{number}.png" for number in range(len(session.pictures))]


def compare(sessions: Sequence[Session], chats: Sequence[Sequence[Shown]]) -> dict[str, int]:
    """Count the answers, those that are not what the model alone gives, and those that stand in another chat."""
    counts = {"answers": 0, "wrong_answers": 0, "crossed_chats": 0}
    for index, (session, shown) in enumerate(zip(sessions, chats, strict=True)):
        expected: Shown = [("picture", name) for name in names(index, session)]
        for (question, answer), found in zip(session.turns, shown, strict=True):
            asked = [*expected, ("user", question)]
            expected = [*asked, ("assistant", answer)]
            counts["answers"] += 1
            counts["wrong_answers"] += found[-1] != expected[-1]
            counts["crossed_chats"] += found[:-1] != asked
            expected[-1] = found[-1]  # a wrong answer is counted once
    return counts


def resident(pid: int) -> dict[str, float]:
    """The resident set of a process now and at most, MiB."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    sizes = dict(line.split(":", 1) for line in lines)
    return {name: round(int(sizes[key].split()[0]) / 1024, 1) for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


if __name__ == "__main__":
    run(lambda: main(parse_args()))
