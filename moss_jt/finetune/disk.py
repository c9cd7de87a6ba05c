"""What a full or broken disk does to a run, in our words: which file or folder, why, and what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moss_jt.errors import DiskError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_TAKEN = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY)


@contextmanager
def writing(place: Path, kept: str = "") -> Iterator[None]:
    """Turn what the system says into a DiskError; of a failed write it often names no file.

    Args:
        place: file or folder that is written.
        kept: a sentence on what is there all the same.
    """
    try:
        yield
    except OSError as error:
        advice = "Check the disk."
        if error.errno in _FULL:
            advice = "Make room on its disk."
        elif error.errno in _FORBIDDEN:
            advice = "Give a folder that you may write to."
        elif error.errno in _TAKEN:
            advice = "Something else lies in its place: move that, or give another place."
        words = f"{place} cannot be written: {error.strerror or error}. {advice} {kept}"
        raise DiskError(words.rstrip()) from error


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """The same for a file that is read."""
    try:
        yield
    except OSError as error:
        advice = "Make it readable for you." if error.errno in _FORBIDDEN else "Check the disk."
        raise DiskError(f"{file} cannot be read: {error.strerror or error}. {advice}") from error
