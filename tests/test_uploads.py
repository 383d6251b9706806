"""Uploads: a share per client, an end for all together, old files removed, the page's own kept."""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio.utils import get_upload_folder

from dpvr.inference import uploads
from dpvr.inference.chat import Answerer
from dpvr.inference.loading import load
from dpvr.inference.page import SCENES, build, launch, write_examples
from dpvr.inference.uploads import KEPT_SECONDS, MIB, UploadLimits, own_folder


async def passed_on(scope: dict[str, Any], receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


def status(limits: UploadLimits, size: int, client: str = "a", path: str = "/gradio_api/upload") -> int:
    """The status code for a request of `size` bytes."""
    found = []

    async def send(message: dict[str, Any]) -> None:
        found.append(message.get("status"))

    headers = [(b"content-length", str(size).encode())]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "client": (client, 1)}
    asyncio.run(limits(scope, None, send))
    return found[0]


def write(path: Path, size: int, age: float = 0) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_24_files_of_19_mb_are_more_than_one_client_may_upload_in_an_hour(tmp_path, monkeypatch):
    limits = UploadLimits(passed_on, tmp_path)
    codes = [status(limits, 19 * MIB) for _ in range(24)]
    assert codes == [200] * 10 + [413] * 14
    assert status(limits, 19 * MIB, client="b") == 200
    later = time.time() + KEPT_SECONDS + 1
    monkeypatch.setattr(time, "time", lambda: later)
    assert status(limits, 19 * MIB) == 200 and list(limits.sent) == ["a"]


def test_the_oldest_files_make_room_and_the_pages_own_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_IN_ALL", 1000)
    own = write(tmp_path / "own" / "example.png", 5000, age=2 * KEPT_SECONDS)
    limits = UploadLimits(passed_on, tmp_path)
    files = [write(tmp_path / f"{index}" / "a.png", 300, age=60 * (3 - index)) for index in range(3)]
    half = write(tmp_path / "tmpabc", 50, age=KEPT_SECONDS + 1)  # of an upload that broke off
    assert status(limits, 100) == 200
    assert not half.exists() and all(file.exists() for file in files)
    assert status(limits, 400) == 200
    assert [file.exists() for file in files] == [False, True, True] and own.exists()


def test_another_request_is_as_large_as_a_call_at_most(tmp_path):
    limits = UploadLimits(passed_on, tmp_path)
    for path in ("/gradio_api/call/ask", "/gradio_api/component_server", "/gradio_api/process_recording"):
        assert status(limits, 3 * MIB, path=path) == 413
        assert status(limits, MIB, path=path) == 200


def test_a_full_disk_or_a_folder_that_is_not_ours_is_said(tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    limits = UploadLimits(passed_on, tmp_path)
    write(tmp_path / "a.png", 1, age=2 * KEPT_SECONDS)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert status(limits, 1) == 507


@pytest.fixture(scope="module")
def url(random_mini) -> Iterator[str]:
    with own_folder() as folder:
        app = build(Answerer(*load(random_mini)), "About.", write_examples(folder))
        launch(app, host="127.0.0.1", port=None, prevent_thread_lock=True, quiet=True)
        yield f"{app.local_url}gradio_api/"
        app.close()


def upload(url: str, size: int, name: str = "a.png") -> httpx.Response:
    return httpx.post(f"{url}upload", files={"files": (name, os.urandom(size))}, timeout=60)


def test_a_client_is_told_that_its_file_or_its_share_is_too_large(url, monkeypatch):
    assert upload(url, 21 * MIB).status_code == 413
    monkeypatch.setattr(uploads, "MAX_PER_CLIENT", 24 * MIB)
    assert upload(url, MIB).status_code == 200
    reply = upload(url, 2 * MIB)
    assert reply.status_code == 413 and "within an hour: try again later" in reply.json()["error"]


def test_what_the_server_keeps_stays_under_the_limit_in_all(url, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_IN_ALL", 3 * MIB)
    paths = [Path(upload(url, MIB, f"{index}.png").json()[0]) for index in range(6)]
    assert [path.exists() for path in paths] == [False] * 4 + [True] * 2
    assert paths[0].is_relative_to(get_upload_folder())
    examples = {index for indices, _ in SCENES for index in indices}
    assert len(list(Path(get_upload_folder()).rglob("example-*.png"))) == len(examples)


def test_the_folder_of_uploads_is_the_processs_own_and_goes_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with own_folder() as folder:
        assert Path(get_upload_folder()) == folder and folder.parent == tmp_path
    assert get_upload_folder() == str(tmp_path) and not folder.exists()
