"""A hub on this machine: as much of its interface as an upload uses."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_" + "x" * 34


@dataclass
class Hub:
    """What it was asked, and the repositories that it has: files by branch."""

    address: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by sha256
    requests: list[tuple[str, str]] = field(default_factory=list)
    refuse: dict[str, int] = field(default_factory=dict)  # a part of a path, and the answer to it

    def add(self, name: str, *, private: bool = True, **files: bytes) -> None:
        self.repositories[name], self.private[name] = {"main": dict(files)}, private

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and content."""
        self.requests.append((method, path))
        for part, status in self.refuse.items():
            if part in path:
                return status, {"error": "no, says the hub"}
        if path.startswith("/lfs/"):
            self.large[path.removeprefix("/lfs/")] = body
            return 200, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.add(name, private=bool(asked.get("private")) or asked.get("visibility") == "private")
            return 200, {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return 200, {"objects": [self._place(one) for one in json.loads(body)["objects"]]}
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|branch|preupload|commit)/(.+))?", path)
        assert found is not None, f"{method} {path}"
        return self._of_model(found[1], found[2], unquote(found[3] or "main"), body)

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.address}/lfs/{wanted['oid']}"
        return wanted | {"actions": {"upload": {"href": href}}}

    def _of_model(self, name: str, what: str | None, branch: str, body: bytes) -> tuple[int, Any]:
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        branches = self.repositories[name]
        if what in (None, "revision"):
            files = [{"rfilename": file} for file in branches[branch]]
            return 200, {"id": name, "private": self.private[name], "siblings": files, "sha": "0" * 40}
        if what == "branch":
            branches.setdefault(branch, dict(branches["main"]))
            return 200, {}
        if what == "preupload":
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in json.loads(body)["files"]
            ]
            return 200, {"files": modes}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                branches[branch][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                branches[branch][value["path"]] = self.large[value["oid"]]
        return 200, {"commitUrl": f"{self.address}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40}


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers while the block runs; who has not TOKEN is not let in."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}" or path.startswith("/lfs/")
            status, content = hub.answer(self.command, path, body) if authorised else (401, {"error": "who are you?"})
            data = json.dumps(content).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            if status == 401:
                self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _reply  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
