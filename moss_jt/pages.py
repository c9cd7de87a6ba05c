"""Pages: anonymous memory of this process, huge pages where that helps, given back piece by piece.

Huge pages matter twice: kernels read from them half as fast again, and direct reads into them are more
than twice as fast (docs/kernels.md). A stretch begins on a page of its kind, whatever the system hands out.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from moss_jt.errors import DeviceMemoryError
from moss_jt.memory import HUGE_PAGE, format_size

_NORESERVE = 0x4000  # MAP_NORESERVE, which older Pythons do not name
_HUGE, _SMALL = getattr(mmap, "MADV_HUGEPAGE", None), getattr(mmap, "MADV_NOHUGEPAGE", None)


class Pages:
    """A stretch of private memory, zeros, in memory only where it is touched.

    Attributes:
        array: (nbytes,) uint8; it keeps the memory alive.

    Args:
        nbytes: of it; 0 is allowed.
        purpose: what it is for, and `advice`: what to do where it cannot be had; for the error.
        huge: whether its pages may be huge. What becomes resident then are up to HUGE_PAGE bytes at a touch.
        reserve: False where most of it may never be touched.

    Raises:
        DeviceMemoryError: the system does not give it.
    """

    def __init__(self, nbytes: int, purpose: str, advice: str, *, huge: bool = True, reserve: bool = True) -> None:
        page = HUGE_PAGE if huge else mmap.PAGESIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (0 if reserve else _NORESERVE)
        try:
            self._map = mmap.mmap(-1, nbytes + page, flags=flags)
        except (OSError, ValueError, OverflowError) as error:
            raise DeviceMemoryError(
                f"the system does not give {format_size(nbytes)} for {purpose} ({error}). {advice}"
            ) from error
        whole = np.frombuffer(self._map, np.uint8)
        self._start = -whole.ctypes.data % page
        self.array: npt.NDArray[np.uint8] = whole[self._start : self._start + nbytes]
        self._advise(_HUGE if huge else _SMALL)

    def touch(self) -> None:
        """Have all of it in memory now."""
        self.array[:: mmap.PAGESIZE] = 0

    def give_back(self, start: int, nbytes: int) -> None:
        """Return whole pages to the system, `start` and `nbytes` in bytes; they read as zeros from now on."""
        if nbytes > 0:
            self._map.madvise(mmap.MADV_DONTNEED, self._start + start, nbytes)

    def stay_small(self) -> None:
        """From now on what becomes resident is small pages only: nothing returns with a neighbour."""
        self._advise(_SMALL)

    def _advise(self, advice: int | None) -> None:
        """A hint: a kernel, or a Python, without it changes nothing."""
        if advice is not None and len(self.array) > 0:
            with suppress(OSError):
                self._map.madvise(advice, self._start, len(self.array))
