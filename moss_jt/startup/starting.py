"""`import_jittor`: the one way by which moss-jt comes to Jittor."""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from types import ModuleType

from moss_jt.errors import StartupError
from moss_jt.progress import Progress, Quiet
from moss_jt.startup.compiling import ensure_built, is_built, log_file, stamp_file
from moss_jt.startup.loading import load
from moss_jt.startup.plan import Device, DeviceWish, Plan, make_plan


class _Started:
    """What has happened in this process so far."""

    module: ModuleType | None = None
    device: Device | None = None
    reason: str = ""
    failure: str | None = None
    lock = threading.RLock()


def import_jittor(*, device: DeviceWish = "auto", progress: Progress | None = None) -> ModuleType:
    """Import Jittor safely; the first time on a computer it is compiled, which takes minutes.

    Afterwards the process is as it was: signal handlers, environment, recursion limit, https checks. May be
    called any number of times and by several threads.

    Args:
        device: "cuda", "cpu", or "auto": CUDA where a driver, a device and a toolkit really answer.
        progress: told about the compilation.

    Returns:
        The module `jittor`, checked to compute correctly.

    Raises:
        StartupError: Jittor cannot be started correctly here; the message names the remedy.
    """
    with _Started.lock:
        if _Started.module is None:
            _start(device, Quiet() if progress is None else progress)
        assert _Started.module is not None, "started without a module"
        if device not in ("auto", _Started.device):
            raise StartupError(
                f"Jittor already runs on {_Started.device} in this process, {device} was asked for: "
                f"start a new process, and ask for {device} first"
            )
        return _Started.module


def device_in_use() -> Device:
    """The device that Jittor was started for.

    Raises:
        StartupError: it was not started yet.
    """
    if _Started.device is None:
        raise StartupError("Jittor is not started yet: call moss_jt.startup.import_jittor() first")
    return _Started.device


def device_reason() -> str:
    """Why this device: the GPU's name, or what stands against CUDA; empty before the start."""
    return _Started.reason


def compile_needed(device: DeviceWish = "auto") -> bool:
    """Whether the next `import_jittor` has to compile Jittor first.

    Raises:
        StartupError: Jittor cannot be started here.
    """
    return _Started.module is None and "jittor" not in sys.modules and not is_built(make_plan(device))


def _start(device: DeviceWish, progress: Progress) -> None:
    if _Started.failure is not None:
        raise StartupError(_Started.failure)
    if "jittor" in sys.modules:
        _adopt(sys.modules["jittor"])
        return
    if "jittor_utils" in sys.modules:
        raise StartupError(
            "jittor_utils was imported before moss-jt could prepare it: "
            "call moss_jt.startup.import_jittor() before anything imports jittor or jittor_utils"
        )
    plan = make_plan(device)
    ensure_built(plan, progress)
    try:
        module = _load_and_check(plan)
    except BaseException as error:  # half of Jittor is in memory now: a second try would meet that
        interrupted = "the start of Jittor was interrupted in this process: start a new one"
        _Started.failure = str(error) if isinstance(error, StartupError) else interrupted
        raise
    _Started.module, _Started.device, _Started.reason = module, plan.device, plan.reason


def _load_and_check(plan: Plan) -> ModuleType:
    from moss_jt.startup.selfcheck import check

    try:
        module = load(plan)
    except SystemExit:
        raise StartupError("Jittor's compiled core was out of date and has been renewed: start again") from None
    except ModuleNotFoundError as error:
        raise StartupError(
            f"Jittor needs the package {error.name}: {sys.executable} -m pip install {error.name}"
        ) from error
    except Exception as error:  # Jittor raises bare Exception, AssertionError and RuntimeError alike
        with suppress(OSError):
            stamp_file(plan).unlink()  # the next start looks through what was compiled
        raise StartupError(
            f"importing Jittor failed: {_first_line(error)} (its last compilation's log: {log_file(plan.home)}). "
            f"Start again; if that does not help, delete {plan.home}: it is made anew"
        ) from error
    check(module)
    return module


def _adopt(module: ModuleType) -> None:
    """Take a Jittor that somebody else imported, if it computes correctly."""
    from moss_jt.startup.selfcheck import check

    check(module)
    _Started.module = module
    _Started.device = "cuda" if module.flags.use_cuda else "cpu"
    _Started.reason = "jittor was already imported"


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else 'no message'}"
