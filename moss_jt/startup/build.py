"""The child process that compiles Jittor's core (`compiling.py` starts it and holds the lock).

Two processes: a guard, which ends the whole process group as soon as the parent is gone, and the builder,
which imports Jittor and thereby compiles it, with its own use of all cores and a report of each file.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

from moss_jt.errors import StartupError
from moss_jt.startup import machine
from moss_jt.startup.compiling import stamp_file
from moss_jt.startup.loading import load
from moss_jt.startup.plan import Device, Plan, make_plan
from moss_jt.startup.selfcheck import check

_PR_SET_PDEATHSIG = 1
_AGAIN = 75  # exit status of a builder that must be started once more
_ROUNDS = 3


def main() -> None:
    """Run guard and builder; arguments: sys.path, device, key, descriptors of the life line and of the news."""
    device, key, alive, news = cast(Device, sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    status = _AGAIN
    for _ in range(_ROUNDS):
        builder = os.fork()
        if builder == 0:
            os._exit(_build_and_report(device, key, news))
        status = _guard(builder, alive)
        if status != _AGAIN:
            break
    sys.exit(status)


def _guard(builder: int, alive: int) -> int:
    """Wait for the builder; if the parent goes first, end everything."""
    while True:
        done, status = os.waitpid(builder, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        if select.select([alive], [], [], 0.1)[0]:
            os.killpg(0, signal.SIGKILL)


def _build_and_report(device: Device, key: str, news: int) -> int:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    try:
        plan = make_plan(device)
        if plan.key != key:
            raise StartupError("the machine changed while Jittor was being compiled; start again")
        _build(plan, _Reporter(news))
    except SystemExit:  # "jit_utils updated, please rerun": its helper library was stale and is now rebuilt
        return _AGAIN
    except StartupError as error:
        print(f"Error: {error}", flush=True)
        return 1
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


class _Reporter:
    """Sends progress to the parent, one JSON line each; tasks by the names that `compiling.py` puts into words."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._is_open = False
        self._left = 0.0

    def begin(self, task: str, total: float, unit: str) -> None:
        """Start a task; the one before is thereby done."""
        if self._is_open and self._left > 0:
            self.advance(self._left)
        self.end()
        self._is_open, self._left = True, total
        self._send(event="begin", task=task, total=total, unit=unit)

    def advance(self, amount: float) -> None:
        self._left -= amount
        self._send(event="advance", amount=amount)

    def end(self) -> None:
        if self._is_open:
            self._send(event="end")
            self._is_open = False

    def _send(self, **news: str | float) -> None:
        os.write(self._descriptor, json.dumps(news).encode() + b"\n")


def _build(plan: Plan, report: _Reporter) -> None:
    report.begin("prepare", 1, "files")
    jittor = load(plan, _on_all_cores(report), with_cache=_mend)
    report.begin("kernels", 1, "kernels")
    check(jittor)
    report.advance(1)
    report.end()
    _write_stamp(plan, jittor)


def _on_all_cores(report: _Reporter) -> Callable[[list[str], str, str, str], None]:
    """Jittor's `run_cmds` with as many processes as cores and memory allow, and a report per file."""

    def run(commands: list[str], cache_path: str, jittor_path: str, title: str = "") -> None:
        compile_one = cast(Any, sys.modules["jittor_utils"]).do_compile
        report.begin("core" if title == "Compiling jittor_core" else "operators", len(commands), "files")
        with ProcessPoolExecutor(machine.compile_jobs(), get_context("fork"), initializer=_die_with_parent) as pool:
            jobs = [pool.submit(compile_one, [command, cache_path, jittor_path]) for command in commands]
            try:
                for job in as_completed(jobs):
                    job.result()
                    report.advance(1)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    return run


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _mend(cache: Path) -> None:
    """Remove what a killed compilation left half-written in a cache folder, so that Jittor makes it again.

    Jittor writes an output, then its `.key`, and trusts an output whose key matches. Jittor's own lock is
    held meanwhile: another process may be compiling a kernel here.
    """
    utils_lock: Any = importlib.import_module("jittor_utils.lock")
    with utils_lock.lock_scope():
        for output in cache.rglob("*"):
            if output.suffix in (".o", ".so") and _is_broken(output):
                for file in (output, _key_of(output)):
                    with suppress(FileNotFoundError):
                        file.unlink()


def _key_of(output: Path) -> Path:
    return output.with_name(output.name + ".key")


def _is_broken(output: Path) -> bool:
    try:
        made = output.stat()
        key = _key_of(output).stat()
    except FileNotFoundError:
        return output.name != "data.o"  # the one output without a key: Jittor keeps a checksum beside it
    return made.st_size == 0 or key.st_size == 0 or made.st_mtime_ns > key.st_mtime_ns


def _write_stamp(plan: Plan, jittor: Any) -> None:
    cache = str(plan.home / ".cache")
    places = {str(getattr(module, "__file__", None)) for module in list(sys.modules.values())}
    compiled = sorted(place for place in places if place.startswith(cache) and place.endswith(".so"))
    sizes = {place: _safe_size(Path(place)) for place in compiled}
    stamp = stamp_file(plan)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    temporary = stamp.with_suffix(".new")
    temporary.write_text(
        json.dumps({"files": sizes, "jittor": jittor.__version__, "device": plan.device}, indent=1), "utf-8"
    )
    temporary.replace(stamp)


def _safe_size(file: Path) -> int:
    """Bytes of a file, once they are on the disk: what the stamp speaks of must outlast a loss of power."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
