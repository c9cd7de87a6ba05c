"""A hub on 127.0.0.1 for tests: huggingface_hub's addresses, and the ways in which a network fails.

It serves model information (`/api/models/…?blobs=true`) and files (`/NAME/resolve/REVISION/FILE`, large
ones by a redirect to `/cdn/…`), with ranges. `fail` plans faults; `requests` and `sent` tell what happened.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    import pytest

Kind = Literal["none", "break", "stall", "status", "corrupt", "no-range", "extra", "short", "portal", "page"]
LARGE = (".bin", ".safetensors")


@dataclass
class Fault:
    """One way to fail.

    Attributes:
        kind: "break" closes the connection after `after` bytes of the answer, "stall" stops sending there,
            "status" answers with `status`, "corrupt" changes a byte, "no-range" ignores Range, "extra"
            sends more than the file holds, "short" ends after `after` bytes (neither says how many they are),
            "portal" sends a page of HTML as if it were the file, "page" without telling its length.
        file: the file it strikes, or "info".
        times: how often it does.
    """

    kind: Kind
    file: str
    after: int = 0
    status: int = 503
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Repo:
    """A model on the fake hub. `claims` replaces parts of a file's entry in the model information."""

    files: dict[str, bytes]
    commit: str
    license: str | None = "agpl-3.0"
    gated: bool = False
    claims: dict[str, dict[str, Any]] = field(default_factory=dict)


class FakeHub:
    """The hub; use it in a `with` block."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # "METHOD path Range"
        self.tokens: set[str | None] = set()
        self.sent: dict[str, int] = defaultdict(int)  # bytes of each file that went out
        self.released = threading.Event()  # ends every stall
        self._lock = threading.Lock()

    def __enter__(self) -> FakeHub:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def use(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Have this process and its children go to this hub and to no other, without anybody's token."""
        from huggingface_hub import constants

        monkeypatch.setenv("HF_ENDPOINT", self.url)
        monkeypatch.setenv("HF_HOME", str(home))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)

    def add(self, name: str, *folders: Path, extra: Mapping[str, bytes] | None = None) -> Repo:
        """Serve the files of some folders as a model."""
        files = {p.name: p.read_bytes() for folder in folders for p in sorted(folder.iterdir()) if p.is_file()}
        files.update(extra or {})
        commit = hashlib.sha1(b"".join(sorted(files.values()))).hexdigest()
        self.repos[name] = Repo(files, commit)
        return self.repos[name]

    def fail(self, kind: Kind, file: str, **options: Any) -> None:
        """Plan a fault; faults of one file come in the order in which they were planned."""
        self.faults.append(Fault(kind, file, **options))

    def next_fault(self, file: str) -> Fault | None:
        """Take the fault that strikes this request, if one does."""
        with self._lock:
            for fault in self.faults:
                if fault.file == file and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    """The server; a client that goes away is nothing to report."""

    daemon_threads = True
    hub: FakeHub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent."""


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self._answer()

    def do_GET(self) -> None:
        """Answer."""
        self._answer()

    @property
    def hub(self) -> FakeHub:
        return cast(_Server, self.server).hub

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        self.hub.tokens.add(self.headers.get("Authorization"))
        if path.startswith("/api/models/"):
            self._info(path.removeprefix("/api/models/"))
        elif path.startswith("/cdn/"):
            _, _, name, file = path.split("/", 3)
            self._file(self.hub.repos[name.replace("--", "/")].files[file], file)
        else:
            self._resolve(path)

    def _info(self, path: str) -> None:
        fault = self.hub.next_fault("info")
        name, _, revision = path.partition("/revision/")
        repo = self.hub.repos.get(name)
        if fault is not None and fault.kind == "status":
            self._plain(fault.status, headers=dict(fault.headers))
        elif repo is None:
            self._plain(401, code="RepoNotFound")
        elif revision not in ("", "main", repo.commit):
            self._plain(404, code="RevisionNotFound")
        else:
            self._plain(200, json.dumps(_information(name, repo)).encode())

    def _resolve(self, path: str) -> None:
        name, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._plain(401, code="RepoNotFound")
        if revision not in ("main", repo.commit):
            return self._plain(404, code="RevisionNotFound")
        if file not in repo.files:
            return self._plain(404, code="EntryNotFound")
        if repo.gated:
            return self._plain(401, code="GatedRepo")
        content = repo.files[file]
        if not file.endswith(LARGE):
            return self._file(content, file)
        headers = {
            "Location": f"/cdn/{name.replace('/', '--')}/{file}",
            "X-Repo-Commit": repo.commit,
            "X-Linked-Size": str(len(content)),
            "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"',
        }
        return self._plain(302, headers=headers)

    def _plain(self, status: int, body: bytes = b"", *, code: str = "", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _no_file(self, fault: Fault) -> None:
        """Something else in place of a file."""
        page = b"<html>Sign in to the network</html>" * 40
        if fault.kind != "page":
            status, body = (fault.status, b"") if fault.kind == "status" else (200, page)
            self._plain(status, body, headers=dict(fault.headers))
            return
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(page)
        self.close_connection = True

    def _file(self, content: bytes, file: str) -> None:
        fault = self.hub.next_fault(file) or Fault("none", file)
        if fault.kind in ("status", "portal", "page"):
            return self._no_file(fault)
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and fault.kind != "no-range" else 0
        if start >= len(content) > 0:
            return self._plain(416)
        body = content[start:]
        if fault.kind == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault.kind == "extra":
            body += b"more"
        if fault.kind == "short":
            body = body[: fault.after]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if fault.kind in ("extra", "short"):
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if fault.kind in ("break", "stall"):
            body = body[: fault.after]
        if self.command != "HEAD":
            self.wfile.write(body)
            self.hub.sent[file] += len(body)
        if fault.kind == "stall":
            self.hub.released.wait(20)
        if fault.kind in ("break", "stall"):
            self.close_connection = True
        return None


def _information(name: str, repo: Repo) -> dict[str, Any]:
    """What the hub tells about a model."""
    siblings = []
    for file, content in repo.files.items():
        entry: dict[str, Any] = {"rfilename": file, "size": len(content), "blobId": _git_sha1(content)}
        if file.endswith(LARGE):
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        siblings.append({**entry, **repo.claims.get(file, {})})
    tags = [f"license:{repo.license}"] if repo.license else []
    return {
        "id": name,
        "sha": repo.commit,
        "siblings": siblings,
        "tags": tags,
        "gated": "auto" if repo.gated else False,
    }


def _git_sha1(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
