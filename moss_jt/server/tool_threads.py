"""Tools that run here, each turn's in a thread of its own: who has tools that hang stands in nobody else's way.

The threads of asyncio are few, all share them, and the end of the server would wait for every one. These end with the
program, and one asker has only so many at once.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moss_jt.server.calls import ToolResults, ToolRunner

if TYPE_CHECKING:
    from moss_jt.template import ToolLine


@dataclass
class _Places:
    """Of one asker: those that are free, and how many turns have or want one."""

    free: asyncio.Semaphore
    wanted: int = 0


class ToolThreads:
    """Runs the calls of answers beside the event loop.

    Args:
        runner: what they ask for.
        most: turns of one asker whose tools run at once; the others wait.
    """

    def __init__(self, runner: ToolRunner, most: int) -> None:
        self._runner = runner
        self._most = most
        self._places: dict[str, _Places] = {}

    @property
    def enabled(self) -> Sequence[str | ToolLine]:
        """The tools that are offered."""
        return self._runner.enabled

    async def run(self, user: str, commands: str) -> ToolResults | None:
        """Do what a Commands field asks; see ToolRunner.run.

        Where nobody waits any more, the tools go on to their end, and keep their place until then.
        """
        places = self._places.setdefault(user, _Places(asyncio.Semaphore(self._most)))
        places.wanted += 1
        try:
            await places.free.acquire()
        except BaseException:
            self._leave(user, places)
            raise
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[ToolResults | None] = loop.create_future()

        def finish(found: ToolResults | None, error: Exception | None) -> None:
            places.free.release()
            self._leave(user, places)
            if answer.done():  # who asked has gone
                return
            if error is None:
                answer.set_result(found)
            else:
                answer.set_exception(error)

        def work() -> None:
            found, failure = None, None
            try:
                found = self._runner.run(commands)
            except Exception as error:  # handed to who waits
                failure = error
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(finish, found, failure)

        try:
            threading.Thread(target=work, name="tools", daemon=True).start()
        except RuntimeError as error:  # the system gives no more threads
            finish(None, error)
        return await answer

    def _leave(self, user: str, places: _Places) -> None:
        places.wanted -= 1
        if not places.wanted:
            self._places.pop(user, None)
