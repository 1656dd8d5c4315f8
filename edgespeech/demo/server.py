"""The server of the demo's page: Python's own `http.server`, one page written by hand, and JSON.

Not Gradio (ours): nothing is installed for it, it starts at once, the page asks no network for fonts or scripts, and a
test can drive the whole of it. What a page of one form and one picture would gain from a framework is little.
"""

import json
import threading
import time
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import urlsplit

from edgespeech.errors import InputError

MOST_BYTES = 32 << 20  # of an upload: 30 s of anything that is recorded, uncompressed
IDLE_SECONDS = 30.0  # a client that is silent for longer has gone
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/picture.js": ("picture.js", "text/javascript; charset=utf-8"),
}
# The page asks this server alone; what it plays is the clip in its own memory.
POLICY = (
    "default-src 'self'; img-src 'self' data:; media-src blob:; base-uri 'none'; form-action 'none'"
)


class DemoServer(ThreadingHTTPServer):
    """Serves the page; clips are heard one after another, each request has a thread of its own.

    `GET /model` gives `about`; `POST /transcribe` takes an audio file as its body and gives what `listen` says. What
    cannot be used is answered with a status of 400 or above and `{"error": message}`, and the server goes on.

    Args:
        host: name or address to listen on.
        port: 0 takes any free one; `server_port` says which.

    Attributes:
        listen: from the bytes of a clip to facts for JSON.
        about: facts for JSON.

    Raises:
        InputError: the port is in use, or the address is not this machine's.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int):
        self.listen: Callable[[bytes], dict[str, Any]]
        self.about: dict[str, Any] = {}
        self.lock = threading.Lock()
        folder = Path(__file__).parent
        self.files = {path: (folder / name).read_bytes() for path, (name, _) in FILES.items()}
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"cannot listen on {host} port {port} ({error}): choose another --port, or --host=127.0.0.1"
            ) from error

    def server_bind(self) -> None:
        """Binds without asking for the host's full name, which takes seconds where there is no network."""
        TCPServer.server_bind(self)
        host, self.server_port = self.server_address[:2]
        self.server_name = str(host)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "edgespeech"
    timeout = IDLE_SECONDS
    server: DemoServer

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/model":
            self._answer(200, {**self.server.about, "most_bytes": MOST_BYTES})
        elif path in FILES:
            self._send(200, FILES[path][1], self.server.files[path])
        else:
            self._answer(404, {"error": f"there is no {path} here: the page is /"})

    def do_POST(self) -> None:
        try:
            clip = self._body()
        except (ConnectionError, TimeoutError):
            self.close_connection = True
            return
        if clip is None:
            return
        if urlsplit(self.path).path != "/transcribe":
            self._answer(404, {"error": "clips go to /transcribe"})
            return
        try:
            with self.server.lock:
                start = time.perf_counter()
                facts = self.server.listen(clip)
                facts["milliseconds"] = round(1e3 * (time.perf_counter() - start), 1)
            self._answer(200, facts)
        except InputError as error:
            self._answer(400, {"error": str(error)})
        except (
            Exception
        ) as error:  # a fault of ours must not end the server: it is shown where it runs
            traceback.print_exc()
            self._answer(500, {"error": f"{type(error).__name__}: {error}"})

    def _body(self) -> bytes | None:
        """The request's body; None where the answer has been given."""
        announced = self.headers.get("Content-Length", "")
        if not (announced.isascii() and announced.isdigit()):
            self.close_connection = True
            self._answer(411, {"error": "the request does not say how long the clip is"})
            return None
        length = int(announced)
        if length > MOST_BYTES:
            self._discard(min(length, 4 * MOST_BYTES))
            self.close_connection = True
            most = f"{MOST_BYTES >> 20} MiB"
            self._answer(
                413, {"error": f"the clip has {length} bytes, the limit is {most}: cut it"}
            )
            return None
        clip = self.rfile.read(length)
        if len(clip) < length:
            self.close_connection = True
            self._answer(400, {"error": f"the clip ends after {len(clip)} of {length} bytes"})
            return None
        return clip

    def _discard(self, length: int) -> None:
        """Reads on without keeping: a browser shows no answer that comes before it has sent everything."""
        while length > 0 and (piece := self.rfile.read(min(length, 1 << 16))):
            length -= len(piece)

    def _answer(self, status: int, facts: dict[str, Any]) -> None:
        text = json.dumps(facts, ensure_ascii=False, allow_nan=False)
        self._send(status, "application/json; charset=utf-8", text.encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Security-Policy", POLICY)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:  # the client has gone
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for each request helps nobody here."""
