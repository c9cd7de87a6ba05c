"""Progress on the terminal: a bar with the time left, on stderr, for whatever takes more than two seconds.

A bar is drawn by a small thread, so that it lives on while the work is silent, and is wiped when the
work is over. Where stderr is not a terminal, a long task gets one line at its start and one at its
end. Compilation (unit "files" or "kernels") is shown at once: its first seconds look like a hang.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TextIO

from moss_jt.language import pick

if TYPE_CHECKING:
    from tqdm import tqdm

SHOW_AFTER_S = 2.0
REFRESH_S = 0.5
IMMEDIATE_UNITS = frozenset({"files", "kernels"})


@dataclass
class _Task:
    """One begun task."""

    name: str
    total: float
    unit: str
    began: float
    done: float = 0
    shown: bool = False


class TerminalProgress:
    """A `Progress` that draws on stderr. Tasks may nest; the innermost is shown.

    Args:
        stream: where to draw; stderr if not given.
        delay_s: a task shorter than this leaves no trace.
    """

    def __init__(self, stream: TextIO | None = None, *, delay_s: float = SHOW_AFTER_S) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._own: TextIO | None = None
        self._delay_s = delay_s
        self._tasks: list[_Task] = []
        self._bar: tqdm[NoReturn] | None = None
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._ticker: threading.Thread | None = None

    def begin(self, task: str, total: float, unit: str) -> None:
        """Start a task; see `moss_jt.progress.Progress`."""
        with self._lock:
            self._wipe()
            if self._own is None:
                self._own = _duplicate(self._stream)
            self._tasks.append(_Task(task, total, unit, time.monotonic()))
            self._draw()
            if self._ticker is None:
                self._over = threading.Event()
                self._ticker = threading.Thread(target=self._tick, args=(self._over,), daemon=True)
                self._ticker.start()

    def advance(self, amount: float) -> None:
        """Note that `amount` more units are done."""
        with self._lock:
            if self._tasks:
                self._tasks[-1].done += amount
                self._draw()

    def end(self) -> None:
        """Wipe the bar of the current task and go back to the one around it."""
        with self._lock:
            if not self._tasks:
                return
            self._wipe()
            task = self._tasks.pop()
            if task.shown and not self._is_terminal():
                self._note_end(task)
            if not self._tasks:
                self._over.set()
                self._ticker = None
                if self._own is not None:
                    self._own.close()
                    self._own = None

    @property
    def _out(self) -> TextIO:
        """Where to draw: a descriptor of our own, since compilers' chatter is kept away by moving the usual one."""
        return self._own if self._own is not None else self._stream

    def _is_terminal(self) -> bool:
        return self._out.isatty()

    def _tick(self, over: threading.Event) -> None:
        """Redraw twice a second until the last task is over."""
        while not over.wait(REFRESH_S):
            with self._lock:
                if not over.is_set():
                    self._draw()

    def _draw(self) -> None:
        """Bring the picture of the innermost task up to date, if it has lasted long enough to be shown."""
        task = self._tasks[-1]
        if not task.shown:
            if time.monotonic() - task.began < self._delay_s and task.unit not in IMMEDIATE_UNITS:
                return
            task.shown = True
            if not self._is_terminal():
                self._out.write(pick(f"{task.name} …\n", f"{task.name}……\n"))
                self._out.flush()
        if self._is_terminal():
            self._draw_bar(task)

    def _draw_bar(self, task: _Task) -> None:
        """Move tqdm's bar to the task's state."""
        if self._bar is None:
            self._bar = _new_bar(task, self._out)
        if task.done != self._bar.n:
            self._bar.update(task.done - self._bar.n)
        elif time.time() - self._bar.last_print_t >= REFRESH_S:
            self._bar.refresh()

    def _wipe(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _note_end(self, task: _Task) -> None:
        """Write the line that closes a task where there is no terminal."""
        seconds = time.monotonic() - task.began
        whole = not task.total or task.done >= task.total
        if whole:
            line = pick(f"{task.name}: done in {seconds:.1f} s", f"{task.name}：完成，用时 {seconds:.1f} 秒")
        else:
            line = pick(f"{task.name}: stopped after {seconds:.1f} s", f"{task.name}：{seconds:.1f} 秒后停止")
        self._out.write(line + "\n")
        self._out.flush()


def _duplicate(stream: TextIO) -> TextIO | None:
    """The same file through another descriptor; None for a stream that is no file."""
    try:
        stream.flush()
        return os.fdopen(os.dup(stream.fileno()), "w", encoding=stream.encoding, errors="replace")
    except OSError:  # io.UnsupportedOperation is one
        return None


def _new_bar(task: _Task, stream: TextIO) -> tqdm[NoReturn]:
    """A tqdm bar that starts where the task is and counts from when it began."""
    from tqdm import tqdm as bar_class

    bar = bar_class(
        desc=task.name,
        total=task.total or None,
        unit=task.unit if task.unit == "B" else f" {task.unit}",
        unit_scale=task.unit == "B",
        unit_divisor=1024,
        file=stream,
        leave=False,
        dynamic_ncols=True,
        mininterval=0.1,
        miniters=0,
        bar_format=None if task.total else "{desc}: {elapsed}",
        smoothing=0,  # the time left comes from the average since the task began
    )
    bar.n = task.done
    bar.start_t -= time.monotonic() - task.began
    bar.refresh()
    return bar
