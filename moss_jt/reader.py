"""Reader: pieces of files in memory before they are needed, read by native threads past the page cache.

    with Reader(slots=12, slot_bytes=span_bytes(items)) as reader:
        reader.set_order(items)                  # read ahead begins, in this order, over and over
        for index in range(len(items)):
            start = reader.acquire(index)        # waits until it is here
            piece = reader.ring[start : start + items[index].nbytes]
            ...                                  # until the next acquire
            reader.release(index)

The ring is one block of memory for the whole life of the reader. One piece is on loan at a time; a loan that was
never given back (an interrupted pass) ends with the next `acquire`. Nothing is mapped, nothing is written.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.errors import CheckpointError, KernelError
from moss_jt.language import pick
from moss_jt.native import load_library
from moss_jt.pages import Pages
from moss_jt.progress import Progress, Quiet

Bytes = npt.NDArray[np.uint8]

BLOCK = 4096  # of direct I/O
PIECE_BYTES = 4 << 20  # measured: 1 MiB reads a tenth slower, 16 MiB no faster
THREADS = 8  # measured on two busy cores: 4 reach 0.95 of the disk's rate, 8 all of it
SLOTS = 12
_STEP_MS = 50  # a Ctrl-C waits at most this long
_READY, _WAITING, _FAILED, _CLOSED = range(4)

_left_behind: list[Any] = []  # memory that a read which does not end may still write to


@dataclass(frozen=True)
class Item:
    """A range of bytes of a file.

    Attributes:
        file: what `Reader.add_file` returned.
        offset: of the first byte; any alignment, though multiples of 4096 read no byte too many.
        nbytes: at least 1.
    """

    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ReaderStats:
    """What a reader did so far.

    Attributes:
        disk_bytes: read from the disk, whole blocks.
        cache_bytes: copied from the system's page cache, where they happened to lie.
        waited_s: how long `acquire` waited.
        direct: whether all files are read past the page cache.
    """

    disk_bytes: int
    cache_bytes: int
    waited_s: float
    direct: bool


def span_bytes(items: Sequence[Item]) -> int:
    """The smallest slot that takes each of these items: what is read are the whole blocks that an item touches."""
    return max((_span(item) for item in items), default=BLOCK)


def _span(item: Item) -> int:
    return -(-(item.offset + item.nbytes) // BLOCK) * BLOCK - item.offset // BLOCK * BLOCK


class Reader:
    """A ring of slots that threads fill ahead of the consumer; also reads what stays in memory (`fill`).

    Not for several consumers at once, and not across a fork.

    Attributes:
        ring: all slots, (slots * slot_bytes,) uint8, page-aligned. Stays valid memory after `close`.
    """

    ring: Bytes

    def __init__(
        self,
        slots: int = SLOTS,
        slot_bytes: int = PIECE_BYTES,
        threads: int = THREADS,
        *,
        use_page_cache: bool = True,
        progress: Progress | None = None,
    ) -> None:
        """Take the memory and start the threads.

        Args:
            slots: pieces that the ring holds, the one on loan included; more than `threads` + 2 keep the disk busy.
                0 where only `fill` is used.
            slot_bytes: of one slot, a multiple of 4096; see `span_bytes`.
            threads: reads in flight.
            use_page_cache: take from there what already lies in it; nothing is put there in any case.
            progress: told when the native part is compiled, the first time on a machine.

        Raises:
            DeviceMemoryError: the memory for the ring cannot be had.
            KernelError: the native part cannot be compiled or started.
            StartupError: there is no compiler, or no folder to keep its output.
        """
        assert slots >= 0 and threads > 0 and slot_bytes >= 0 and slot_bytes % BLOCK == 0
        self._library = _open_library(progress)
        self.slots, self.slot_bytes = slots, slot_bytes
        pages = Pages(slots * slot_bytes, "reading weights ahead", "Close other programs or allow less memory.")
        pages.touch()
        self.ring = pages.array
        self._paths: list[Path] = []
        self._order: tuple[Item, ...] = ()
        self._targets: list[Bytes] = []  # of a filling that may still be writing
        handle = self._library.moss_reader_new(self.ring.ctypes.data, slots, slot_bytes, threads, int(use_page_cache))
        if not handle:
            raise KernelError(
                f"{threads} threads that read weights could not be started. Is the number of processes limited?"
            )
        self._native = _Native(self._library, handle, (self.ring, self._targets))
        weakref.finalize(self, self._native.close)  # at exit, too, when other threads may still be in a call
        weakref.finalize(self, self._native.free).atexit = False

    def __enter__(self) -> Reader:
        """The reader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """End the threads, at the latest after the reads in flight; happens by itself at exit. May be repeated."""
        self._native.close()

    def add_file(self, path: str | os.PathLike[str]) -> int:
        """Open a file for reading; returns its number in an `Item`.

        It stays open: that it is removed or replaced afterwards does not matter.

        Raises:
            CheckpointError: it cannot be opened.
        """
        number = int(self._library.moss_reader_add_file(self._open_handle(), os.fsencode(path)))
        if number < 0:
            raise CheckpointError(
                f"{os.fspath(path)} cannot be opened: {os.strerror(-number)}. "
                f"`moss-convert verify {Path(path).parent}` checks the folder."
            )
        assert number == len(self._paths)
        self._paths.append(Path(path))
        return number

    def set_order(self, items: Sequence[Item]) -> None:
        """Read these items from now on, again and again in this order; the first are read at once.

        What was on loan or read ahead is no longer valid. If all items fit into the ring each is read once.
        """
        self._check(items)
        needed = span_bytes(items)
        assert not items or needed <= self.slot_bytes, (
            f"an item takes {needed} bytes with its blocks, a slot has {self.slot_bytes}"
        )
        handle = self._open_handle()
        self._order = tuple(items)
        self._library.moss_reader_set_order(handle, _table([(i.file, i.offset, i.nbytes) for i in items]), len(items))

    def acquire(self, index: int) -> int:
        """Wait for an item of the order; returns where in `ring` its first byte lies.

        It stays there until it is released or another is acquired. In the order of the items nothing is read in
        vain; another index goes on from there, discarding what was read ahead as far as it does not serve.

        Raises:
            CheckpointError: it could not be read; names file, offset and bytes. The next call tries again.
        """
        assert 0 <= index < len(self._order), f"item {index} of {len(self._order)}"
        handle, offset, failure = self._open_handle(), ctypes.c_int64(), (ctypes.c_int64 * 5)()
        while True:
            answer = self._library.moss_reader_acquire(handle, index, _STEP_MS, ctypes.byref(offset), failure)
            if answer == _READY:
                return offset.value
            if answer != _WAITING:
                raise self._error(answer, list(failure))

    def release(self, index: int) -> None:
        """Give an item back, so that its slot can be filled again; without effect where it is not on loan."""
        self._library.moss_reader_release(self._open_handle(), index)

    def fill(self, parts: Sequence[tuple[Item, Bytes]], progress: Progress | None = None) -> None:
        """Read items into arrays, several reads in flight, ahead of everything in the ring.

        Args:
            parts: each item with its array, uint8, contiguous, whose first item.nbytes it fills. Fastest where the
                address of the array and the item's offset are equal modulo 4096.
            progress: told about the bytes.

        Raises:
            CheckpointError: an item could not be read; the arrays then hold anything.
        """
        self._check([item for item, _ in parts])
        for item, target in parts:
            assert target.dtype == np.uint8 and target.ndim == 1 and len(target) >= item.nbytes
            assert target.flags.c_contiguous and target.flags.writeable
        handle = self._open_handle()
        while self._library.moss_reader_fill_end(handle, _STEP_MS) != _READY:
            pass  # what an interrupted filling had begun
        self._targets[:] = [target for _, target in parts]
        progress = Quiet() if progress is None else progress
        progress.begin(pick("reading the weights", "读取权重"), sum(item.nbytes for item, _ in parts), "B")
        try:
            table = _table([(i.file, i.offset, i.nbytes, target.ctypes.data) for i, target in parts])
            self._library.moss_reader_fill_begin(handle, table, len(parts))
            self._watch_filling(handle, progress)
        finally:
            if self._library.moss_reader_fill_end(handle, 20 * _STEP_MS) == _READY:
                self._targets.clear()
            progress.end()

    def _watch_filling(self, handle: int, progress: Progress) -> None:
        done, told, failure = ctypes.c_int64(), 0, (ctypes.c_int64 * 5)()
        while True:
            answer = self._library.moss_reader_fill_wait(handle, _STEP_MS, ctypes.byref(done), failure)
            if done.value > told:
                progress.advance(done.value - told)
                told = done.value
            if answer == _READY:
                return
            if answer != _WAITING:
                raise self._error(answer, list(failure))

    def stats(self) -> ReaderStats:
        """Counts since the reader was made."""
        counts, waited = (ctypes.c_int64 * 3)(), ctypes.c_double()
        self._library.moss_reader_stats(self._open_handle(), counts, ctypes.byref(waited))
        return ReaderStats(counts[0], counts[1], waited.value, bool(counts[2]))

    def _open_handle(self) -> int:
        if self._native.is_closed:
            raise ValueError("the reader is closed")
        return self._native.handle

    def _check(self, items: Sequence[Item]) -> None:
        for item in items:
            assert 0 <= item.file < len(self._paths) and item.offset >= 0 and item.nbytes > 0, item

    def _error(self, answer: int, failure: list[int]) -> Exception:
        if answer == _CLOSED:
            return ValueError("the reader is closed")
        assert answer == _FAILED, answer
        file, offset, wanted, got, code = failure
        path = self._paths[file]
        found = os.strerror(code) if code else "there the file ends"
        return CheckpointError(
            f"{path}: wanted {wanted} bytes from offset {offset}, got {got}: {found}. "
            f"`moss-convert verify {path.parent}` checks the folder."
        )


def measure_read(path: str | os.PathLike[str], seconds: float, *, threads: int = THREADS) -> float:
    """How fast this machinery reads a file when nothing computes, in bytes/s; the page cache is not used.

    The file is read from its start, over and over if it is short.

    Raises:
        CheckpointError: the file is missing, empty, or cannot be read.
    """
    size = Path(path).stat().st_size if Path(path).is_file() else 0
    if size == 0:
        raise CheckpointError(
            f"{os.fspath(path)} is missing or empty; give a file of weights to measure the disk with."
        )
    slots = min(SLOTS, -(-size // PIECE_BYTES))
    piece = min(PIECE_BYTES, -(-size // (slots + 1) // BLOCK) * BLOCK)  # more pieces than slots: none is kept
    with Reader(slots, piece, threads, use_page_cache=False) as reader:
        number = reader.add_file(path)
        items = [Item(number, at, min(piece, size - at)) for at in range(0, size, piece)]
        reader.set_order(items)
        reader.acquire(0)  # the threads are under way
        done, start, end = 0, time.perf_counter(), 0.0
        for index in itertools.islice(itertools.cycle(range(len(items))), 1, None):
            reader.acquire(index)
            done, end = done + items[index].nbytes, time.perf_counter()
            if end - start >= seconds:
                break
    return done / (end - start)


def _table(rows: Sequence[tuple[int, ...]]) -> Any:
    """Rows of whole numbers as the native part takes them."""
    numbers = [number for row in rows for number in row]
    return (ctypes.c_int64 * len(numbers))(*numbers)


class _Native:
    """The native part: closed by whoever comes first, freed only when nobody can call into it any more."""

    def __init__(self, library: ctypes.CDLL, handle: int, keep: tuple[Any, ...]) -> None:
        self.library, self.handle, self.is_closed = library, handle, False
        self._keep = keep

    def close(self) -> bool:
        """End the threads; False where a read does not end."""
        self.is_closed = True
        return self.handle == 0 or bool(self.library.moss_reader_close(self.handle))

    def free(self) -> None:
        """Close, and give everything back unless a read that does not end may still use it."""
        if not self.close():
            _left_behind.append(self._keep)
        elif self.handle:
            self.library.moss_reader_delete(self.handle)
        self.handle = 0


def _open_library(progress: Progress | None) -> ctypes.CDLL:
    library = load_library("reader", progress)
    handle, number, pointer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p
    wait = ctypes.c_int  # milliseconds
    for name, result, arguments in (
        ("new", handle, [pointer, number, number, ctypes.c_int, ctypes.c_int]),
        ("add_file", number, [handle, ctypes.c_char_p]),
        ("set_order", None, [handle, pointer, number]),
        ("acquire", ctypes.c_int, [handle, number, wait, pointer, pointer]),
        ("release", None, [handle, number]),
        ("fill_begin", None, [handle, pointer, number]),
        ("fill_wait", ctypes.c_int, [handle, wait, pointer, pointer]),
        ("fill_end", ctypes.c_int, [handle, wait]),
        ("stats", None, [handle, pointer, pointer]),
        ("close", ctypes.c_int, [handle]),
        ("delete", None, [handle]),
    ):
        function = getattr(library, f"moss_reader_{name}")
        function.restype, function.argtypes = result, arguments
    return library
