"""Write a planned checkpoint: hash and write behind the back of whoever makes the numbers.

Tensors come as iterators of contiguous arrays. Two threads take them up, one hashing and one
writing; a third forces to disk what was written, every 128 MiB or so, and notes it in the journal,
so that the disk never waits for the numbers. Memory is bounded by a small window of arrays under
way, and what the system holds back unwritten by the number of unfinished commits.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.checked_file import CheckedFile
from moss_jt.checkpoint import CONFIG_FILE, MANIFEST_FILE
from moss_jt.config import FORMAT_NAME
from moss_jt.converters.journal import JOURNAL_FILE, Note, Workplace, disk_error, sync_folder, write_safely
from moss_jt.converters.plan import Plan, PlannedFile, PlannedTensor, dump_json
from moss_jt.errors import CheckpointError, ConfigError, DiskError
from moss_jt.progress import Progress

COMMIT_BYTES = 128 << 20
OPEN_COMMITS = 2
WINDOW_BYTES = 64 << 20
PIECE_BYTES = 16 << 20
_WRITE_BYTES = 4 << 20  # in one call
_SPARE_BYTES = 4 << 20  # for the journal, manifest and the file system's own needs

Pieces = Iterator[npt.NDArray[Any]]


def check_room(workplace: Workplace, needed: int, hint: str = "") -> None:
    """See that the disk has room for what is still to be written.

    Args:
        needed: bytes that the finished folder takes beyond what is free to be deleted meanwhile.
        hint: a further way out, for the message.

    Raises:
        DiskError: it has not.
    """
    held = sum(file.stat().st_blocks * 512 for file in workplace.out.iterdir() if file.is_file())
    status = os.statvfs(workplace.path)
    free = status.f_bavail * status.f_frsize
    missing = needed + _SPARE_BYTES - held - free
    if missing > 0:
        raise DiskError(
            f"{workplace.dst} needs {_in_words(needed - held)} more; {_in_words(free)} are free on its disk. "
            f"Free {_in_words(missing)}{hint}."
        )


def check_finished(workplace: Workplace, plan: Plan) -> None:
    """See that the folder that is there already is what a plan makes, by sizes, headers and texts.

    Raises:
        ConfigError: it is something else.
    """
    different = [file.name for file in plan.files if not _holds(workplace.dst / file.name, file.header, file.nbytes)]
    for name, text in plan.texts.items():
        if not _holds(workplace.dst / name, text.encode(), len(text.encode())):
            different.append(name)
    if different:
        raise ConfigError(
            f"{workplace.dst} exists already, and is something else: {different[0]} is not there, or differs. "
            "Choose another name or delete it."
        )


def _holds(path: Path, start: bytes, nbytes: int) -> bool:
    """Whether a file has this size and these bytes at its start."""
    if not path.is_file():
        return False
    with CheckedFile(path) as file:
        return file.size == nbytes and file.head(len(start)) == start


def verify_done(workplace: Workplace, progress: Progress) -> dict[str, str]:
    """Read again what the journal calls done: name -> SHA-256 of the tensors whose bytes are right."""
    assert workplace.plan is not None, "the run has a plan"
    places = workplace.plan.places()
    noted = workplace.read_journal()
    good: dict[str, str] = {}
    progress.begin("Checking what is done", sum(places[name][1].nbytes for name in noted), "B")
    try:
        for name, digest in noted.items():
            file, tensor = places[name]
            try:
                found = hash_range(workplace.out / file.name, file.offsets[name], tensor.nbytes, progress)
            except CheckpointError:
                continue  # the file is gone or too short: the tensor is written again
            if found == digest:
                good[name] = digest
    finally:
        progress.end()
    return good


def hash_range(path: Path, start: int, nbytes: int, progress: Progress) -> str:
    """SHA-256 of a part of a file, in hexadecimal."""
    sha = hashlib.sha256()
    buffer = memoryview(bytearray(min(nbytes, PIECE_BYTES)))
    with CheckedFile(path) as file:
        for position in range(start, start + nbytes, PIECE_BYTES):
            piece = buffer[: min(PIECE_BYTES, start + nbytes - position)]
            file.read_into(position, piece)
            sha.update(piece)
            progress.advance(len(piece))
    return sha.hexdigest()


class TensorWriter:
    """Writes tensors to their planned places; a context manager.

    Args:
        done: digests of the tensors that are safe on disk already; new ones are added as they become so.
    """

    def __init__(
        self,
        workplace: Workplace,
        plan: Plan,
        done: dict[str, str],
        progress: Progress,
    ) -> None:
        self.done = done
        self._notes = workplace.notes
        self._out = workplace.out
        self._journal = workplace.path / JOURNAL_FILE
        self._places = plan.places()
        self._progress = progress
        self._files: dict[str, int] = {}
        self._hasher = ThreadPoolExecutor(1, "hash")
        self._writer = ThreadPoolExecutor(1, "write")
        self._syncer = ThreadPoolExecutor(1, "sync")
        self._window: deque[tuple[int, list[Future[None]]]] = deque()
        self._window_bytes = 0
        self._finished: list[tuple[str, Future[str], Note]] = []
        self._finished_bytes = 0
        self._commits: list[Future[None]] = []
        self._broken: DiskError | None = None  # a write failed: nothing after it may be called safe

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Commit what is whole, unless there is trouble; stop the threads, close the files."""
        try:
            if kind is None:
                self.flush()
        finally:
            for pool in (self._hasher, self._writer, self._syncer):
                pool.shutdown(wait=True, cancel_futures=True)
            for fd in self._files.values():
                os.close(fd)
            self._files.clear()

    def put(self, name: str, pieces: Iterable[npt.NDArray[Any]], note: Note | None = None) -> None:
        """Write one tensor.

        Args:
            name: of the tensor.
            pieces: its bytes; the arrays must not change afterwards.
            note: for the manifest; read when the last of the pieces is there.

        Raises:
            DiskError: the disk is full or fails.
            Whatever making the pieces raises.
        """
        file, tensor = self._places[name]
        fd = self._open(file)
        sha = hashlib.sha256()
        position, end = file.offsets[name], file.offsets[name] + tensor.nbytes
        for piece in pieces:
            data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
            assert position + len(data) <= end, f"{name} has more bytes than planned"
            self._submit(file, fd, sha, data, position)
            position += len(data)
        assert position == end, f"{name} has {end - position} bytes fewer than planned"
        self._finished.append((name, self._hasher.submit(sha.hexdigest), dict(note or {})))
        self._finished_bytes += tensor.nbytes
        if self._finished_bytes >= COMMIT_BYTES:
            self._commit()

    def flush(self) -> None:
        """Wait until every tensor that was put is safe on disk; raises as `put` does."""
        self._drain(0)
        self._commit()
        self._check_commits(0)

    def _submit(self, file: PlannedFile, fd: int, sha: Any, data: memoryview, position: int) -> None:
        """Give one piece to both threads, waiting while too much is under way."""
        self._check_commits(OPEN_COMMITS)
        self._drain(max(0, WINDOW_BYTES - len(data)))
        hashed = self._hasher.submit(sha.update, data)
        written = self._writer.submit(self._write, self._out / file.name, fd, data, position)
        self._window.append((len(data), [hashed, written]))
        self._window_bytes += len(data)

    def _drain(self, limit: int) -> None:
        """Wait until at most `limit` bytes are under way."""
        while self._window and self._window_bytes > limit:
            nbytes, futures = self._window.popleft()
            for future in futures:
                future.result()
            self._window_bytes -= nbytes
            self._progress.advance(nbytes)

    def _open(self, file: PlannedFile) -> int:
        """The descriptor of an output file, made with its header at the first call."""
        if file.name not in self._files:
            path = self._out / file.name
            try:
                self._files[file.name] = fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
                sync_folder(self._out)
            except OSError as error:
                raise disk_error(error, path) from error
            _write_at(path, fd, memoryview(file.header), 0)
        return self._files[file.name]

    def _commit(self) -> None:
        """Let what is finished be made safe, once the writes before this moment are through."""
        if self._finished:
            written = self._writer.submit(self._check_written)
            self._commits.append(self._syncer.submit(self._make_safe, self._finished, written))
            self._finished, self._finished_bytes = [], 0

    def _write(self, path: Path, fd: int, data: memoryview, position: int) -> None:
        """Write one piece; runs in the writing thread."""
        try:
            _write_at(path, fd, data, position)
        except DiskError as error:
            self._broken = error
            raise

    def _check_written(self) -> None:
        """A commit's place in the row of writes; runs in the writing thread."""
        if self._broken is not None:
            raise self._broken

    def _make_safe(self, finished: list[tuple[str, Future[str], Note]], written: Future[None]) -> None:
        """Force bytes to disk, then say so in the journal; runs in the syncing thread."""
        written.result()
        digests = {name: future.result() for name, future, _ in finished}
        notes = {name: note for name, _, note in finished}
        try:
            for file in {self._places[name][0].name for name in digests}:
                os.fdatasync(self._files[file])
            with self._journal.open("ab") as journal:
                journal.write("".join(_journal_line(digests[name], name, notes[name]) for name in digests).encode())
                journal.flush()
                os.fdatasync(journal.fileno())
        except OSError as error:
            raise disk_error(error, self._journal) from error
        self.done.update(digests)
        self._notes.update(notes)

    def _check_commits(self, limit: int) -> None:
        """Wait until at most `limit` commits are unfinished, and let the trouble of any surface."""
        while self._commits and (len(self._commits) > limit or self._commits[0].done()):
            self._commits.pop(0).result()


def finish(workplace: Workplace, done: dict[str, str], *, manifest: bool) -> None:
    """Write the small files that come last and make the folder visible.

    Raises:
        DiskError: the disk is full or fails.
    """
    plan = workplace.plan
    assert plan is not None and done.keys() == plan.places().keys(), "every tensor is written"
    try:
        for name, text in plan.texts.items():
            write_safely(workplace.out / name, text.encode())
        if plan.index_name is not None:
            write_safely(workplace.out / plan.index_name, plan.index_text().encode())
        if manifest:
            write_safely(workplace.out / MANIFEST_FILE, _manifest_text(workplace, plan, done).encode())
        workplace.publish()
    except OSError as error:
        raise disk_error(error, workplace.dst) from error


def _manifest_text(workplace: Workplace, plan: Plan, done: dict[str, str]) -> str:
    """Checksums: of every tensor, of the header of every file, and of the tokenizer; the config may be edited."""
    tensors = {
        name: {**_described(file, tensor, done[name]), **workplace.notes.get(name, {})}
        for name, (file, tensor) in plan.places().items()
    }
    headers = {file.name: hashlib.sha256(file.header).hexdigest() for file in plan.files}
    others = {}
    for path in sorted(workplace.out.iterdir()):
        if path.name not in {*headers, CONFIG_FILE, plan.index_name, MANIFEST_FILE}:
            others[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    version = int(plan.files[0].metadata["version"])
    return dump_json(
        {"format": FORMAT_NAME, "version": version, "tensors": tensors, "headers": headers, "others": others}
    )


def _described(file: PlannedFile, tensor: PlannedTensor, digest: str) -> dict[str, Any]:
    return {"file": file.name, "nbytes": tensor.nbytes, "sha256": digest}


def _journal_line(digest: str, name: str, note: Note) -> str:
    """A line of the journal; see `moss_jt.converters.journal`."""
    return f"{digest} {name} {json.dumps(note)}\n" if note else f"{digest} {name}\n"


def _write_at(path: Path, fd: int, data: memoryview, position: int) -> None:
    """Write all of `data` at a place of a file."""
    done = 0
    try:
        while done < len(data):
            done += os.pwrite(fd, data[done : done + _WRITE_BYTES], position + done)
    except OSError as error:
        raise disk_error(error, path) from error


def _in_words(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{count / 1e6:.2f} MB"
