"""A small Hub on loopback: enough of its API for `huggingface_hub` to make, fill, list and read model repositories.

    create_repo, whoami, auth-check, preupload, LFS batch and upload, commit, model info, tree, resolve

It keeps everything in memory. A path of `broken` answers 403 until it is taken out again.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"
LARGE = 4096  # bytes from which a file goes by LFS


class Hub:
    """The server; `commits` holds for each repository the files after every commit, the newest last."""

    def __init__(self) -> None:
        self.clear()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def clear(self) -> None:
        """Forget all repositories; names of commits never come again."""
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}  # by sha256
        self.broken: set[str] = set()  # parts of paths
        self.age = secrets.token_hex(8)

    def add(self, repo_id: str, folder: str | Path) -> None:
        """Put a folder's files into a new repository."""
        self.commits[repo_id] = [{path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}]

    def files(self, repo_id: str) -> dict[str, bytes]:
        return self.commits[repo_id][-1] if self.commits[repo_id] else {}

    def revision(self, repo_id: str) -> str:
        """The name of the newest commit."""
        return hashlib.sha1(f"{self.age}/{repo_id}/{len(self.commits[repo_id])}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: object = None, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = unquote(urlsplit(self.path).path)
        if any(part in path for part in self.hub.broken):
            return self.answer({"error": "storage is full"}, 403)
        writes = self.command in ("POST", "PUT") and not path.startswith("/lfs/")
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, path):
                return method(self, body, *match.groups())
        return self.answer({"error": f"no such path {path}"}, 404, X_Error_Code="EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def known(self, repo_id: str) -> bool:
        if repo_id not in self.hub.commits:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return repo_id in self.hub.commits

    def whoami(self, body: bytes) -> None:
        self.answer({"type": "user", "name": "me", "orgs": []})

    def may_write(self, body: bytes, repo_id: str) -> None:
        right = self.headers.get("Authorization") == f"Bearer {TOKEN}" and repo_id.startswith("me/")
        self.answer({} if right else {"error": "no write access"}, 200 if right else 403)

    def validate(self, body: bytes) -> None:
        good = json.loads(body)["content"].startswith("---\n")
        self.answer({"errors": [] if good else [{"message": "no metadata"}], "warnings": []}, 200 if good else 400)

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if not repo_id.startswith("me/"):
            return self.answer({"error": "not your namespace"}, 403)
        if repo_id in self.hub.commits:
            return self.answer({"error": "You already created this", "url": f"{self.hub.url}/{repo_id}"}, 409)
        self.hub.commits[repo_id] = []
        if wanted.get("private") or wanted.get("visibility") == "private":  # by the version of the client
            self.hub.private.add(repo_id)
        return self.answer({"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def preupload(self, body: bytes, repo_id: str) -> None:
        if self.known(repo_id):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})

    def large_files(self, body: bytes, repo_id: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append(wanted if wanted["oid"] in self.hub.large else {**wanted, "actions": upload})
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        right = hashlib.sha256(body).hexdigest() == oid
        if right:
            self.hub.large[oid] = body
        self.answer({}, 200 if right else 400)

    def commit(self, body: bytes, repo_id: str) -> None:
        if not self.known(repo_id):
            return None
        files = dict(self.hub.files(repo_id))
        for line in body.decode().splitlines():
            change = json.loads(line)
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif change["key"] == "deletedFile":
                del files[value["path"]]
            elif change["key"] != "header":
                return self.answer({"error": f"unknown {change['key']}"}, 400)
        self.hub.commits[repo_id].append(files)
        revision = self.hub.revision(repo_id)
        url = f"{self.hub.url}/{repo_id}/commit/{revision}"
        return self.answer({"success": True, "commitOid": revision, "commitUrl": url, "hookOutput": ""})

    def info(self, body: bytes, repo_id: str) -> None:
        if self.known(repo_id):
            siblings = [{"rfilename": path} for path in self.hub.files(repo_id)]
            revision = self.hub.revision(repo_id)
            self.answer({"id": repo_id, "modelId": repo_id, "sha": revision, "siblings": siblings, "tags": []})

    def tree(self, body: bytes, repo_id: str, folder: str | None) -> None:
        if self.known(repo_id):
            inside = f"{folder}/" if folder else ""
            files = {path: data for path, data in self.hub.files(repo_id).items() if path.startswith(inside)}
            if inside and not files:
                return self.answer({"error": "no such folder"}, 404, X_Error_Code="EntryNotFound")
            oids = {path: hashlib.sha1(data).hexdigest() for path, data in files.items()}
            return self.answer(
                [{"type": "file", "path": path, "size": len(files[path]), "oid": oids[path]} for path in files]
            )
        return None

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        if not self.known(repo_id):
            return None
        commit = {"X_Repo_Commit": self.hub.revision(repo_id)}
        if path not in self.hub.files(repo_id):
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", **commit)
        content = self.hub.files(repo_id)[path]
        return self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', **commit)


REPOSITORY = r"([\w.-]+/[\w.-]+)"
KIND = "(?:models|spaces)"
ROUTES = (
    (r"/api/whoami-v2", Handler.whoami),
    (r"/api/validate-yaml", Handler.validate),
    (r"/api/repos/create", Handler.create),
    (rf"/api/{KIND}/{REPOSITORY}/auth-check/write", Handler.may_write),
    (rf"/api/{KIND}/{REPOSITORY}/preupload/[^/]+", Handler.preupload),
    (rf"/api/{KIND}/{REPOSITORY}/commit/[^/]+", Handler.commit),
    (rf"/api/{KIND}/{REPOSITORY}/tree/[^/]+(?:/(.+))?", Handler.tree),
    (rf"/api/{KIND}/{REPOSITORY}(?:/revision/[^/]+)?", Handler.info),
    (rf"/(?:spaces/)?{REPOSITORY}\.git/info/lfs/objects/batch", Handler.large_files),
    (r"/lfs/(\w+)", Handler.store),
    (rf"/{REPOSITORY}/resolve/([^/]+)/(.+)", Handler.resolve),
)
