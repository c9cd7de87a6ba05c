"""What an import of Jittor does to a process is undone, also when the import fails."""

from __future__ import annotations

import os
import resource
import signal
import ssl
import sys
from pathlib import Path

import pytest

from moss_jt.startup.isolation import contained


def harm(folder: str) -> None:
    """What Jittor does, and what it might."""
    os.environ["JITTOR_TEST_NEW"] = "1"
    os.environ["JITTOR_TEST_OLD"] = "changed"
    sys.path.append(folder)
    sys.path.append(folder)
    sys.setrecursionlimit(10**6)
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 24, hard))
    setattr(ssl, "_create_default_https_context", ssl._create_unverified_context)  # noqa: B010 - mypy knows better
    for number in (signal.SIGINT, signal.SIGCHLD, signal.SIGTERM, signal.SIGSEGV):
        libc_ignore(number)


def state() -> tuple[object, ...]:
    return (
        {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        sys.getrecursionlimit(),
        sys.getdlopenflags(),
        sys.executable,
        resource.getrlimit(resource.RLIMIT_STACK),
        ssl._create_default_https_context,
    )


@pytest.mark.parametrize("fails", [False, True])
def test_all_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    monkeypatch.setenv("JITTOR_TEST_OLD", "kept")
    monkeypatch.setenv("JITTOR_TEST_GONE", "back again")
    monkeypatch.setattr(sys, "path", list(dict.fromkeys(sys.path)))
    before, path = state(), list(sys.path)
    try:
        with contained(
            {"JITTOR_TEST_SET": "x"}, without=["JITTOR_TEST_GONE"], executable=Path("/tools/py"), path_front=tmp_path
        ):
            assert os.environ["JITTOR_TEST_SET"] == "x"
            assert "JITTOR_TEST_GONE" not in os.environ
            assert sys.path[0] == str(tmp_path)
            assert sys.executable == "/tools/py"
            harm(str(tmp_path / "cache"))
            if fails:
                raise ImportError("no such luck")
    except ImportError:
        assert fails
    assert state() == before
    assert sys.path == [*path, str(tmp_path / "cache")]


def test_signals_are_given_back(tmp_path: Path) -> None:
    got: list[int] = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        with contained({}, without=[], executable=Path(sys.executable), path_front=tmp_path) as handlers:
            libc_ignore(signal.SIGTERM)
            handlers.restore()
            os.kill(os.getpid(), signal.SIGTERM)
            libc_ignore(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert got == [signal.SIGTERM, signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, old)


def libc_ignore(number: int) -> None:
    """Take a signal as Jittor does: in C, unseen by Python."""
    import ctypes

    ctypes.CDLL(None).signal(number, ctypes.c_void_p(1))
