"""Limits: what this machine can do at best, measured in a process of its own.

    with Limits() as limits:
        limits.memory().per_second      # bytes read from memory by all cores
        limits.int8().per_second        # operations on 8-bit numbers, a multiplication and an addition each
        limits.disk(file).per_second    # bytes of a file past the page cache, several reads in flight

The process stays, so that a measurement costs no more than its own time and can alternate with the
work that it is compared with. Its memory (for `memory` only) is not that of the caller.
"""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from moss_jt.errors import StartupError
from moss_jt.native import build_library
from moss_jt.startup.machine import logical_cores

READERS = 4  # reads of a disk in flight
PIECE_BYTES = 4 << 20  # of one of them
MEMORY_MIB = 512  # read again and again: more than any cache holds
LOAD_MIB = 256  # the same, where it only has to keep the memory busy
_LEAD_S = 0.05  # for which it begins before, and ends after
_CHILD = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).moss_limits()"


@dataclass(frozen=True)
class Measured:
    """A measurement.

    Attributes:
        amount: bytes, or operations.
        seconds: that it took.
        cpu_seconds: the processor time in it, summed over the threads.
        how: which instructions, or "direct" or "buffered" for a disk.
    """

    amount: float
    seconds: float
    cpu_seconds: float
    how: str

    @property
    def per_second(self) -> float:
        """Amount per second."""
        return self.amount / self.seconds

    @property
    def per_cpu_second(self) -> float:
        """Amount per second that a thread was running: on a busy machine what one core can do."""
        return self.amount / self.cpu_seconds


class Limits:
    """The measuring process.

    Args:
        threads: for memory and arithmetic; None for all cores.

    Raises:
        KernelError, StartupError: it cannot be compiled.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or logical_cores()
        command = [sys.executable, "-I", "-c", _CHILD, str(build_library("limits"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._disk_at: dict[Path, int] = {}

    def memory(self, seconds: float = 0.25, *, mib: int = MEMORY_MIB) -> Measured:
        """Bytes read from huge pages."""
        return self._ask(f"memory {self._threads} {seconds} {mib}")

    def fp32(self, seconds: float = 0.1) -> Measured:
        """Operations on float32 numbers, without memory."""
        return self._ask(f"fp32 {self._threads} {seconds}")

    def int8(self, seconds: float = 0.1) -> Measured:
        """Operations on 8-bit numbers with 32-bit sums, without memory."""
        return self._ask(f"int8 {self._threads} {seconds}")

    def disk(self, file: Path, seconds: float = 1.0, *, readers: int = READERS) -> Measured:
        """Bytes read from a file, from where the last call ended; the page cache is passed by.

        Raises:
            StartupError: the file cannot be read, or is smaller than a piece.
        """
        at = self._disk_at.get(file, 0)
        found = self._ask(f"disk {readers} {seconds} {PIECE_BYTES} {at} {file}")
        self._disk_at[file] = at + int(found.amount)
        return found

    def disk_beside(self, load: Limits, file: Path, seconds: float = 1.0, *, readers: int = READERS) -> Measured:
        """The same while another measuring process keeps all cores and the memory busy.

        Raises:
            StartupError: as `disk`.
        """
        with ThreadPoolExecutor(1) as other:
            busy = other.submit(load.memory, seconds + 2 * _LEAD_S, mib=LOAD_MIB)
            time.sleep(_LEAD_S)
            found = self.disk(file, seconds, readers=readers)
            busy.result()
        return found

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None, "made with pipes"
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Limits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, order: str) -> Measured:
        assert self._process.stdin is not None and self._process.stdout is not None, "made with pipes"
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        return parse_answer(order, self._process.stdout.readline())


def parse_answer(order: str, line: str) -> Measured:
    """Read a line of the measuring process.

    Raises:
        StartupError: it says that it could not, or says nothing.
    """
    words = line.split()
    if len(words) == 5 and words[0] == "ok":
        return Measured(float(words[1]), float(words[2]), float(words[3]), words[4])
    why = line.removeprefix("error ").strip() or "the measuring process ended"
    raise StartupError(f"the limit of this machine could not be measured ({order!r}): {why}.")
