"""The page over HTTP, for this machine alone.

What keeps others out: the server listens on 127.0.0.1; every address begins with a random token;
the Host must be our own (a name that someone else's DNS points here is refused); a change must come
from our own page (Origin), as JSON. The page may load nothing from anywhere else.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from lora_dpo.errors import OutputError
from lora_dpo.labelling.session import Session

ADDRESS = "127.0.0.1"
MOST_BYTES = 4096  # of a request's body; an answer takes some 40
_LENGTH = re.compile(r"[0-9]{1,18}")
_FILES = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class LabelServer(ThreadingHTTPServer):
    """Serves one session at ``url``."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, session: Session, port: int = 0) -> None:
        self.session, self.token = session, secrets.token_urlsafe(32)
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            raise OutputError(
                f"port {port} of {ADDRESS}: cannot be listened on ({error}); choose another with "
                "--port, or leave it out to take any that is free."
            ) from None

    @property
    def url(self) -> str:
        """Where the page is, token and all."""
        return f"http://{ADDRESS}:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that hung up."""


class _Handler(BaseHTTPRequestHandler):
    server: LabelServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "lora-dpo", ""
    timeout = 60  # of a connection that says nothing

    def do_GET(self) -> None:
        name = self._asked()
        if name is None:
            return
        if name == "state":
            self._json(200, self.server.session.state())
        elif name in _FILES:
            file, kind = _FILES[name]
            self._send(200, kind, files("lora_dpo.labelling").joinpath("page", file).read_bytes())
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        name = self._asked()
        if name is None:
            return
        if self.headers.get("Origin") not in self._own("http://"):
            self.send_error(403, "a change must come from the page itself")
            return
        body = self._body()
        if body is None:
            return
        session, turn = self.server.session, body.get("turn")
        if name == "choose":
            done = session.choose(turn, body.get("choice"))
        elif name == "undo":
            done = session.undo(turn)
        elif name == "finish":
            session.finish()
            done = True
        else:
            self.send_error(404)
            return
        self._json(200 if done else 409, session.state())
        if session.finished:  # only now: whoever waits for the end may stop this server
            session.over.set()

    def _own(self, scheme: str = "") -> set[str]:
        port = self.server.server_port
        return {f"{scheme}{host}:{port}" for host in (ADDRESS, "localhost")}

    def _asked(self) -> str | None:
        """Return what stands behind the token, or answer with an error."""
        if self.headers.get("Host") not in self._own():
            self.send_error(403, "this address is not ours")
            return None
        token, _, name = self.path.lstrip("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self.send_error(404)
            return None
        return name

    def _body(self) -> dict[str, Any] | None:
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json" or not _LENGTH.fullmatch(length):
            self.send_error(415)
            return None
        if int(length) > MOST_BYTES:
            self.send_error(413)
            return None
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            self.send_error(400)
            return None
        return body

    def _json(self, status: int, value: Any) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer in plain words, and close: the body may not have been read."""
        self.close_connection = True
        self._send(code, "text/plain; charset=utf-8", (message or f"error {code}").encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Write no line a request."""
