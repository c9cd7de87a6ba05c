"""A server in a thread, with the toy engine in its own process, and a plain client for it."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from toy_engine import MakeToy

from moss_jt.server.calls import ToolRunner
from moss_jt.server.database import Database
from moss_jt.server.keys import add_key
from moss_jt.server.link import MakeEngine
from moss_jt.server.running import make_server
from moss_jt.server.service import Service
from moss_jt.server.settings import ServerSettings

LONGEST_S = 60.0


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that must come."""
    deadline = time.monotonic() + LONGEST_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.005)


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> Any:
        """The word of an error."""
        return self.json["error"]["code"]


class Client:
    """Asks a server.

    Args:
        key: sent with every request.
    """

    def __init__(self, port: int, key: str | None = None) -> None:
        self.port = port
        self.headers = {"Authorization": f"Bearer {key}"} if key is not None else {}

    def ask(
        self, method: str, path: str, body: Any = None, *, raw: bytes | None = None, headers: Mapping[str, str] = {}
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONGEST_S)
        sent = dict(self.headers)
        if body is not None or raw is not None:
            sent["Content-Type"] = "application/json"
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, {**sent, **headers})
        reply = connection.getresponse()
        try:
            return Reply(reply.status, dict(reply.getheaders()), reply.read())
        finally:
            connection.close()

    def get(self, path: str) -> Reply:
        return self.ask("GET", path)

    def post(self, path: str, body: Any) -> Reply:
        return self.ask("POST", path, body)

    def say(self, prompt: str, uid: str | None = None, **more: Any) -> Any:
        """MOSS's own API; the answer must be whole."""
        body = {"prompt": prompt, **more, **({} if uid is None else {"uid": uid})}
        reply = self.post("/", body)
        assert reply.status == 200, reply.body
        return reply.json

    def stream(self, path: str, body: Any) -> OpenStream:
        """A stream, read only as far as asked."""
        return OpenStream(self.port, path, {**body, "stream": True}, self.headers)


class Asked:
    """A request in a thread of its own."""

    def __init__(self, ask: Callable[[], Reply]) -> None:
        self.replies: list[Reply] = []
        self.ask = ask
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        self.replies.append(self.ask())

    def reply(self) -> Reply:
        self.thread.join()
        return self.replies[0]


class OpenStream:
    """Events of a stream, one by one."""

    def __init__(self, port: int, path: str, body: Any, headers: Mapping[str, str]) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LONGEST_S)
        sent = {"Content-Type": "application/json", **headers}
        self.connection.request("POST", path, json.dumps(body).encode(), sent)
        self.reply = self.connection.getresponse()

    def events(self) -> Iterator[Any]:
        for line in self.reply:
            if line.startswith(b"data: ") and b"[DONE]" not in line:
                yield json.loads(line[6:])

    def close(self) -> None:
        if self.reply.fp is not None:
            self.reply.close()
        self.connection.close()

    def __enter__(self) -> OpenStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LiveServer:
    """A server that runs while the block does.

    Args:
        keys: names of keys to make; `client(name)` has each.
    """

    def __init__(
        self,
        folder: Path,
        *,
        make_engine: MakeEngine | None = None,
        keys: tuple[str, ...] = (),
        tools: ToolRunner | None = None,
        **settings: Any,
    ) -> None:
        self.settings = ServerSettings(folder / "moss.db", port=0, **{"name": "toy", "grace_s": 5, **settings})
        self.database = Database(self.settings.database)
        self.keys = {name: self.database.now(add_key, name) for name in keys}
        self.service = Service(self.settings, self.database, make_engine or MakeToy(), tools=tools)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self.listener.getsockname()[1]
        self.server = make_server(self.settings, self.service, lambda: None)
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        asyncio.run(self.server.serve(sockets=[self.listener]))

    def client(self, key: str | None = None) -> Client:
        return Client(self.port, self.keys.get(key, key) if key is not None else None)

    def __enter__(self) -> LiveServer:
        self.thread.start()
        until(lambda: self.service.ready or not self.thread.is_alive(), "the server is ready")
        assert self.thread.is_alive(), self.server.failure
        return self

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(LONGEST_S)
        assert not self.thread.is_alive()

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self.stop()
