"""What an interrupted conversion leaves behind so that it can go on: a plan and a journal, in a locked folder.

Beside the folder DST to be made stands the hidden folder `.DST.partial`:

    plan.json   what will be written, to the byte; there once everything small is in out/
    journal     "plan SHA256", then one line "SHA256 NAME" for each tensor whose bytes are safe on disk; what
                else is to be known of a tensor follows as JSON
    out/        becomes DST by one rename, when it is whole

A line of the journal is written after the bytes it speaks of have reached the disk. A last line cut
short by a crash has no line end and does not count.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moss_jt.checked_file import CheckedFile
from moss_jt.converters.plan import Plan, plan_from_json
from moss_jt.errors import CheckpointError, ConfigError, DiskError

PLAN_FILE = "plan.json"
JOURNAL_FILE = "journal"
MAX_SMALL_BYTES = 256 << 20

Note = dict[str, Any]


def partial_folder(dst: Path) -> Path:
    """Where the unfinished DST lives."""
    return dst.parent / f".{dst.name}.partial"


class Workplace:
    """The hidden folder, held by one process at a time; a context manager.

    Attributes:
        out: the folder that will become DST.
        plan: of the interrupted run that is to be gone on with, None for a new one.
        whole: DST is finished already (the run before was stopped after the rename).
        notes: what else the journal tells of tensors that are done, by name.
    """

    def __init__(self, dst: Path, kind: str, *, resume: bool) -> None:
        self.dst = dst
        self.path = partial_folder(dst)
        self.out = self.path / "out"
        self.kind = kind
        self.plan: Plan | None = None
        self.whole = False
        self.notes: dict[str, Note] = {}
        self._resume = resume
        self._lock_fd = -1

    def __enter__(self) -> Workplace:
        """Take the folder.

        Raises:
            ConfigError: DST exists or is a mount point, an unfinished run is there and `resume` was not
                asked, it is another command's, or another process works on it.
            DiskError: the folder cannot be made.
        """
        try:
            self._take()
        except OSError as error:
            self._release()
            raise disk_error(error, self.path) from error
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock_fd >= 0 and self.plan is None:
            self.discard()  # nothing was begun
        self._release()

    def start(self, plan: Plan) -> None:
        """Write down a new plan; from here on the run can be gone on with."""
        try:
            write_safely(self.path / JOURNAL_FILE, f"plan {plan.digest()}\n".encode())
            write_safely(self.path / PLAN_FILE, plan.to_json().encode())
            sync_folder(self.path)
        except OSError as error:
            raise disk_error(error, self.path) from error
        self.plan = plan

    def read_journal(self) -> dict[str, str]:
        """The tensors that are safe on disk: name -> SHA-256; fills `notes`. Cuts off a torn last line.

        Raises:
            ConfigError: the journal belongs to another plan.
        """
        assert self.plan is not None, "a journal has a plan"
        file = self.path / JOURNAL_FILE
        raw = file.read_bytes() if file.exists() else b""
        kept = raw[: raw.rfind(b"\n") + 1]
        lines = kept.decode("utf-8", errors="replace").splitlines()
        if not lines or lines[0] != f"plan {self.plan.digest()}":
            raise ConfigError(f"{file} does not belong to {PLAN_FILE} beside it. Delete {self.path} and start again.")
        if len(kept) != len(raw):
            os.truncate(file, len(kept))
        names = self.plan.places()
        done = {}
        for digest, name, note in ([*line.split(" ", 2), ""][:3] for line in lines[1:]):
            if name in names:
                done[name] = digest
                self.notes.pop(name, None)
                if note:
                    self.notes[name] = json.loads(note)
        return done

    def publish(self) -> None:
        """Make the finished folder visible as DST and clear the rest away."""
        sync_folder(self.out)
        os.rename(self.out, self.dst)  # noqa: PTH104 (replaces an empty folder DST)
        sync_folder(self.dst.parent)
        self.discard()

    def discard(self) -> None:
        """Throw the hidden folder away."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _take(self) -> None:
        exists = os.path.lexists(self.dst) and not _is_empty_folder(self.dst)
        if not exists and os.path.ismount(self.dst):
            raise ConfigError(
                f"{self.dst} is where a disk is mounted, so no other folder can take its place. "
                f"Name a folder inside it, such as {self.dst / 'model'}."
            )
        if exists and not self.path.exists():
            self._stop_at_existing()
            return
        self.dst.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(exist_ok=True)
        self._lock()
        self.plan = self._load_plan()
        if exists:
            if self.out.exists():
                raise ConfigError(
                    f"{self.dst} exists, and so does an unfinished run for it in {self.path}. Delete one of them."
                )
            self.discard()
            self._stop_at_existing()
            return
        if self.plan is None:
            _clear(self.path)
        elif not self._resume:
            raise ConfigError(
                f"an unfinished run for {self.dst} is in {self.path}. Go on with it by adding --resume, or delete that folder."
            )
        elif self.plan.kind != self.kind:
            raise ConfigError(
                f"{self.path} was begun by {self.plan.kind}, not by {self.kind}. Go on with that, or delete it."
            )
        self.out.mkdir(exist_ok=True)

    def _stop_at_existing(self) -> None:
        if not self._resume:
            raise ConfigError(f"{self.dst} exists already. Choose another name or delete it.")
        self.whole = True

    def _lock(self) -> None:
        """Hold the folder; flock on a folder goes with the process, however it ends."""
        self._lock_fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        busy = ConfigError(
            f"another process is writing {self.dst} now (it holds {self.path}). Wait for it, or stop it."
        )
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        if not self.path.exists() or not os.path.samestat(os.fstat(self._lock_fd), self.path.stat()):
            raise busy  # it was finished or thrown away between our open and our lock

    def _release(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _load_plan(self) -> Plan | None:
        file = self.path / PLAN_FILE
        if not file.exists():
            return None
        try:
            return plan_from_json(file.read_bytes().decode("utf-8"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{file} is not a plan that this program can go on with ({error}). Delete {self.path} and start again."
            ) from error


def write_safely(file: Path, data: bytes | bytearray) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = file.with_name(file.name + ".new")
    with temporary.open("wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())
    temporary.replace(file)


def copy_small_files(source: Path, names: Iterable[str], target: Path) -> None:
    """Copy those of the named files that are there.

    Raises:
        CheckpointError: one is not a regular file, or far larger than any file of a tokenizer.
    """
    for name in names:
        if os.path.lexists(source / name):
            with CheckedFile(source / name) as file:
                if file.size > MAX_SMALL_BYTES:
                    raise CheckpointError(f"{file.path} has {file.size} bytes; at most {MAX_SMALL_BYTES} are copied.")
                data = file.read(0, file.size)
            try:
                write_safely(target / name, data)
            except OSError as error:
                raise disk_error(error, target) from error


def sync_folder(folder: Path) -> None:
    """See that the names in a folder are safe on disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def disk_error(error: OSError, where: Path) -> DiskError:
    """The error to raise when writing failed."""
    advice = "Check the disk; --resume then goes on from here."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "Make room; --resume then goes on from here."
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "Give a folder that you may write to."
    return DiskError(f"{error.filename or where} cannot be written: {error.strerror or error}. {advice}")


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _clear(folder: Path) -> None:
    """Empty a folder that we hold."""
    for item in folder.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()
