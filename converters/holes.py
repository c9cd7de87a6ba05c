"""Give parts of a file back to the disk while it keeps its size: holes, which read as zeros.

A 10 GB checkpoint in one file can so be used up tensor by tensor. Works where the file system knows
holes (ext4, xfs, btrfs, tmpfs); `can_punch` asks by trying.
"""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from functools import lru_cache
from pathlib import Path

from moss_jt.errors import DiskError
from moss_jt.layout import ALIGNMENT, round_up

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # FALLOC_FL_* of <linux/falloc.h>


def can_punch(folder: Path) -> bool:
    """Whether files of a folder can be given back in parts."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2 * ALIGNMENT))
            file.flush()
            return _fallocate(file.fileno(), 0, ALIGNMENT) == 0
    except OSError:
        return False


def punch(path: Path, start: int, nbytes: int) -> int:
    """Give back the whole pages within a range of a file; how many bytes those are.

    Raises:
        DiskError: the file cannot be opened for writing, or the system refuses.
    """
    first = round_up(start, ALIGNMENT)
    count = (start + nbytes) // ALIGNMENT * ALIGNMENT - first
    if count <= 0:
        return 0
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            code = _fallocate(fd, first, count)
        finally:
            os.close(fd)
    except OSError as error:
        raise DiskError(
            f"{path} cannot be given back to the disk: {error.strerror}. Convert without --delete-source."
        ) from error
    if code:
        raise DiskError(
            f"{path} cannot be given back to the disk: {os.strerror(code)}. Convert without --delete-source."
        )
    return count


def has_hole(path: Path, start: int, nbytes: int) -> bool:
    """Whether a part of a range of a file is not on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return nbytes > 0 and os.lseek(fd, start, os.SEEK_HOLE) < start + nbytes
    finally:
        os.close(fd)


def is_sparse(path: Path) -> bool:
    """Whether a file takes less room than its size."""
    status = path.stat()
    return status.st_blocks * 512 < status.st_size


def _fallocate(fd: int, start: int, nbytes: int) -> int:
    """Punch a hole; 0 or the error's number."""
    function = _find_fallocate()
    if function is None:
        return errno.ENOSYS
    ctypes.set_errno(0)
    if function(fd, _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_int64(start), ctypes.c_int64(nbytes)) == 0:
        return 0
    return ctypes.get_errno() or errno.EIO


@lru_cache(maxsize=1)
def _find_fallocate() -> ctypes._NamedFuncPointer | None:
    """The C library's function with 64-bit offsets."""
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        function.restype = ctypes.c_int
    return function
