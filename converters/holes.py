"""Give parts of a file back to the disk while it keeps its size: holes, which read as zeros.

A 10 GB checkpoint in one file can so be used up tensor by tensor. Works where the file system knows
holes (ext4, xfs, btrfs, tmpfs); `can_punch` asks by trying. Nothing in such a file tells that its zeros
are none, so a mark lies beside it, NAME.given-back, from before the first hole until the file is deleted.
"""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from functools import lru_cache
from pathlib import Path

from moss_jt.checked_file import printable
from moss_jt.errors import CheckpointError, DiskError
from moss_jt.layout import ALIGNMENT, round_up

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # FALLOC_FL_* of <linux/falloc.h>
_MARK_SUFFIX = ".given-back"


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


def mark_of(path: Path) -> Path:
    """The file that tells of holes in another one."""
    return path.with_name(path.name + _MARK_SUFFIX)


def is_marked(path: Path) -> bool:
    """Whether a file has been given back in part, so that its size and its zeros tell nothing."""
    return os.path.lexists(mark_of(path))


def check_unmarked(path: Path) -> None:
    """See that a file is whole.

    Raises:
        CheckpointError: parts of it were given back.
    """
    if is_marked(path):
        raise CheckpointError(
            f"parts of {printable(path)} were given back to the disk by a conversion with --delete-source and read as "
            f"zeros. Go on with that conversion by --resume; or fetch the file again and delete "
            f"{printable(mark_of(path).name)} beside it."
        )


def discard_marked(path: Path) -> None:
    """Delete a file that has been given back in part, and its mark; a whole one stays.

    Raises:
        OSError: it cannot be deleted.
    """
    if is_marked(path):
        path.unlink(missing_ok=True)
        mark_of(path).unlink()


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
