"""How much may be uploaded: a share per client, an end for all together, and old files removed.

    POST .../upload   its length known  ->  within the client's share of the last hour  ->  room made  ->  Gradio
    POST, another     its length known  ->  no longer than a call is                                   ->  Gradio

Room is made by removing files: those older than an hour, then the oldest, until what comes fits in. The files that the
page itself shows, which were there before the first upload, stay.
"""

import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi.responses import JSONResponse

MIB = 2**20
MAX_CALL = 2 * MIB
MAX_PER_CLIENT = 200 * MIB
MAX_IN_ALL = 1024 * MIB
KEPT_SECONDS = 3600
FOLDER = "GRADIO_TEMP_DIR"  # where Gradio looks for the place of uploads


@contextmanager
def own_folder() -> Iterator[Path]:
    """Let uploads lie in a folder of this process alone, and remove it at the end."""
    before = os.environ.get(FOLDER)
    with tempfile.TemporaryDirectory(dir=before, prefix="dpvr-", ignore_cleanup_errors=True) as folder:
        os.environ[FOLDER] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop(FOLDER)
            if before is not None:
                os.environ[FOLDER] = before


class UploadLimits:
    """ASGI middleware in front of the app.

    Args:
        folder: of the uploads and of what is made from them; files that lie in it now are the page's own and stay.
    """

    def __init__(self, app: Any, folder: str | Path) -> None:
        self.app = app
        self.folder = Path(folder)
        self.own = {path for path, _ in self._files()}
        self.sent: dict[str, deque[tuple[float, int]]] = {}  # time and bytes of each client's uploads

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            try:
                status, fault = self._fault(scope)
            except OSError as error:
                status, fault = 507, f"The app cannot make room for uploads: {error.strerror}."
            if fault is not None:
                return await JSONResponse({"error": fault}, status_code=status)(scope, receive, send)
        await self.app(scope, receive, send)

    def _fault(self, scope: dict[str, Any]) -> tuple[int, str | None]:
        """What is wrong with the length of a request, and its status code."""
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        if not length.isdigit() or b"transfer-encoding" in headers:
            return 411, "This request does not say how long it is: send it with a Content-Length."
        if scope["path"].rstrip("/").endswith("/upload"):
            return self._fault_of_upload(scope["client"][0] if scope["client"] else "", int(length))
        if int(length) > MAX_CALL:
            return 413, f"This request has {int(length):,} bytes: send at most {MAX_CALL:,}, and pictures as uploads."
        return 200, None

    def _fault_of_upload(self, client: str, length: int) -> tuple[int, str | None]:
        self._forget()
        sent = self.sent.get(client, deque())
        if sum(size for _, size in sent) + length > MAX_PER_CLIENT:
            return 413, (
                f"More than {MAX_PER_CLIENT // MIB} MiB were uploaded from one address within an hour: try again "
                "later, or make the pictures smaller."
            )
        self._make_room(length)
        self.sent.setdefault(client, sent).append((time.time(), length))
        return 200, None

    def _forget(self) -> None:
        """Forget what was sent more than an hour ago."""
        since = time.time() - KEPT_SECONDS
        for client, sent in list(self.sent.items()):
            while sent and sent[0][0] < since:
                sent.popleft()
            if not sent:
                del self.sent[client]

    def _make_room(self, length: int) -> None:
        files = sorted(
            ((stat.st_mtime, stat.st_size, path) for path, stat in self._files() if path not in self.own), reverse=True
        )
        total = sum(size for _, size, _ in files)
        while files and (files[-1][0] < time.time() - KEPT_SECONDS or total + length > MAX_IN_ALL):
            _, size, path = files.pop()
            path.unlink(missing_ok=True)
            total -= size

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = Path(folder, name)
                try:
                    yield path, path.lstat()
                except FileNotFoundError:  # removed in the meantime
                    continue
