"""What `import jittor` does to the whole process, undone.

Importing Jittor 1.3.11 turns off certificate checks of https, sets the recursion limit to a million
and the stack limit to 512 MiB, puts its own handlers on eight signals (Ctrl-C then kills the process
without a KeyboardInterrupt, and so does any child that dies of a signal), and needs a dozen
environment variables. `contained()` gives all of it back, whether the import succeeds or not.
"""

from __future__ import annotations

import ctypes
import os
import signal
import ssl
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGQUIT,
    signal.SIGCHLD,
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
)
_SIGACTION_BYTES = 256  # glibc's struct sigaction is 152 bytes on 64-bit machines


class SignalHandlers:
    """The handlers of the signals that Jittor takes, saved bytewise at C level.

    C level, because Jittor sets them with sigaction(2) behind Python's back; bytewise, because the old
    handler may be Python's, faulthandler's or another library's. Works in any thread.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._saved = {number: ctypes.create_string_buffer(_SIGACTION_BYTES) for number in _SIGNALS}
        for number, action in self._saved.items():
            self._libc.sigaction(int(number), None, action)

    def restore(self) -> None:
        """Put the saved handlers back."""
        for number, action in self._saved.items():
            self._libc.sigaction(int(number), action, None)


@contextmanager
def environment(changes: Mapping[str, str], *, without: Iterable[str] = ()) -> Iterator[None]:
    """Change environment variables for a while; afterwards all of them are as before."""
    before = dict(os.environ)
    for name in without:
        os.environ.pop(name, None)
    os.environ.update(changes)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


@contextmanager
def _limits_kept() -> Iterator[None]:
    import resource

    recursion, stack = sys.getrecursionlimit(), resource.getrlimit(resource.RLIMIT_STACK)
    try:
        yield
    finally:
        sys.setrecursionlimit(recursion)
        with suppress(ValueError, OSError):  # the hard limit can have been lowered for good: then the soft one is right
            resource.setrlimit(resource.RLIMIT_STACK, stack)


@contextmanager
def _https_kept() -> Iterator[None]:
    name = "_create_default_https_context"
    context = getattr(ssl, name)
    try:
        yield
    finally:
        setattr(ssl, name, context)


@contextmanager
def _interpreter_kept(*, executable: Path, path_front: Path) -> Iterator[None]:
    flags, own_executable = sys.getdlopenflags(), sys.executable
    front = str(path_front)
    sys.path.insert(0, front)
    sys.executable = str(executable)
    try:
        yield
    finally:
        sys.executable = own_executable
        sys.setdlopenflags(flags)
        sys.path[:] = [entry for entry in dict.fromkeys(sys.path) if entry != front]


@contextmanager
def contained(
    changes: Mapping[str, str], *, without: Iterable[str], executable: Path, path_front: Path
) -> Iterator[SignalHandlers]:
    """Run an import of Jittor so that afterwards the process is as it was.

    Args:
        changes: environment variables for the import alone.
        without: variables of the user that must not reach Jittor.
        executable: what Jittor shall take for the Python interpreter when it starts helpers.
        path_front: the folder from which `jittor` and `jittor_utils` are imported.

    Yields:
        The saved signal handlers, so that they can be put back early.
    """
    handlers = SignalHandlers()
    with (
        environment(changes, without=without),
        _limits_kept(),
        _https_kept(),
        _interpreter_kept(executable=executable, path_front=path_front),
    ):
        try:
            yield handlers
        finally:
            handlers.restore()
