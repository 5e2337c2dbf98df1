"""A local stand-in of the hub's API: creates repositories, stores commits, serves files."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "0" * 40


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class FakeHub(ThreadingHTTPServer):
    """Repositories by name: whether they are private, and their files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.refuses = False
        self.is_read_only = False
        self.requests: list[str] = []
        """Paths of what was read, in order."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refuses:
            self._reply({"error": "Invalid username or password."}, 401)
            return
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            fields = json.loads(body)
            name = f"{fields['organization']}/{fields['name']}"
            self.server.private[name] = fields.get("private", fields.get("visibility") == "private")
            self.server.files.setdefault(name, {})
            self._reply({"url": f"{self.server.endpoint}/{name}", "name": name})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            self._reply({"files": files})
        elif "/commit/" in path:
            name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.files[name][value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.endpoint}/{name}/commit/{COMMIT}"
            self._reply({"commitUrl": url, "commitOid": COMMIT, "hookOutput": "", "success": True})
        else:
            self._reply({})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(path)
        if path.endswith("/auth-check/write"):
            self._reply({}, 403 if self.server.is_read_only else 200)
            return
        owner, name, kind, _, file = [*path.removeprefix("/api/models/").split("/"), *[""] * 4][:5]
        if kind not in ("tree", "revision"):
            owner, name, kind, _, file = [*path.removeprefix("/").split("/"), *[""] * 4][:5]
        files = self.server.files.get(f"{owner}/{name}")
        if files is None:
            self._reply({"error": "not found"}, 404)
        elif kind == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": _etag(content)}
                for path, content in files.items()
            ]
            self._reply(entries)
        elif kind == "resolve":
            self._send_file(files[file])
        else:
            self._reply({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []})

    def do_HEAD(self) -> None:
        _, owner, name, _, _, file = self.path.split("/")
        self._send_file(self.server.files[f"{owner}/{name}"][file], is_head=True)

    def _send_file(self, content: bytes, *, is_head: bool = False) -> None:
        self.send_response(200)
        self.send_header("ETag", _etag(content))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not is_head:
            self.wfile.write(content)

    def _reply(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """The server, for the block."""
    hub = FakeHub()
    thread = Thread(target=hub.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
