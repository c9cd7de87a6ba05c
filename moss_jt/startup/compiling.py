"""The one-time compilation of Jittor's core, watched from outside.

It runs in a child process with a lock of ours held, so that two first starts do not disturb each other. The
child and its compilers inherit the lock: it is free only when none of them is left, whoever was killed. A
stamp, named by the plan's key, says that a core is whole; it is written last. Files that a killed compilation
left half-written are found and removed by the next child (`build.py`).
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from moss_jt.errors import StartupError
from moss_jt.language import pick
from moss_jt.progress import Progress
from moss_jt.startup import machine
from moss_jt.startup.plan import Plan, is_prepared, prepare

_POLL_S = 0.1
_CPU_SECONDS = 300  # what compiling everything takes on one core, roughly
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from moss_jt.startup.build import main; main()"


def log_file(home: Path) -> Path:
    """Where the output of the last compilation is kept."""
    return home / "build.log"


def stamp_file(plan: Plan) -> Path:
    """The file that says that the core of this plan is whole."""
    return plan.home / "built" / f"{plan.key}.json"


def is_built(plan: Plan) -> bool:
    """Whether the core of this plan is compiled and all of it is still there."""
    try:
        stamp = json.loads(stamp_file(plan).read_text("utf-8"))
        is_whole = all(Path(name).stat().st_size == size for name, size in stamp["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return is_whole and is_prepared(plan)


def ensure_built(plan: Plan, progress: Progress) -> None:
    """Compile the core unless it is there; wait where another process is doing so.

    Raises:
        StartupError: no room, or the compilation failed; the message names the log.
    """
    if is_built(plan):
        return
    machine.require_room(plan.home)
    with _lock(plan.home / "build.lock", progress) as lock:
        if not is_built(plan):  # the one we waited for may have done it
            prepare(plan)
            _compile(plan, lock, progress)


@contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[int]:
    """Hold the lock; released when this descriptor and all inherited ones are closed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not _try_lock(descriptor):
            _wait_for_lock(descriptor, progress)
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_for_lock(descriptor: int, progress: Progress) -> None:
    expected = _CPU_SECONDS / machine.logical_cores()
    task = pick("Another process is compiling Jittor, waiting for it", "另一进程正在编译 Jittor，等待其完成")
    progress.begin(task, expected, "s")
    try:
        while not _try_lock(descriptor):
            time.sleep(_POLL_S)
            progress.advance(_POLL_S)
    finally:
        progress.end()


def _compile(plan: Plan, lock: int, progress: Progress) -> None:
    alive_read, alive_write = os.pipe()  # the child ends itself when our end closes, however we die
    news_read, news_write = os.pipe()
    try:
        with log_file(plan.home).open("wb") as log:
            child = _start_child(plan, log, inherit=(lock, alive_read, news_write))
        os.close(alive_read)
        os.close(news_write)
        alive_read = news_write = -1
        try:
            _relay(news_read, child, progress)
            status = child.wait()
        finally:
            _end(child)
        if status != 0 or not is_built(plan):
            raise StartupError(_failure(plan, status))
    finally:
        for descriptor in (alive_read, alive_write, news_read, news_write):
            if descriptor >= 0:
                os.close(descriptor)


def _start_child(plan: Plan, log: IO[bytes], *, inherit: tuple[int, int, int]) -> subprocess.Popen[bytes]:
    lock, alive, news = inherit
    path = json.dumps([entry or str(Path.cwd()) for entry in sys.path])
    return subprocess.Popen(
        [sys.executable, "-u", "-c", _CHILD, path, plan.device, plan.key, str(alive), str(news)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=(lock, alive, news),
        start_new_session=True,  # a Ctrl-C at the terminal reaches us alone, and we can end the whole group
    )


def _relay(news: int, child: subprocess.Popen[bytes], progress: Progress) -> None:
    """Hand the child's reports to `progress` until the child is over."""
    waiting, is_open = b"", False
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(news, selectors.EVENT_READ)
            while True:
                if not selector.select(_POLL_S):
                    if child.poll() is not None:
                        return
                    continue
                data = os.read(news, 4096)
                if not data:
                    return
                *lines, waiting = (waiting + data).split(b"\n")
                for line in lines:
                    is_open = _report(json.loads(line), progress)
    finally:
        if is_open:
            progress.end()


def _report(news: dict[str, str | float], progress: Progress) -> bool:
    """Pass one report on; returns whether a task is open afterwards."""
    if news["event"] == "begin":
        progress.begin(_words_for(str(news["task"])), float(news["total"]), str(news["unit"]))
    elif news["event"] == "advance":
        progress.advance(float(news["amount"]))
    else:
        progress.end()
    return news["event"] != "end"


def _words_for(task: str) -> str:
    """What the user reads of a task of the child, which does not know the user's language."""
    return {
        "prepare": pick("Preparing to compile Jittor", "准备编译 Jittor"),
        "core": pick("Compiling Jittor (once on this computer)", "编译 Jittor（本机仅需一次）"),
        "operators": pick("Compiling Jittor's operators (once)", "编译 Jittor 算子（仅需一次）"),
        "kernels": pick("Compiling first kernels (once)", "编译首批内核（仅需一次）"),
    }[task]


def _end(child: subprocess.Popen[bytes]) -> None:
    """Make sure that nothing of the child is left, also after a Ctrl-C."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _failure(plan: Plan, status: int) -> str:
    log = log_file(plan.home)
    line = _telling_line(log)
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL) or "Killed signal" in line:
        total, free = machine.memory_bytes()
        return (
            f"compiling Jittor was killed, which happens when memory runs out ({free >> 20} of {total >> 20} MiB "
            f"are free now); close other programs and start again, it goes on where it stopped (log: {log})"
        )
    return f"compiling Jittor failed: {line} (whole output: {log})"


def _telling_line(log: Path) -> str:
    """The line of the log that most likely says what is wrong."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    for mark in ("No space left", "fatal error", "error:", "Error:"):
        for line in lines:
            if mark in line:
                return line
    return lines[-1] if lines else "no output"
