"""`vllm serve` under a DPVR routing and as vanilla, side by side: many clients at once, and requests that fail.

clients --prompts in another order--> routed server, vanilla server      answers equal those of transformers,
                                                                          also those that are streamed
        --a broken picture, ...--> routed server                         each is named; the others are answered
"""

import argparse
import base64
import io
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from typing import Any

from PIL import Image

from dpvr.data.prompts import Conversation

PATIENCE = 1200  # seconds that a server may take to start
MOST_PICTURES, MAX_LENGTH = 4, 1024
MEMORY = 0.3  # of the machine's, that must be free: vLLM wants nearly all by default


def check_servers(
    args: argparse.Namespace, routing: str, asked: list[Conversation], expected: list[list[int]]
) -> dict[str, Any]:
    """Ask a routed server all conversations, while a vanilla one is asked, too, and while some requests fail.

    Args:
        expected: the tokens of the routed answers.
    """
    with ExitStack() as stack:
        starting = [stack.enter_context(server(args.model, name)) for name in (routing, "none")]
        routed, vanilla = (wait_for(process, address) for process, address in starting)
        with ThreadPoolExecutor(2 * args.clients + 4) as clients:
            order = random.Random(0).sample(range(len(asked)), len(asked))
            answers = {at: clients.submit(ask, routed, asked[at], args.new_tokens) for at in order}
            streamed = {at: clients.submit(ask_streamed, routed, asked[at], args.new_tokens) for at in order[::3]}
            beside = [clients.submit(ask, vanilla, asked[at], args.new_tokens) for at in order[::4]]
            faults = {name: clients.submit(send, routed, body) for name, body in faulty_requests().items()}
            killed = clients.submit(kill, routed, asked[-1])
            equal = sum(answers[at].result() == expected[at] for at in order)
            return {
                "equal": equal,
                "of": len(asked),
                "streamed_equal": sum(each.result() == expected[at] for at, each in streamed.items()),
                "streamed_of": len(streamed),
                "vanilla_beside": sum(len(each.result()) > 0 for each in beside),
                "killed_after_tokens": killed.result(),
                "faults": {name: fault.result() for name, fault in faults.items()},
                "alive_afterwards": ask(routed, asked[0], args.new_tokens) == expected[0],
            }


@contextmanager
def server(model: str, routing: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server of a DPVR repository that is starting, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # `vllm serve` asks for the version of a package "vllm", which vLLM's build for CPUs is not called
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--hf-overrides", json.dumps({"routing": routing}), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", str(MAX_LENGTH), "--limit-mm-per-prompt", json.dumps({"image": MOST_PICTURES})]
    command += ["--served-model-name", "dpvr", "--host", "127.0.0.1", "--gpu-memory-utilization", str(MEMORY)]
    process = subprocess.Popen(command, env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, stdout=sys.stderr)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def wait_for(process: subprocess.Popen, address: str) -> str:
    """The address of a server, once it answers.

    Raises:
        ValueError: if it has ended, or does not answer in time.
    """
    deadline = time.monotonic() + PATIENCE
    while not _is_up(address):
        if process.poll() is not None or time.monotonic() > deadline:
            raise ValueError(f"The server did not start (exit status {process.poll()}): its output says why.")
        time.sleep(1)
    return address


def _is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def ask(address: str, conversation: Conversation, new_tokens: int) -> list[int]:
    """The tokens of a greedy answer, without the one that ends it."""
    body = request_body(conversation) | {"max_tokens": new_tokens, "return_token_ids": True}
    status, answer = send(address, body, parsed=True)
    if status != 200:
        raise ValueError(f"The server answered a good request with status {status}: {answer}")
    (choice,) = answer["choices"]
    return _without_end(choice["token_ids"], choice["finish_reason"])


def ask_streamed(address: str, conversation: Conversation, new_tokens: int) -> list[int]:
    """The same, of an answer that comes in parts."""
    body = request_body(conversation) | {"max_tokens": new_tokens, "return_token_ids": True, "stream": True}
    tokens, reason = [], None
    for chunk in stream(address, body):
        for choice in chunk["choices"]:
            tokens += choice.get("token_ids") or []
            reason = choice["finish_reason"] or reason
    return _without_end(tokens, reason)


def _without_end(tokens: list[int], reason: str | None) -> list[int]:
    return tokens[:-1] if reason == "stop" else tokens


def request_body(conversation: Conversation) -> dict[str, Any]:
    """The body of a chat completion, its pictures as data URLs."""
    pictures = iter(conversation.pictures)
    messages = []
    for message in conversation.messages:
        parts = [picture_part(png(next(pictures))) if part["type"] == "image" else part for part in message["content"]]
        messages.append({**message, "content": parts})
    # dpvr-mini's template leaves the begin token to the tokenizer, which vLLM tells to add none unless it is asked to
    return {"model": "dpvr", "messages": messages, "temperature": 0, "add_special_tokens": True}


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def picture_part(data: bytes) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def send(address: str, body: dict[str, Any], parsed: bool = False) -> tuple[int, Any]:
    """The status and the answer to a request; what an error says is shortened."""
    try:
        with urllib.request.urlopen(_request(address, body), timeout=PATIENCE) as answer:
            found = json.load(answer)
            return answer.status, found if parsed else "answered"
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"][:200]


def _request(address: str, body: dict[str, Any]) -> urllib.request.Request:
    headers = {"Content-Type": "application/json"}
    return urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)


def kill(address: str, conversation: Conversation) -> int:
    """Start a long streamed answer and hang up after a few tokens; how many came."""
    body = request_body(conversation) | {"max_tokens": 500, "stream": True, "ignore_eos": True}
    with closing(stream(address, body)) as chunks:
        return sum(1 for _ in islice(chunks, 5))


def stream(address: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parts of a streamed answer, as they come; the connection ends with the iteration."""
    with urllib.request.urlopen(_request(address, body), timeout=PATIENCE) as answer:
        for line in answer:
            data = line.removeprefix(b"data: ").strip()
            if line.startswith(b"data: ") and data != b"[DONE]":
                yield json.loads(data)


def faulty_requests() -> dict[str, dict[str, Any]]:
    """Requests that cannot be answered, by what is wrong."""
    question = {"type": "text", "text": "Is there a red circle?"}
    good = picture_part(png(Image.new("RGB", (96, 96))))
    contents = {
        "a broken picture": [picture_part(b"no picture"), question],
        "a prompt that is too long": [{"type": "text", "text": "Is there a red circle? " * 1000}],
        "too many pictures": [*[good] * (MOST_PICTURES + 1), question],
        "a picture's mark in the text": [{"type": "text", "text": "What is <image> here?"}],
        "a picture's mark in the text, and a picture": [{"type": "text", "text": "What is <image> here?"}, good],
    }
    return {
        name: {"model": "dpvr", "messages": [{"role": "user", "content": content}], "max_tokens": 4}
        for name, content in contents.items()
    }
