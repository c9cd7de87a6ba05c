"""The disk reader (kernels/host/reader.cpp): every byte right, whatever is asked in what order and whatever fails."""

from __future__ import annotations

import gc
import mmap
import os
import random
import signal
import subprocess
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from residency import cached_bytes

from moss_jt import reader
from moss_jt.errors import CheckpointError, DeviceMemoryError
from moss_jt.reader import BLOCK, Bytes, Item, Reader, span_bytes

TESTS = Path(__file__).parent
HOST = TESTS.parent / "kernels" / "host"
KIB = 1 << 10


def write_file(path: Path, nbytes: int, seed: int = 0) -> Bytes:
    """Random bytes, on the disk and not in the page cache as far as the system follows advice."""
    data = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)
    with path.open("wb") as file:
        file.write(data.tobytes())
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return data


def cut(nbytes: int, piece: int, file: int = 0) -> list[Item]:
    return [Item(file, at, min(piece, nbytes - at)) for at in range(0, nbytes, piece)]


def some_items(rng: random.Random, data: list[Bytes], longest: int) -> list[Item]:
    """Ranges of any size and alignment, some at the very end of their file."""
    items = []
    for _ in range(rng.randint(1, 40)):
        file = rng.randrange(len(data))
        nbytes = rng.choice((1, BLOCK - 1, BLOCK, BLOCK + 1, rng.randint(1, longest)))
        last = len(data[file]) - nbytes
        items.append(
            Item(file, rng.choice((last, rng.randint(0, last), rng.randint(0, last // BLOCK) * BLOCK)), nbytes)
        )
    return items


def check_item(disk: Reader, items: list[Item], index: int, data: list[Bytes]) -> None:
    item = items[index]
    start = disk.acquire(index)
    assert start % BLOCK == item.offset % BLOCK
    got = disk.ring[start : start + item.nbytes]
    assert np.array_equal(got, data[item.file][item.offset : item.offset + item.nbytes]), item


def threads_now() -> int:
    return sum(1 for _ in Path("/proc/self/task").iterdir())


@pytest.mark.parametrize("seed", range(12))
def test_every_byte_in_any_order(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    data = [write_file(tmp_path / str(i), rng.randint(64 * KIB, 900 * KIB), seed + i) for i in range(rng.randint(1, 3))]
    longest = 56 * KIB
    slots, threads, use_cache = rng.randint(1, 9), rng.randint(1, 6), rng.random() < 0.5
    with Reader(slots, longest + 2 * BLOCK, threads, use_page_cache=use_cache) as disk:
        for i in range(len(data)):
            assert disk.add_file(tmp_path / str(i)) == i
        for _ in range(4):
            items = some_items(rng, data, longest)
            disk.set_order(items)
            index = 0
            for _ in range(120):
                if rng.random() < 0.1:  # an interrupted pass starts somewhere else
                    index = rng.randrange(len(items))
                check_item(disk, items, index, data)
                if rng.random() < 0.8:
                    disk.release(index)
                index = (index + 1) % len(items)


def test_in_order_nothing_is_read_twice(tmp_path: Path) -> None:
    data = write_file(tmp_path / "w", 640 * KIB)
    items = cut(len(data), 16 * KIB)
    with Reader(5, 16 * KIB, 3, use_page_cache=False) as disk:
        disk.add_file(tmp_path / "w")
        disk.set_order(items)
        for _ in range(3):
            for index in range(len(items)):
                check_item(disk, items, index, [data])
                disk.release(index)
        ahead = disk.stats().disk_bytes - 3 * len(data)
        assert 0 <= ahead <= 5 * 16 * KIB


def test_what_fits_is_read_once(tmp_path: Path) -> None:
    data = write_file(tmp_path / "w", 60 * KIB)
    items = cut(len(data), 12 * KIB)
    with Reader(len(items), 12 * KIB, 3, use_page_cache=False) as disk:
        disk.add_file(tmp_path / "w")
        disk.set_order(items)
        for step in range(50):
            check_item(disk, items, step % len(items), [data])
            disk.release(step % len(items))
        assert disk.stats().disk_bytes == len(data)


def test_the_same_item_again_is_the_same_loan(tmp_path: Path) -> None:
    data = write_file(tmp_path / "w", 640 * KIB)
    items = cut(len(data), 16 * KIB)
    with Reader(4, 16 * KIB, use_page_cache=False) as disk:
        disk.add_file(tmp_path / "w")
        disk.set_order(items)
        for index in range(len(items)):
            check_item(disk, items, index, [data])
            disk.release((index + 2) % len(items))  # not on loan: nothing happens
            check_item(disk, items, index, [data])
        assert disk.stats().disk_bytes <= len(data) + 4 * 16 * KIB


@pytest.mark.parametrize("seed", range(6))
def test_fill_any_place_in_memory(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    data = [write_file(tmp_path / str(i), rng.randint(1, 12 << 20), i) for i in range(3)]
    told = Told()
    with Reader(0, 0, rng.randint(1, 5), use_page_cache=seed % 2 == 0) as disk:
        items, targets = [], []
        for i, bytes_ in enumerate(data):
            disk.add_file(tmp_path / str(i))
            for _ in range(4):
                nbytes = rng.randint(1, len(bytes_))
                item = Item(i, rng.randint(0, len(bytes_) - nbytes), nbytes)
                items.append(item)
                alike = rng.random() < 0.5
                targets.append(aligned_bytes(nbytes, item.offset if alike else rng.randrange(BLOCK)))
        disk.fill(list(zip(items, targets, strict=True)), told)
        for item, target in zip(items, targets, strict=True):
            assert np.array_equal(target[: item.nbytes], data[item.file][item.offset : item.offset + item.nbytes])
            assert set(target[item.nbytes :]) == {7}, "written behind the end"
    assert told.total == told.done == sum(item.nbytes for item in items)
    assert told.ends == 1


def aligned_bytes(nbytes: int, lead: int) -> Bytes:
    """An array whose address is `lead` modulo 4096, all 7, a little longer than asked for."""
    raw = np.full(nbytes + 3 * BLOCK, 7, np.uint8)
    start = (lead - raw.ctypes.data) % BLOCK
    return raw[start : start + nbytes + 16]


class Told:
    """A progress that counts."""

    total = done = 0.0
    ends = 0

    def begin(self, task: str, total: float, unit: str) -> None:
        assert task and unit == "B"
        self.total = total

    def advance(self, amount: float) -> None:
        assert amount > 0
        self.done += amount

    def end(self) -> None:
        self.ends += 1


def test_fill_goes_on_beside_the_ring(tmp_path: Path) -> None:
    data = write_file(tmp_path / "w", 3 << 20)
    items = cut(len(data), 60 * KIB)
    with Reader(3, 64 * KIB) as disk:
        disk.add_file(tmp_path / "w")
        disk.set_order(items)
        check_item(disk, items, 0, [data])
        target = aligned_bytes(len(data), 0)
        disk.fill([(Item(0, 0, len(data)), target)])
        assert np.array_equal(target[: len(data)], data)
        check_item(disk, items, 0, [data])
        check_item(disk, items, 1, [data])


def test_empty_fill_and_empty_order(tmp_path: Path) -> None:
    with Reader(2, BLOCK) as disk:
        disk.fill([])
        disk.set_order([])
        assert disk.stats() == reader.ReaderStats(0, 0, 0.0, False)


def test_a_removed_file_is_still_read(tmp_path: Path) -> None:
    data = write_file(tmp_path / "w", 200 * KIB)
    items = cut(len(data), 16 * KIB)
    with Reader(2, 16 * KIB) as disk:
        disk.add_file(tmp_path / "w")
        disk.set_order(items)
        (tmp_path / "w").unlink()
        for index in range(len(items)):
            check_item(disk, items, index, [data])


def test_a_file_cut_short_while_in_use(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    data = write_file(path, 160 * KIB)
    items = cut(len(data), 16 * KIB)
    with Reader(2, 16 * KIB) as disk:
        disk.add_file(path)
        disk.set_order(items)
        check_item(disk, items, 0, [data])
        os.truncate(path, 100 * KIB)
        for index in range(1, 6):
            check_item(disk, items, index, [data])
        for _ in range(2):
            with pytest.raises(CheckpointError) as told:
                disk.acquire(6)
            assert str(told.value) == (
                f"{path}: wanted 16384 bytes from offset 98304, got 4096: there the file ends. "
                f"`moss-convert verify {tmp_path}` checks the folder."
            )
        disk.set_order([Item(0, 100 * KIB - 100, 200), Item(0, 100 * KIB + 100, 200)])
        for index, there in ((0, 100), (1, 0)):
            with pytest.raises(CheckpointError, match=rf"wanted 200 bytes from offset \d+, got {there}: there"):
                disk.acquire(index)
        path.write_bytes(data.tobytes())
        disk.set_order(items)
        for index in (6, 7, 8, 9, 0, 1):
            check_item(disk, items, index, [data])
        os.truncate(path, 0)
        target = np.empty(len(data), np.uint8)
        with pytest.raises(CheckpointError, match="offset 0, got 0: there the file ends"):
            disk.fill([(Item(0, 0, len(data)), target)])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with Reader(2, BLOCK) as disk, pytest.raises(CheckpointError, match=r"no\.bin cannot be opened: No such file"):
        disk.add_file(tmp_path / "no.bin")


def test_memory_that_cannot_be_had() -> None:
    with pytest.raises(DeviceMemoryError, match=r"does not give 1073741824GiB for reading weights ahead"):
        Reader(1 << 30, 1 << 30)


def test_memory_is_ours_and_there_from_the_start() -> None:
    with Reader(8, 1 << 20) as disk:
        assert disk.ring.shape == (8 << 20,)
        assert disk.ring.ctypes.data % mmap.PAGESIZE == 0
        first, last = disk.ring.ctypes.data, disk.ring.ctypes.data + len(disk.ring)
        resident = 0
        for text in Path("/proc/self/smaps").read_text("utf-8").split("VmFlags:"):
            head = [line for line in text.splitlines() if " " in line and "-" in line.split()[0]]
            low, high = (int(end, 16) for end in head[0].split()[0].split("-")) if head else (0, 0)
            if low < last and high > first:
                assert head[0].split()[4] == "0", "not anonymous"
                resident += sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Rss:"))
        assert resident >= len(disk.ring)


def test_threads_end_with_close_and_with_the_last_use(tmp_path: Path) -> None:
    write_file(tmp_path / "w", 640 * KIB)
    gc.collect()  # readers of other tests that nobody has any more
    before = threads_now()
    disk = Reader(4, 16 * KIB, 3)
    disk.add_file(tmp_path / "w")
    disk.set_order(cut(640 * KIB, 16 * KIB))
    assert threads_now() == before + 3
    disk.close()
    disk.close()
    assert threads_now() == before
    ring = disk.ring
    ring[:] = 1  # memory as long as somebody holds it
    for call in (lambda: disk.acquire(0), lambda: disk.release(0), lambda: disk.set_order([]), disk.stats):
        with pytest.raises(ValueError, match="the reader is closed"):
            call()
    other = Reader(4, 16 * KIB, 3)
    assert threads_now() == before + 3
    del other
    gc.collect()
    assert threads_now() == before


def test_the_page_cache_is_used_and_never_filled(tmp_path: Path) -> None:
    data = write_file(tmp_path / "w", 640 * KIB)
    if cached_bytes(tmp_path / "w"):
        pytest.skip("the file system of the temporary folder keeps its files in memory")
    items = cut(len(data), 50 * KIB)
    for use_cache in (True, False):
        with Reader(3, 64 * KIB, use_page_cache=use_cache) as disk:
            disk.add_file(tmp_path / "w")
            disk.set_order(items)
            for index in range(len(items)):
                check_item(disk, items, index, [data])
            disk.fill([(Item(0, 1, len(data) - 1), np.empty(len(data) - 1, np.uint8))])
            assert disk.stats().cache_bytes == 0
    assert cached_bytes(tmp_path / "w") == 0
    (tmp_path / "w").read_bytes()
    for use_cache in (True, False):
        with Reader(3, 64 * KIB, use_page_cache=use_cache) as disk:
            disk.add_file(tmp_path / "w")
            target = np.empty(len(data), np.uint8)
            disk.fill([(Item(0, 0, len(data)), target)])
            assert np.array_equal(target, data)
            assert disk.stats().disk_bytes in ((0, len(data)) if use_cache else (len(data),))  # 0 from Linux 6.5


def test_files_in_memory(tmp_path: Path) -> None:
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK):
        pytest.skip("no /dev/shm that can be written")
    path = folder / f"moss-jt-test-{os.getpid()}"
    try:
        data = write_file(path, 333_333)
        items = cut(len(data), 20_000)
        with Reader(3, 28 * KIB) as disk:
            disk.add_file(path)
            disk.set_order(items)
            for step in range(2 * len(items)):
                check_item(disk, items, step % len(items), [data])
    finally:
        path.unlink(missing_ok=True)


def test_measures_how_fast_a_file_is_read(tmp_path: Path) -> None:
    for nbytes in (1, 5000, 3 << 20):
        write_file(tmp_path / "w", nbytes)
        assert reader.measure_read(tmp_path / "w", 0.01) > 0
    for name in ("empty", "none", "."):
        (tmp_path / "empty").touch()
        with pytest.raises(CheckpointError, match="missing or empty"):
            reader.measure_read(tmp_path / name, 0.01)


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt; as that one, no `except Exception` catches it (numpy has one)."""


@pytest.mark.parametrize("seed", range(3))
def test_interrupted_anywhere_it_recovers(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    data = write_file(tmp_path / "w", 2 << 20)
    items = cut(len(data), 30_000)
    target = np.empty(len(data), np.uint8)
    interrupted = 0

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    def work(disk: Reader, start: int) -> None:
        for index in range(start, len(items)):
            check_item(disk, items, index, [data])
            disk.release(index)
        disk.fill([(Item(0, 0, len(data)), target)])

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Reader(4, 40 * KIB, use_page_cache=False) as disk:
            disk.add_file(tmp_path / "w")
            disk.set_order(items)
            for _ in range(150):
                try:
                    signal.setitimer(signal.ITIMER_REAL, rng.random() * 0.01 + 1e-4)
                    work(disk, rng.randrange(len(items)))
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except Interrupted:
                    interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            target[:] = 0
            work(disk, 0)
            assert np.array_equal(target, data)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert interrupted > 0


def test_slots_are_large_enough_for_the_blocks_touched() -> None:
    assert span_bytes([]) == BLOCK
    assert span_bytes([Item(0, 0, 4096)]) == 4096
    assert span_bytes([Item(0, 0, 4096), Item(0, 4095, 2)]) == 8192
    assert span_bytes([Item(0, 1, 8192)]) == 12288


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_under_a_sanitizer(tmp_path: Path, sanitizer: str) -> None:
    size = np.arange(1_000_123, dtype=np.uint64)
    ((size * np.uint64(2654435761)) >> np.uint64(13)).astype(np.uint8).tofile(tmp_path / "w")
    flags = ["-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread"]
    sources = [str(TESTS / "reader_harness.cpp"), str(HOST / "reader.cpp")]
    program = tmp_path / "harness"
    subprocess.run(["g++", *flags, "-o", str(program), *sources], check=True, timeout=300)
    done = subprocess.run(
        ["setarch", "-R", str(program), str(tmp_path / "w"), "100"],  # a fixed layout: older sanitizers need it
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
