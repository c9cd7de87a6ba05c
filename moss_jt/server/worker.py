"""The process of the model: loads it, takes requests from a pipe, sends back what happens.

Jittor holds Python's lock while it computes, so the model cannot live beside the event loop. When the
pipe closes the server has gone, however it went, and so does this process.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from moss_jt.errors import DeviceMemoryError, KernelError, MossError
from moss_jt.messages import FinishedEvent
from moss_jt.progress import Progress
from moss_jt.server.link import (
    Cancel,
    EngineLike,
    Failed,
    Fatal,
    Forget,
    FromWorker,
    Happened,
    Loading,
    LogLine,
    MakeEngine,
    ModelInfo,
    Ready,
    Submit,
    ToWorker,
)

STATS_EVERY_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedEngine:
    """Makes the real engine: `load_model` with these arguments, then as many slots as answers run at once."""

    path: str
    parallel: int
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, progress: Progress) -> tuple[EngineLike, ModelInfo]:
        """Load the model; called in its process."""
        from moss_jt.engine import Engine
        from moss_jt.load import load_model

        model = load_model(self.path, **self.options, progress=progress)
        tokens = self.parallel * model.max_tokens
        if model.budget is not None:
            tokens = min(tokens, model.budget.most_tokens(self.parallel))
        # What idle conversations keep must not push weights out: the plan has room for one context.
        idle_tokens = model.max_tokens if model.streamed_bytes else None
        engine = Engine(model, slots=self.parallel, tokens=max(1, tokens), idle_tokens=idle_tokens)
        info = ModelInfo(model.path, model.config, engine.context_size, model.device, model.compute)
        return engine, info


def run_worker(connection: Connection, make_engine: MakeEngine) -> None:
    """Be the process of the model until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # terminals and supervisors send them to all; the server decides
        signal.signal(number, signal.SIG_IGN)
    sender = _Sender(connection)
    _forward_logs(sender)
    try:
        engine, info = make_engine(_Telling(sender))
    except (MossError, MemoryError) as error:
        sender.send(Fatal(" ".join(str(error).split()) or "the system gives no more memory."))
        return
    sender.send(Ready(info))
    try:
        Worker(connection, sender, engine).run()
    except Exception:  # the end of this process either way; the server starts another, and its log should say why
        _log.critical("the process of the model failed: %s", traceback.format_exc())
        sys.exit(1)


class _Sender:
    """The pipe's writing end, for any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: FromWorker) -> None:
        """Send, or end where nobody listens any more."""
        try:
            with self._lock:
                self._connection.send(message)
        except OSError:
            os._exit(0)


class _Telling:
    """Progress that the server is told, not more often than it can be read."""

    def __init__(self, sender: _Sender) -> None:
        self._sender = sender
        self._task, self._total, self._done, self._told = "", 0.0, 0.0, 0.0

    def begin(self, task: str, total: float, unit: str) -> None:
        self._task, self._total, self._done = task, total, 0.0
        self._tell()

    def advance(self, amount: float) -> None:
        self._done += amount
        if time.monotonic() - self._told > STATS_EVERY_S:
            self._tell()

    def end(self) -> None:
        self._task = ""

    def _tell(self) -> None:
        self._told = time.monotonic()
        share = self._done / self._total if self._total else 0.0
        self._sender.send(Loading(self._task, min(share, 1.0)))


class _ToServer(logging.Handler):
    """Hands log records to the server, whose log is the only one."""

    def __init__(self, sender: _Sender) -> None:
        super().__init__()
        self._sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        self._sender.send(LogLine(record.levelno, record.name, record.getMessage()))


def _forward_logs(sender: _Sender) -> None:
    ours = logging.getLogger("moss_jt")
    ours.addHandler(_ToServer(sender))
    ours.setLevel(logging.INFO)


class Worker:
    """Drives one engine by the messages of a pipe.

    Args:
        connection: where messages come from.
        sender: where events go.
        engine: what computes.
    """

    def __init__(self, connection: Connection, sender: _Sender, engine: EngineLike) -> None:
        self._connection = connection
        self._sender = sender
        self._engine = engine
        self._inbox: SimpleQueue[ToWorker] = SimpleQueue()
        self._ids: dict[int, int] = {}  # the server's number -> the engine's id
        self._numbers: dict[int, int] = {}  # and back
        self._told = 0.0

    def run(self) -> None:
        """Work until the pipe closes."""
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            while not self._engine.busy or not self._inbox.empty():
                self._take(self._inbox.get())
            self._step()

    def _listen(self) -> None:
        """Read the pipe while a pass runs."""
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)  # the server has gone: nobody waits for anything
            if isinstance(message, Cancel):  # at once: a pass that nobody waits for is broken off
                self._cancel(message.number)
            self._inbox.put(message)

    def _take(self, message: ToWorker) -> None:
        if isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Forget):
            self._engine.forget(message.conversation)
        else:
            self._cancel(message.number)  # again: the first may have come before the request was known

    def _submit(self, message: Submit) -> None:
        try:
            number = self._engine.submit(message.request)
        except MossError as error:
            self._sender.send(Failed(message.number, str(error), mine=True))
            return
        self._ids[message.number] = number
        self._numbers[number] = message.number

    def _cancel(self, number: int) -> None:
        engine_id = self._ids.get(number)
        if engine_id is not None:
            self._engine.cancel(engine_id)

    def _step(self) -> None:
        """One pass, and what it gave; an error ends the requests that it concerns and nothing else."""
        try:
            events = self._engine.step()
        except KernelError as error:
            self._fail([error.request] if error.request is not None else list(self._numbers), error)
            return
        except DeviceMemoryError as error:
            self._fail(sorted(self._numbers)[:1], error)  # the oldest, for which there is no room
            return
        except MossError as error:  # weights cannot be read: nobody can be answered now
            self._fail(list(self._numbers), error)
            return
        told = tuple((self._numbers[event.request], event) for event in events if event.request in self._numbers)
        for event in events:
            if isinstance(event, FinishedEvent):
                self._drop(event.request)
        self._sender.send(Happened(told, self._stats()))

    def _fail(self, engine_ids: list[int], error: MossError) -> None:
        for engine_id in engine_ids:
            number = self._drop(engine_id)
            self._engine.cancel(engine_id)
            if number is not None:
                self._sender.send(Failed(number, str(error), mine=False))

    def _drop(self, engine_id: int) -> int | None:
        number = self._numbers.pop(engine_id, None)
        if number is not None:
            del self._ids[number]
        return number

    def _stats(self) -> dict[str, float | int | str] | None:
        """The engine's figures, once a second and when it becomes idle."""
        now = time.monotonic()
        if self._engine.busy and now - self._told < STATS_EVERY_S:
            return None
        self._told = now
        return self._engine.stats()
