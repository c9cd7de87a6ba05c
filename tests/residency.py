"""What of an array, or of a file, is in memory: the system is asked, nothing is touched."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt


def resident_bytes(array: npt.NDArray[np.uint8]) -> int:
    """Bytes of an array, which starts with a page, that are in memory."""
    return _resident(array.ctypes.data, array.nbytes)


def cached_bytes(file: Path) -> int:
    """Bytes of a file of ours that lie in the page cache."""
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapped,
    ):
        return _resident(ctypes.addressof(ctypes.c_char.from_buffer(mapped)), len(mapped))


def _resident(address: int, nbytes: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    there = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
    found = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), there)
    assert found == 0, os.strerror(ctypes.get_errno())
    return sum(byte & 1 for byte in there) * mmap.PAGESIZE
