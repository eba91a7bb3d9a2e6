"""A real HTTP server on loopback that misbehaves as told."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data_pipelines.shards.scan import build_index

SECRET = "hunter2"


class Server:
    """Serves the files of a folder; `faults[name]` are met by the next GETs of that file, one each.

    Faults: `drop` half of the body and close; `stall` after half of it; `hang` before the head; `reset` without an
    answer; a status such as `500` or `429`; `long` or `short`: a Content-Length 100 bytes too much or too little;
    `whole`: no ranges, this once; `page`: some other answer with status 200; `grow`: the file is another after half.

    Attributes:
        ranges: Whether ranges are served at all.
        etags: Whether the head says which version it is.
        protected: User and password are asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: defaultdict[str, deque[str]] = defaultdict(deque)
        self.every: list[str] = []  # faults met by every file's first GETs
        self.requests: list[tuple[str, str | None]] = []  # path with query, Range
        self.sent: Counter[str] = Counter()  # bytes of bodies
        self.ranges = self.etags = True
        self.protected = False
        self.over = threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def num_requests(self, name: str) -> int:
        return sum(urlsplit(path).path.endswith("/" + name) for path, _ in self.requests)

    def close(self) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    owner: Server

    def do_GET(self) -> None:
        owner = self.owner
        parts = urlsplit(self.path)
        path = unquote(parts.path).lstrip("/")
        asked = self.headers.get("Range")
        owner.requests.append((self.path, asked))
        if path.startswith("moved/"):
            self.send_response(302)
            self.send_header("Location", f"{owner.url}/{path.removeprefix('moved/')}")
            self.end_headers()
            return
        if owner.protected:
            expected = "Basic " + base64.b64encode(f"user:{SECRET}".encode()).decode()
            if self.headers.get("Authorization") != expected:
                self.send_error(401)
                return
        file = owner.folder / path
        if not file.is_file():
            self.send_error(404)
            return
        if path not in owner.faults:
            owner.faults[path].extend(owner.every)
        fault = owner.faults[path].popleft() if owner.faults[path] and asked != "bytes=0-0" else ""
        if fault == "hang":
            owner.over.wait(30)
        if fault in ("hang", "reset"):
            self.close_connection = True
            return
        if fault.isdigit():
            self.send_error(int(fault))
            return
        self._send(file, b"<p>back soon</p>" if fault == "page" else file.read_bytes(), asked, fault)

    def _send(self, file: Path, content: bytes, asked: str | None, fault: str) -> None:
        owner = self.owner
        start, stop = 0, len(content)
        if asked and owner.ranges and fault not in ("whole", "page"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:stop]
        self.send_header("Content-Length", str(len(body) + {"long": 100, "short": -100}.get(fault, 0)))
        if owner.etags:
            self.send_header("ETag", '"' + hashlib.sha256(content).hexdigest()[:16] + '"')
        self.end_headers()
        if fault in ("drop", "stall", "grow"):
            body = body[: len(body) // 2]
        try:
            owner.sent[file.name] += len(body)
            self.wfile.write(body)
            self.wfile.flush()
        except ConnectionError:
            return
        if fault == "grow":
            file.write_bytes(content[::-1] + b"more")
        if fault == "stall":
            owner.over.wait(30)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    try:
        yield server
    finally:
        server.close()


def describe(folder: Path, **changes: object) -> None:
    """Write a dataset.json as pack does."""
    entries = [
        {
            "name": path.name,
            "samples": len(build_index(path)),
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        | changes
        for path in sorted(folder.glob("*.tar"))
    ]
    (folder / "dataset.json").write_text(json.dumps({"splits": {"train": {"shards": entries}}}))
