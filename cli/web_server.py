"""A server for `moss-jt web`: in a process of its own, which ends with the one that started it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from moss_jt.errors import MossError
from moss_jt.language import Language, current_language, pick, set_language

if TYPE_CHECKING:
    from moss_jt.server.settings import ServerSettings
    from moss_jt.server.worker import LoadedEngine

GRACE_S = 5.0  # for running answers at the end: their page is gone by then
ENDING_S = 30.0


@dataclass(frozen=True)
class Order:
    """What is to be served.

    Attributes:
        tools, search, draw: as `moss_jt.cli.chat_tools.open_tools` takes them.
    """

    settings: ServerSettings
    engine: LoadedEngine
    language: Language
    tools: str | None = None
    search: str | None = None
    draw: str | None = None


def order(
    folder: Path, options: dict[str, object], *, parallel: int, database: Path | None, **tools: str | None
) -> Order:
    """An order for a model, at a free port of this machine.

    Args:
        folder: of the model.
        options: of loading.
        parallel: answers at once.
        database: None takes the usual one.
        tools: as Order has them.
    """
    from moss_jt.server.settings import ServerSettings, default_database
    from moss_jt.server.worker import LoadedEngine

    settings = ServerSettings(database or default_database(), port=0, parallel=parallel, grace_s=GRACE_S)
    return Order(settings, LoadedEngine(str(folder), parallel, options), current_language(), **tools)


@contextlib.contextmanager
def own_server(wanted: Order, on_failure: Callable[[str], None]) -> Iterator[str]:
    """Serve while the block runs; gives the address, while the model may still be loading.

    Args:
        wanted: what.
        on_failure: called in a thread with the reason if it ends before the block does.

    Raises:
        MossError: it cannot be started.
    """
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, wanted), name="moss-jt server")
    process.start()
    theirs.close()
    ending = threading.Event()
    try:
        url = _first_word(ours)
        threading.Thread(target=_watch, args=(ours, ending, on_failure), daemon=True).start()
        yield url
    finally:
        ending.set()
        _end(process)


def _first_word(pipe: Connection) -> str:
    try:
        kind, word = pipe.recv()
    except EOFError:
        kind, word = "error", _died()
    if kind == "error":
        raise MossError(word)
    return str(word)


def _watch(pipe: Connection, ending: threading.Event, on_failure: Callable[[str], None]) -> None:
    """A thread: wait for the end of the server."""
    try:
        _, word = pipe.recv()
    except (EOFError, OSError):
        word = _died()
    if not ending.is_set():
        on_failure(str(word))


def _died() -> str:
    return pick("the server has ended unexpectedly.", "服务器意外退出。")


def _end(process: BaseProcess) -> None:
    """Let the server finish, and end it where it does not."""
    try:
        process.terminate()
        process.join(ENDING_S)
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def _serve(pipe: Connection, wanted: Order) -> None:
    """The process of the server; a MossError of it is told through the pipe."""
    from moss_jt.cli.chat_screen import Screen
    from moss_jt.cli.chat_tools import open_tools
    from moss_jt.server.running import serve
    from moss_jt.server.tool_runner import BoxRunner

    os.setpgrp()  # the Ctrl-C of a terminal is for the page, which ends first and this then
    set_language(wanted.language)
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    try:
        box = open_tools(wanted.tools, search=wanted.search, draw=wanted.draw, screen=Screen(interactive=False))
        try:
            runner = None if box is None else BoxRunner(box)
            serve(wanted.settings, wanted.engine, tools=runner, on_listening=lambda url: pipe.send(("url", url)))
        finally:
            if box is not None:
                box.close()
    except MossError as error:
        with contextlib.suppress(OSError):
            pipe.send(("error", str(error)))


def _end_with_parent(pipe: Connection) -> None:
    """A thread: nothing ever comes; the end of the pipe is that of the parent."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    os.kill(os.getpid(), signal.SIGTERM)
