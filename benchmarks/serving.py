"""A server of its own for a benchmark: `moss-jt serve` as a process, keys for its clients, its memory."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from moss_jt.server.database import open_database
from moss_jt.server.keys import add_key

START_S = 900.0
ANSWER_S = 3600.0


class Serving:
    """A server that runs while the block does.

    Args:
        folder: for its database and its log.
        users: keys that are made.
        options: of `moss-jt serve`.
    """

    def __init__(self, folder: Path, users: int, options: list[str]) -> None:
        database = folder / "moss.db"
        connection = open_database(database)
        self.keys = [add_key(connection, f"user-{number}") for number in range(users)]
        connection.close()
        self._log = folder / "log"
        line = [sys.executable, "-m", "moss_jt.cli", "serve", "--port", "0", "--database", str(database), *options]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(line, stderr=log, stdout=subprocess.DEVNULL)

    def __enter__(self) -> Serving:
        self.port = int(self._wait(self._find_port))
        self._wait(lambda: self.ask("GET", "/readyz", None, 0)[0] == 200)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(START_S)

    def _wait(self, look: Any) -> Any:
        until = time.monotonic() + START_S
        while not (found := look()):
            if self.process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server has not come up:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.2)
        return found

    def _find_port(self) -> str:
        words = self._log.read_text().split()
        return next((word.strip(";").rpartition(":")[2] for word in words if word.startswith("http://")), "")

    def ask(self, method: str, path: str, body: Any, user: int) -> tuple[int, Any]:
        """One request: its status, and its answer."""
        with self.open(method, path, body, user) as reply:
            return reply.status, json.loads(reply.read())

    @contextlib.contextmanager
    def open(self, method: str, path: str, body: Any, user: int) -> Iterator[http.client.HTTPResponse]:
        """A request whose answer is read by the caller."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.keys[user]}"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body).encode(), headers)
            yield connection.getresponse()
        finally:
            connection.close()

    def memory(self) -> dict[str, int]:
        """Bytes that the server and the process of the model have in memory."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return {"server": _resident(str(pid)), "model": sum(map(_resident, children))}


def _resident(pid: str) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS")), 0)
