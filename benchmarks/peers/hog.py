"""Take memory away: lock so much that only a given part stays available, as on a smaller machine.

    with Hog(leave_bytes): ...

Locked pages cannot be dropped or swapped. The hog is the first that the system would kill, and ends with us.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from moss_jt.memory import MIB, available_memory

CHUNK = 64 * MIB
PR_SET_PDEATHSIG = 1


class Hog:
    """A process that holds memory, from when it is made until `close`.

    Args:
        leave: bytes that stay available.

    Raises:
        SystemExit: it could not lock so much.
    """

    def __init__(self, leave: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(leave)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None, "made with a pipe"
        answer = self._process.stdout.readline().split()
        if answer[:1] != ["holding"]:
            raise SystemExit(f"memory could not be taken away: {' '.join(answer) or 'the hog ended'}")
        self.held = int(answer[1])

    def close(self) -> None:
        """Give the memory back."""
        self._process.terminate()
        self._process.communicate()

    def __enter__(self) -> Hog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def hold(leave: int) -> None:
    """Lock memory until only `leave` bytes are available, say so, and wait for the end."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    Path("/proc/self/oom_score_adj").write_text("1000", "ascii")
    chunks: list[mmap.mmap] = []
    while available_memory() > leave + CHUNK:
        chunk = mmap.mmap(-1, CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(chunk))
        if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(CHUNK)):
            print(f"mlock failed with error {ctypes.get_errno()}; `ulimit -l` must allow it", flush=True)
            return
        chunks.append(chunk)
    print(f"holding {len(chunks) * CHUNK}", flush=True)
    signal.pause()


if __name__ == "__main__":
    hold(int(sys.argv[1]))
