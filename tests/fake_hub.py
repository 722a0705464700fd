"""A hub on loopback: repositories in memory, as much of its protocol as pushing and loading need."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REVISION = "0123456789012345678901234567890123456789"


@dataclass
class Hub:
    """Files by repository (datasets are called ``datasets/owner/name``), and what was asked."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(
        default_factory=list
    )  # method, path, authorization
    fails_for: str = ""  # a repository that takes no commit
    damages: dict[str, str] = field(default_factory=dict)  # repository: file that arrives otherwise
    address: str = ""


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """Serve a hub until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._note()
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            self._create(json.loads(content))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/(models|datasets)/(.+?)/preupload/.+", path):
            asked = json.loads(content)["files"]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            self._json({"files": [{"path": f["path"], **mode} for f in asked]})
        elif match := re.fullmatch(r"/api/(models|datasets)/(.+?)/commit/.+", path):
            self._commit(_name(*match.groups()), content)
        elif match := re.fullmatch(r"/api/(models|datasets)/(.+?)/paths-info/.+", path):
            wanted = json.loads(content)["paths"]
            tree = self._tree(_name(*match.groups()))
            self._json([entry for entry in tree if entry["path"] in wanted])
        else:
            self._missing()

    def _note(self) -> None:
        authorization = self.headers.get("Authorization", "")
        self.state.requests.append((self.command, self.path, authorization))

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked.get("organization") or "me"
        name = asked["name"] if "/" in asked["name"] else f"{owner}/{asked['name']}"
        if name in self.state.files:
            self._json({"error": "You already created this model repo", "url": name}, 409)
            return
        self.state.files[name] = {".gitattributes": b""}
        self.state.private[name] = bool(
            asked.get("private") or asked.get("visibility") == "private"
        )
        self._json({"url": f"{self.state.address}/{name}", "id": name})

    def _commit(self, name: str, content: bytes) -> None:
        if name == self.state.fails_for:
            self._json({"error": "the disk of the hub is full"}, 507)
            return
        for line in content.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = base64.b64decode(entry["value"]["content"])
                path = entry["value"]["path"]
                damaged = path == self.state.damages.get(name)
                self.state.files[name][path] = value[::-1] if damaged else value
        url = f"{self.state.address}/{name}/commit/{REVISION}"
        self._json({"success": True, "commitOid": REVISION, "commitUrl": url, "hookOutput": ""})

    def _answer(self, *, body: bool) -> None:
        self._note()
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/(models|datasets)/(.+?)/tree/.+", path):
            self._json(self._tree(_name(*match.groups())))
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/revision/.+)?", path):
            name = _name(match[1], match[2])
            if name not in self.state.files:
                self._missing()
                return
            listed = [{"rfilename": file} for file in self.state.files[name]]
            facts = {
                "id": match[2],
                "sha": REVISION,
                "siblings": listed,
                "private": False,
                "tags": [],
            }
            self._json({**facts, "downloads": 0, "disabled": False, "gated": False})
        elif match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[3], body=body)
        else:
            self._missing()

    def _file(self, name: str, path: str, *, body: bool) -> None:
        content = self.state.files.get(name, {}).get(path)
        if content is None:
            self._missing("EntryNotFound" if name in self.state.files else "RepoNotFound")
            return
        headers = {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": REVISION}
        self._send(200, content, headers, body=body)

    def _tree(self, name: str) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
            for path, content in self.state.files.get(name, {}).items()
        ]

    def _missing(self, code: str = "RepoNotFound") -> None:
        self._send(404, b'{"error": "not here"}', {"X-Error-Code": code, "X-Error-Message": "no"})

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], *, body: bool = True
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content)


def _name(kind: str, name: str) -> str:
    return name if kind == "models" else f"datasets/{name}"


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
