"""The server's hold of the model's process: start, speak to, notice the end of, start again.

Two threads stand between the event loop and the pipe, so that neither a full pipe nor a long pass stops the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from queue import SimpleQueue

from moss_jt.server.link import FromWorker, MakeEngine, ToWorker
from moss_jt.server.worker import run_worker

LONGEST_PAUSE_S = 30.0

_log = logging.getLogger(__name__)


class ModelProcess:
    """One process at a time; a dead one is replaced.

    Args:
        make_engine: makes the engine, there.
        on_message: called in the event loop with what the process says.
        on_death: called in the event loop when it has died, before another is started.
    """

    def __init__(
        self, make_engine: MakeEngine, on_message: Callable[[FromWorker], None], on_death: Callable[[], None]
    ) -> None:
        self._make_engine = make_engine
        self._on_message = on_message
        self._on_death = on_death
        self._outbox: SimpleQueue[ToWorker | None] = SimpleQueue()
        self._process: BaseProcess | None = None
        self._stopped = False
        self._failures = 0  # processes that died one after the other before any worked
        self._started = 0.0
        self._again: asyncio.TimerHandle | None = None
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        """Of the process that is there now."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process; called in the event loop."""
        self._loop = asyncio.get_running_loop()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=run_worker, args=(theirs, self._make_engine), name="moss-jt model", daemon=True
        )
        process.start()
        theirs.close()
        self._process, self._outbox, self._started = process, SimpleQueue(), time.monotonic()
        threading.Thread(target=self._write, args=(ours, self._outbox), daemon=True).start()
        threading.Thread(target=self._read, args=(ours, process, self._outbox), daemon=True).start()

    def send(self, message: ToWorker) -> None:
        """Say something to the process; lost where it is dead, which `on_death` then tells."""
        self._outbox.put(message)

    def settled(self) -> None:
        """The process works: if it dies, another is started without a pause."""
        self._failures = 0

    def stop(self) -> None:
        """End the process for good."""
        self._stopped = True
        if self._again is not None:
            self._again.cancel()
        if self._process is not None:
            self._process.kill()  # it holds nothing that could be lost
            self._process.join()

    def _write(self, pipe: Connection, outbox: SimpleQueue[ToWorker | None]) -> None:
        """A thread: what waits, into the pipe."""
        with contextlib.suppress(OSError):
            while (message := outbox.get()) is not None:
                pipe.send(message)

    def _read(self, pipe: Connection, process: BaseProcess, outbox: SimpleQueue[ToWorker | None]) -> None:
        """A thread: what comes out of the pipe, until the process is dead."""
        with contextlib.suppress(OSError, EOFError):
            while pipe in wait([pipe, process.sentinel]):
                self._call(self._on_message, pipe.recv())
        process.kill()
        process.join()
        outbox.put(None)
        pipe.close()
        self._call(self._died)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """Have the event loop call something; it may be closed by now."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def _died(self) -> None:
        if self._stopped:
            return
        lived = time.monotonic() - self._started
        pause = min(LONGEST_PAUSE_S, 0.2 * 2.0**self._failures) if self._failures else 0.0
        self._failures += 1
        code = None if self._process is None else self._process.exitcode
        _log.error("the process of the model ended with code %s after %.1f s; a new one in %.1f s.", code, lived, pause)
        self._on_death()
        self.restarts += 1
        self._again = self._loop.call_later(pause, self.start)
