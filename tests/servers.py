"""Servers that tests start as processes of their own."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(
    command: list[str], health: str, output: Path, cwd: Path, env: dict[str, str] | None = None, patience: float = 300
) -> Iterator[subprocess.Popen]:
    """Run `command` in `cwd`, its output in a file, and wait until the address `health` answers; end it afterwards.

    The test fails with what the server wrote if it has ended, or has not answered within `patience` seconds.
    """
    with output.open("w") as file:
        process = subprocess.Popen(
            command, cwd=cwd, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    try:
        deadline = time.monotonic() + patience
        while not _answers(health):
            if time.monotonic() > deadline or process.poll() is not None:
                wrote = output.read_text()[-3000:]
                pytest.fail(f"the server is not up (exit status {process.poll()}); it wrote:\n{wrote}")
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5).is_success
    except httpx.TransportError:
        return False
