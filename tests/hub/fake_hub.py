"""A Hugging Face hub on loopback: the API routes that a download uses, with gates, ranges, redirects and broken connections."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class FakeHub:
    """`repositories`: name → revision → commit; `files`: (name, commit) → path → contents."""

    revisions: dict[str, dict[str, str]] = field(default_factory=dict)
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    gated: dict[str, str] = field(default_factory=dict)  # name → the token that has access
    sizes: dict[str, int] = field(default_factory=dict)  # sizes to claim instead of the true ones
    checksums: dict[str, str] = field(default_factory=dict)  # checksums to claim instead of the true ones
    cut_after: dict[str, list[int]] = field(
        default_factory=dict
    )  # file → after how many bytes each next response breaks
    redirect_to: str = ""  # base URL of a storage host, for files
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    endpoint: str = ""

    def add(self, name: str, files: dict[str, bytes], *, commit: str = "c" * 40, revision: str = "main") -> None:
        self.revisions.setdefault(name, {})[revision] = commit
        self.files[name, commit] = files

    def downloads(self, path: str) -> list[dict[str, str]]:
        """Headers of every request for the contents of a file."""
        return [headers for url, headers in self.requests if "/resolve/" in url and url.endswith("/" + path)]

    def start(self) -> ThreadingHTTPServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(hub, self)

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server


def answer(hub: FakeHub, request: BaseHTTPRequestHandler) -> None:
    path = unquote(urlsplit(request.path).path)
    hub.requests.append((path, dict(request.headers.items())))
    if path.startswith("/api/models/"):
        name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
        answer_repository(hub, request, name, revision)
    else:
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        commit, _, file = rest.partition("/")
        answer_file(hub, request, name, commit, file)


def answer_repository(hub: FakeHub, request: BaseHTTPRequestHandler, name: str, revision: str) -> None:
    if name not in hub.revisions:
        return refuse(request, 401, "RepoNotFound")
    commit = hub.revisions[name].get(revision, revision)
    if (name, commit) not in hub.files:
        return refuse(request, 404, "RevisionNotFound")
    siblings = []
    for path, contents in hub.files[name, commit].items():
        entry: dict[str, Any] = {"rfilename": path, "size": hub.sizes.get(path, len(contents))}
        if path.endswith(".safetensors"):
            digest = hub.checksums.get(path, hashlib.sha256(contents).hexdigest())
            entry["lfs"] = {"sha256": digest, "size": entry["size"]}
        siblings.append(entry)
    send(request, 200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode(), {})
    return None


def answer_file(hub: FakeHub, request: BaseHTTPRequestHandler, name: str, commit: str, file: str) -> None:
    token = hub.gated.get(name)
    given = request.headers.get("Authorization", "")
    if token is not None and given != f"Bearer {token}":
        return refuse(request, 403 if given else 401, "GatedRepo")
    contents = hub.files.get((name, commit), {}).get(file)
    if contents is None:
        return refuse(request, 404, "EntryNotFound")
    if hub.redirect_to:
        return send(request, 302, b"", {"Location": f"{hub.redirect_to}{request.path}"})
    start = 0
    requested = request.headers.get("Range")
    if requested:
        start = int(requested.removeprefix("bytes=").rstrip("-"))
    body = contents[start:]
    headers = {"Content-Range": f"bytes {start}-{len(contents) - 1}/{len(contents)}"} if requested else {}
    cuts = hub.cut_after.get(file)
    send(request, 206 if requested else 200, body, headers, cut=cuts.pop(0) if cuts else None)
    return None


def refuse(request: BaseHTTPRequestHandler, status: int, code: str) -> None:
    send(request, status, b"{}", {"X-Error-Code": code})


def send(
    request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str], cut: int | None = None
) -> None:
    """Answer; with `cut`, break the connection after that many bytes of the body."""
    request.send_response(status)
    for key, value in {"Content-Length": str(len(body)), **headers}.items():
        request.send_header(key, value)
    request.end_headers()
    request.wfile.write(body[:cut])
    request.close_connection = True
