"""Files that nobody vouches for: opened with care, read by position, never mapped into memory.

A checkpoint comes from a stranger and may be 30 GB. So a file is opened only if it is a regular one
(the Hugging Face cache is made of symbolic links to such files; a pipe, a device or a loop of links
is refused), it is read in pieces into memory that the caller owns, and JSON is parsed within bounds.
Every failure is one line that names the file.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from moss_jt.errors import CheckpointError, DiskError, MossError

MAX_JSON_BYTES = 16 << 20  # the index of a 16B checkpoint has 60 KB, its safetensors header 100 KB
MAX_JSON_ITEMS = 1_000_000  # so that 16 MB of brackets do not become a gigabyte of lists
_FAULTS = {
    errno.ENOENT: "is missing. Is the path right and the folder complete?",
    errno.ENOTDIR: "is missing: a part of its path is not a folder. Is the path right?",
    errno.EACCES: "may not be read by this user. Change its permissions.",
    errno.EPERM: "may not be read by this user. Change its permissions.",
    errno.ELOOP: "is a symbolic link that leads back to itself. Fetch the file again.",
    errno.ENAMETOOLONG: "has too long a name.",
    errno.ENXIO: "is a device where a file was expected.",
}
_PIECE = 1 << 30  # one preadv moves at most 2 GiB
_HTML_STARTS = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")

Stamp = tuple[int, int, int, int]


class CheckedFile:
    """A regular file open for reading by position; a context manager.

    Attributes:
        path: as given.
        size: bytes when it was opened.
        stamp: tells it from every other file, and from itself after a change.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`.

        Raises:
            CheckpointError: it is missing, not a regular file, or may not be read.
            DiskError: the system failed for another reason.
        """
        self.path = path
        self._fd = -1
        try:
            _check_regular(path, os.stat(path))  # noqa: PTH116 (asked before opening: opening a device can act)
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
            status = os.fstat(self._fd)
        except (OSError, ValueError) as error:
            raise _opening_failed(path, error) from error
        try:
            _check_regular(path, status)
        except CheckpointError:
            self.close()
            raise
        self.size = status.st_size
        self.stamp = _stamp(status)

    def __enter__(self) -> CheckedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the descriptor back; closing twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def check_unchanged(self) -> None:
        """See that nobody has written to the file since it was opened.

        That another file may have its name by now does not matter: this one is open.

        Raises:
            CheckpointError: somebody has.
            DiskError: the disk fails.
        """
        try:
            now = os.fstat(self._fd)
        except OSError as error:
            raise DiskError(f"{printable(self.path)} cannot be looked at: {error.strerror}. Check the disk.") from error
        if _stamp(now) != self.stamp:
            found = "it was written to"
            if now.st_size != self.size:
                found = f"it ends at offset {now.st_size} and not at {self.size} as before"
            raise CheckpointError(
                f"{printable(self.path)} has changed: {found}. Load the model again when it is whole."
            )

    def check_in_place(self, stamp: Stamp) -> None:
        """See that it is the file of this stamp, and still has its name.

        Raises:
            CheckpointError: it is another one.
        """
        try:
            named = _stamp(self.path.stat())
        except OSError:
            named = None
        if not stamp == self.stamp == named:
            raise CheckpointError(f"{printable(self.path)} was replaced while it was read. Load the model again.")

    def expect(self, start: int, count: int) -> None:
        """Let the system read ahead; a hint, without any effect on what is read."""
        if self._fd >= 0:
            os.posix_fadvise(self._fd, start, count, os.POSIX_FADV_WILLNEED)

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill `out`, a flat view of bytes, from offset `start` on.

        Raises:
            CheckpointError: the file ends before `out` is full.
            DiskError: the disk failed, or the file was closed.
        """
        if self._fd < 0:
            raise DiskError(f"{printable(self.path)} is closed already and cannot be read any more.")
        done = 0
        while done < len(out):
            try:
                got = os.preadv(self._fd, [out[done : done + _PIECE]], start + done)
            except OSError as error:
                raise DiskError(
                    f"{printable(self.path)} cannot be read at byte {start + done}: {error.strerror}. Check the disk."
                ) from error
            if not got:
                raise self._too_short(start, len(out), os.fstat(self._fd).st_size)
            done += got

    def read(self, start: int, count: int) -> bytearray:
        """`count` bytes from `start` on; raises as `read_into` does, before taking memory for bytes that are not there."""
        if start + count > self.size:
            raise self._too_short(start, count, self.size)
        data = bytearray(count)
        self.read_into(start, memoryview(data))
        return data

    def _too_short(self, start: int, count: int, size: int) -> CheckpointError:
        return CheckpointError(
            f"{printable(self.path)} is cut short: {count} bytes were wanted at byte {start}, "
            f"the file ends at {size}. Fetch it again."
        )

    def head(self, count: int) -> bytearray:
        """The first `count` bytes, fewer where the file is shorter."""
        return self.read(0, min(count, self.size))


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def printable(value: object, limit: int = 300) -> str:
    """Text for an error message: on one line, without control characters, not too long."""
    text = str(value)
    if len(text) > limit:
        text = text[:limit] + "…"
    return text if text.isprintable() else ascii(text)[1:-1]


def wrong_kind(head: bytes | bytearray) -> str | None:
    """What a file is that was saved in place of the real one, by its first bytes; None if nothing is amiss."""
    if not head:
        return "is empty. Fetch it again."
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a Git LFS pointer, not the file itself. Run `git lfs pull` in its folder or fetch the file again."
    if head.lstrip()[:16].lower().startswith(_HTML_STARTS):
        return "is a web page, not the file itself: the download was refused. Fetch the file again."
    return None


def read_json_object(path: Path, *, error: type[MossError] = CheckpointError) -> dict[str, Any]:
    """Read a file that holds one JSON object, within bounds.

    Raises:
        error: whatever is wrong with the file, in one line that names it.
    """
    try:
        with CheckedFile(path) as file:
            kind = wrong_kind(file.head(64))
            if kind:
                raise error(f"{printable(path)} {kind}")
            if file.size > MAX_JSON_BYTES:
                raise error(
                    f"{printable(path)} has {file.size} bytes; no JSON of a checkpoint has over {MAX_JSON_BYTES}."
                )
            data = file.read(0, file.size)
    except CheckpointError as problem:
        if isinstance(problem, error):
            raise
        raise error(str(problem)) from problem
    return parse_json_object(data, printable(path), error=error)


def parse_json_object(
    data: bytes | bytearray, where: str, *, error: type[MossError] = CheckpointError
) -> dict[str, Any]:
    """Parse one JSON object; `where` names it in messages. Raises `error` for anything else."""
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_JSON_ITEMS:
        raise error(
            f"{where} holds more than {MAX_JSON_ITEMS} JSON values; no checkpoint needs so many. Do not use it."
        )
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object_without_repeats)
    except UnicodeDecodeError as problem:
        raise error(f"{where} is not UTF-8 text (byte {problem.start}). Fetch it again.") from problem
    except RecursionError as problem:
        raise error(f"{where} is nested too deeply to be the JSON of a checkpoint. Do not use it.") from problem
    except ValueError as problem:  # JSONDecodeError, a key twice, a number of thousands of digits
        raise error(f"{where} is not valid JSON: {printable(problem)}. Fetch it again.") from problem
    if not isinstance(value, dict):
        raise error(f"{where} holds a JSON {type(value).__name__} where an object was expected. Fetch it again.")
    return value


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f'the key "{printable(twice)}" stands there twice')
    return result


def _check_regular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    kind = next((name for test, name in kinds if test(status.st_mode)), "a device")
    raise CheckpointError(f"{printable(path)} is {kind} where a file was expected. Fetch the file again.")


def _opening_failed(path: Path, error: OSError | ValueError) -> MossError:
    """The error to raise when `path` could not be opened."""
    shown = printable(path)
    if isinstance(error, ValueError):
        return CheckpointError(f"{shown} is no name of a file: {error}.")
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return CheckpointError(f"{shown} is a symbolic link to a file that is missing. Fetch the file again.")
    fault = _FAULTS.get(error.errno or 0)
    if fault is None:
        return DiskError(f"{shown} cannot be opened: {error.strerror}.")
    return CheckpointError(f"{shown} {fault}")
