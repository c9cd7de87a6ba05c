"""The disk reader in a process of its own whose disk has faults (tests/faulty_disk.cpp) or whose user has no patience."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_reader import write_file

from moss_jt import native
from moss_jt.reader import Item, Reader

SOURCE = Path(__file__).parent / "faulty_disk.cpp"

CHILD = """
import json, os, signal, sys
from pathlib import Path
import numpy as np
from moss_jt.errors import CheckpointError
from moss_jt.reader import Item, Reader

path = Path(sys.argv[1])
data = np.fromfile(path, np.uint8)
items = [Item(0, at, min(16384, len(data) - at)) for at in range(0, len(data), 16384)]
told = []

def check(index):
    item = items[index]
    start = disk.acquire(index)
    assert (disk.ring[start : start + item.nbytes] == data[item.offset : item.offset + item.nbytes]).all(), item
    disk.release(index)

def attempt(function, *arguments):
    try:
        function(*arguments)
        told.append("")
    except CheckpointError as error:
        told.append(str(error))

disk = Reader(4, 16384, 3, use_page_cache=False)
disk.add_file(path)
disk.set_order(items)
"""


@pytest.fixture(scope="module")
def faulty_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/faulty_disk.cpp, compiled."""
    library = tmp_path_factory.mktemp("faulty") / "faulty.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True, timeout=120)
    return library


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[Path]:
    """A file of twenty pieces of 16384 bytes and a rest."""
    write_file(tmp_path / "model.safetensors", 20 * 16384 + 777)
    yield tmp_path / "model.safetensors"


def child_of(library: Path, faults: str, code: str, weights: Path) -> subprocess.Popen[str]:
    native.build_library("reader")
    return subprocess.Popen(
        [sys.executable, "-c", CHILD + code, str(weights)],
        env={**os.environ, "LD_PRELOAD": str(library), "MOSS_FAULTS": faults},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_child(library: Path, faults: str, code: str, weights: Path) -> Any:
    child = child_of(library, faults, code, weights)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    return json.loads(out)


PASS_TWICE = """
for step in range(2 * len(items)):
    attempt(check, step % len(items))
target = np.zeros(len(data), np.uint8)
attempt(lambda: disk.fill([(Item(0, 0, len(data)), target)]))
told.append(bool((target == data).all()))
print(json.dumps([told, disk.stats().direct]))
"""


@pytest.mark.parametrize(
    ("faults", "direct"),
    [
        ("short 0 999999 60 4096", True),  # less than asked for, though more is there
        ("short 20000 200000 60 1000", True),  # and not even whole blocks
        ("error 0 999999 20 4;delay 0 99999 5 3", True),  # EINTR
        ("direct 100000 110000 1 22", False),  # EINVAL: this file system does not do direct reads, it turns out
        ("direct 0 999999 9 95", False),  # EOPNOTSUPP
    ],
)
def test_what_is_no_error_is_not_seen(faulty_disk: Path, weights: Path, faults: str, direct: bool) -> None:
    told, was_direct = run_child(faulty_disk, faults, PASS_TWICE, weights)
    assert told == [""] * 43 + [True]
    with Reader(0, 0) as disk:
        disk.add_file(weights)
        disk.fill([(Item(0, 0, 8192), np.empty(8192, np.uint8))])
        assert was_direct == (direct and disk.stats().direct)


def test_a_broken_disk_is_told_when_it_matters(faulty_disk: Path, weights: Path) -> None:
    code = """
for index in (0, 1, 2, 3, 4, 5, 5, 6, 7, 2, 3, 4, 5):
    attempt(check, index)
print(json.dumps(told))
"""
    told = run_child(faulty_disk, "error 85000 85001 2 5", code, weights)  # EIO within item 5, twice
    message = (
        f"{weights}: wanted 16384 bytes from offset 81920, got 0: Input/output error. "
        f"`moss-convert verify {weights.parent}` checks the folder."
    )
    assert told == [""] * 5 + [message, message] + [""] * 6


def test_a_broken_disk_stops_filling(faulty_disk: Path, weights: Path) -> None:
    code = """
target = np.zeros(len(data), np.uint8)
attempt(lambda: disk.fill([(Item(0, 0, 90000), target)]))
attempt(lambda: disk.fill([(Item(0, 0, 80000), target)]))
attempt(lambda: disk.fill([(Item(0, 0, 90000), target)]))
told.append(bool((target[:90000] == data[:90000]).all()))
print(json.dumps(told))
"""
    told = run_child(faulty_disk, "error 85000 85001 1 5", "disk.set_order([])\n" + code, weights)
    assert told[0].startswith(f"{weights}: wanted 90000 bytes from offset 0, got 0: Input/output error. `moss-convert")
    assert told[1:] == ["", "", True]


WAIT = """
def wait():
    try:
        print("waiting", flush=True)
        {call}
    except KeyboardInterrupt:
        print("interrupted", flush=True)
wait()
"""


@pytest.mark.parametrize("call", ["check(3)", "disk.fill([(Item(0, 50000, 30000), np.zeros(30000, np.uint8))])"])
def test_ctrl_c_and_exit_do_not_wait_for_the_disk(faulty_disk: Path, weights: Path, call: str) -> None:
    child = child_of(faulty_disk, "delay 50000 60000 99 600000", WAIT.format(call=call), weights)
    assert child.stdout
    assert child.stdout.readline() == "waiting\n"
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)  # the disk answers after ten minutes
    assert (child.returncode, out) == (0, "interrupted\n"), err


def test_reads_in_flight_when_the_program_ends(faulty_disk: Path, weights: Path) -> None:
    code = """
import ctypes, threading
spare = (ctypes.c_int64 * 5)()
threading.Thread(target=check, args=(3,), daemon=True).start()
waiting = disk._library.moss_reader_acquire(disk._native.handle, 3, 300, spare, spare)
print(json.dumps(waiting))
"""
    assert run_child(faulty_disk, "delay 50000 60000 99 600000", code, weights) == 1


def test_nothing_is_written(faulty_disk: Path, weights: Path) -> None:
    code = """
def written():
    return [line for line in Path("/proc/self/io").read_text().splitlines() if "write_bytes" in line]
before = written()
target = np.zeros(len(data), np.uint8)
for step in range(200):
    check(step % len(items))
disk.fill([(Item(0, 0, len(data)), target)])
print(json.dumps(before == written()))
"""
    assert run_child(faulty_disk, "", code, weights) is True
