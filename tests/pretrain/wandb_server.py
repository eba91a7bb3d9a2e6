"""As much of a wandb server as its client asks for: runs that can be resumed, files, workspaces. On loopback.

What the real one does with what it gets is not known here; this one records what was sent, and answers as documented by
the client's own questions.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

API_KEY = "a" * 40


@dataclass
class ServedRun:
    """A run as the server has it."""

    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    complete: bool = False


@dataclass
class WandbServer:
    """Everything that was sent; `url` is for WANDB_BASE_URL."""

    url: str = ""
    runs: dict[str, ServedRun] = field(default_factory=dict)
    views: list[dict[str, Any]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)  # names of GraphQL operations
    keys: set[str] = field(default_factory=set)  # of who asked
    refuses: bool = False

    def answer(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL operation."""
        project = {"id": "p", "name": "photos", "entity": {"id": "e", "name": "lab"}}
        if name == "UpsertBucket":
            run = self.runs.setdefault(given["name"], ServedRun())
            run.config = json.loads(given.get("config") or "{}") or run.config
            run.group, run.job_type = given.get("groupName") or run.group, given.get("jobType") or run.job_type
            run.tags = given.get("tags") or run.tags
            bucket = {"id": "b", "name": given["name"], "displayName": "a run", "description": "", "config": "{}",
                      "sweepName": None, "historyLineCount": len(run.history), "project": project}  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": not run.history}}
        if name == "RunResumeStatus":
            there = self.runs.get(given["name"])
            if there is None:
                return {"model": {**project, "bucket": None}}
            bucket = {
                "id": "b", "name": given["name"], "displayName": "a run", "summaryMetrics": json.dumps(there.summary),
                "logLineCount": 0, "historyLineCount": len(there.history), "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(row) for row in there.history[-1:]]), "eventsTail": "[]",
                "config": json.dumps(there.config), "tags": there.tags, "wandbConfig": json.dumps({"t": 1}),
            }  # fmt: skip
            return {"model": {**project, "bucket": bucket}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload/{file}"} for file in given.get("files", [])]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if name == "UpsertView2":
            self.views.append(given)
            return {"upsertView": {"view": {"id": "view-id", "name": given["name"]}, "inserted": "id" not in given}}
        viewer = {"id": "u", "entity": "lab", "username": "me", "email": "", "admin": False, "flags": "{}",
                  "teams": {"edges": []}, "deletedAt": None, "name": "me", "apiKeys": {"edges": []}}  # fmt: skip
        return {"viewer": viewer, "serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}}

    def take(self, run: ServedRun, sent: dict[str, Any]) -> None:
        """A piece of a run's stream: rows of its history from an offset, its summary."""
        files = sent.get("files") or {}
        if "wandb-history.jsonl" in files:
            piece = files["wandb-history.jsonl"]
            rows = [json.loads(line) for line in piece["content"]]
            run.history[piece["offset"] : piece["offset"] + len(rows)] = rows
        if "wandb-summary.json" in files:
            run.summary = json.loads(files["wandb-summary.json"]["content"][-1])
        run.complete = bool(sent.get("complete", run.complete))


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server that runs until the block ends."""
    state = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, answer: Any, code: int = 200) -> None:
            body = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def read(self) -> Any:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            try:
                return json.loads(body)
            except ValueError:
                return {}

        def do_GET(self) -> None:
            self.reply({})

        def do_PUT(self) -> None:
            self.read()
            self.reply({})

        def do_POST(self) -> None:
            sent = self.read()
            state.keys.add(self.headers.get("Authorization") or "")
            if self.path.endswith("/graphql"):
                query = sent.get("query") or ""
                words = query.replace("(", " ").replace("{", " ").split()
                name = sent.get("operationName") or next((b for b in words[1:2] if b.isidentifier()), "")
                state.asked.append(name)
                if state.refuses and name == "UpsertView2":
                    self.reply({"errors": [{"message": "permission denied"}]}, 403)
                else:
                    self.reply({"data": state.answer(name, sent.get("variables") or {})})
            elif self.path.endswith("/file_stream"):
                state.take(state.runs.setdefault(self.path.split("/")[-2], ServedRun()), sent)
                self.reply({"limits": {}})
            else:
                self.reply({})

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:  # a client that hangs up
            pass

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
