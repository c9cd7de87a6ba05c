"""One warm process that computes, with a limit of time and of memory for each answer.

    box = Sandbox()
    box.ask("calculate", "2^10")     "1024", or ToolError

The process is spawned, not forked, so nothing of this program is in it. It is started ahead of need
(`warm`), answers many requests, and is killed as soon as one takes longer than it may; the next is
then started at once. One answer is computed at a time; threads wait for each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

from moss_jt.errors import ToolError, ToolLimitError
from moss_jt.tools import worker

SECONDS = 2.0
MEMORY = 256 << 20
START_SECONDS = 60.0  # Python with SymPy, on a slow disk
MAX_REPLY = 1 << 20
TOO_LONG = "the computation took longer than {seconds:g} s."
# The folder in which the program was started is not looked at: a sympy.py there is not ours.
_PROGRAM = """
import sys
sys.path[:] = [sys.argv[1], *filter(None, sys.path)]
from moss_jt.tools import worker
sys.exit(worker.serve(int(sys.argv[2])))
"""


class _Held:
    """The process of a sandbox, apart from it, so that it can be ended when the sandbox is gone."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        """End the process, if there is one."""
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


class Sandbox:
    """A process that computes.

    Args:
        seconds: that an answer may take; starting the process is not counted.
        memory: address space that the process may have, in bytes, Python and SymPy included.
    """

    def __init__(self, *, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        self._seconds = seconds
        self._memory = memory
        self._lock = threading.Lock()
        self._held = _Held()
        self._ready = False
        weakref.finalize(self, self._held.kill)  # also when the program ends

    @property
    def pid(self) -> int | None:
        """The number of the process, None where there is none."""
        return self._held.process.pid if self._held.process is not None else None

    def warm(self) -> None:
        """Start the process if it is not there, without waiting until it is ready."""
        with self._lock:
            self._start()

    def ask(self, task: str, text: str) -> str:
        """Compute one answer.

        Raises:
            ToolError: there is none, or time or memory did not suffice.
        """
        line = json.dumps({"task": task, "text": text}).encode("ascii") + b"\n"
        if len(line) > worker.MAX_LINE:
            raise ToolError(f"the text has {len(text)} characters; a tool that computes does not read as many.")
        with self._lock:
            self._start()
            try:
                self._await_ready()
                return self._exchange(line)
            except ToolError:
                raise
            except BaseException:
                self._kill()  # Ctrl-C: a late answer must not be taken for that of the next question
                raise

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._kill()

    def _start(self) -> None:
        """Start a process unless one is alive."""
        if self._held.process is not None and self._held.process.poll() is None:
            return
        self._kill()
        root = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1"}
        try:
            self._held.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, root, str(self._memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the chat, not for what it has running
            )
        except OSError as error:
            raise ToolError(f"the process that computes cannot be started: {error.strerror}.") from error

    def _await_ready(self) -> None:
        if self._ready:
            return
        if self._read(time.monotonic() + START_SECONDS) != worker.READY:
            self._kill()
            raise ToolError(
                "the process that computes does not start: SymPy is missing, or memory is too short. "
                "Try `python -c 'import sympy'`."
            )
        self._ready = True

    def _exchange(self, line: bytes) -> str:
        """Send a request and wait for its answer as long as it may take."""
        process = self._held.process
        assert process is not None and process.stdin is not None, "started before"
        reply = b""
        with contextlib.suppress(OSError):  # the process has died since: no reply then
            process.stdin.write(line)
            reply = self._read(time.monotonic() + self._seconds)
        if not reply.endswith(b"\n"):
            late = process.poll() is None
            self._renew()
            raise ToolLimitError(TOO_LONG.format(seconds=self._seconds) if late else worker.TOO_LARGE)
        answer = json.loads(reply)
        if not answer["sound"]:
            self._renew()  # it is about to end: the next question must not go to it
        if "answer" in answer:
            return str(answer["answer"])
        error = str(answer["error"])
        raise ToolLimitError(error) if error == worker.TOO_LARGE else ToolError(error)

    def _renew(self) -> None:
        """End the process and start another, which is warm by the time it is asked."""
        self._kill()
        with contextlib.suppress(ToolError):
            self._start()

    def _read(self, until: float) -> bytes:
        """A line of the process, or what came of it by then."""
        process = self._held.process
        assert process is not None and process.stdout is not None, "started before"
        reply = b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not reply.endswith(b"\n") and len(reply) < MAX_REPLY:
                left = until - time.monotonic()
                if left <= 0 or not selector.select(left):
                    break
                piece = os.read(process.stdout.fileno(), 1 << 16)
                if not piece:
                    process.wait()
                    break
                reply += piece
        return reply

    def _kill(self) -> None:
        self._ready = False
        self._held.kill()
