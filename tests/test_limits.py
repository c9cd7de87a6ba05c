"""The measuring process (kernels/host/limits.cpp): what it answers, and that its figures are those of what it did."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moss_jt.errors import StartupError
from moss_jt.limits import PIECE_BYTES, Limits, Measured, parse_answer
from moss_jt.native import build_library


def test_rates() -> None:
    measured = Measured(amount=6e9, seconds=2.0, cpu_seconds=4.0, how="avx2")
    assert measured.per_second == 3e9
    assert measured.per_cpu_second == 1.5e9


def test_an_answer_is_read() -> None:
    assert parse_answer("fp32 2 0.1", "ok 1000 0.5 0.25 plain\n") == Measured(1000.0, 0.5, 0.25, "plain")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("error Input/output error\n", r"\('disk 4 0\.5 4096 0 /a'\): Input/output error\.$"),
        ("", "the measuring process ended"),
        ("ok 1 2\n", "ok 1 2"),
    ],
)
def test_a_failure_is_told(line: str, words: str) -> None:
    with pytest.raises(StartupError, match=words):
        parse_answer("disk 4 0.5 4096 0 /a", line)


def test_memory_and_arithmetic_are_measured() -> None:
    with Limits(threads=2) as limits:
        memory = limits.memory(0.01, mib=8)
        assert memory.amount % (1 << 20) == 0
        assert memory.amount > 0
        for found in (memory, limits.fp32(0.01), limits.int8(0.01)):
            assert found.seconds >= 0.01
            assert 0 < found.cpu_seconds <= 2 * found.seconds * 1.2


def test_a_disk_is_read_on_from_where_the_last_call_ended(tmp_path: Path) -> None:
    file = tmp_path / "weights with a space"
    file.write_bytes(bytes(3 * PIECE_BYTES + 17))
    with Limits(threads=1) as limits:
        first = limits.disk(file, 0.001, readers=2)
        assert first.amount % PIECE_BYTES == 0
        assert first.how in ("direct", "buffered")
        assert limits._disk_at[file] == first.amount
        assert limits.disk(file, 0.001).amount > 0


def test_a_disk_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"few")
    with Limits(threads=1) as limits:
        with pytest.raises(StartupError, match="No such file"):
            limits.disk(tmp_path / "missing", 0.001)
        with pytest.raises(StartupError, match="smaller than a piece"):
            limits.disk(small, 0.001)
        assert limits.fp32(0.001).amount > 0, "an error ends nothing"


def test_nonsense_is_refused() -> None:
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).moss_limits()"
    orders = "memory 0 1 8\nint8\ndisk 1 0.1 1000 0 /tmp\nwhat\n"
    done = subprocess.run(
        [sys.executable, "-c", code, str(build_library("limits"))],
        input=orders,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == [f"error not an order: {order}" for order in orders.splitlines()]


def test_a_machine_without_vector_instructions_is_measured_too(tmp_path: Path) -> None:
    source = Path(__file__).parent.parent / "kernels" / "host" / "limits.cpp"
    library = tmp_path / "plain.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-pthread", "-Wall", "-Werror", "-DMOSS_PLAIN"]
    subprocess.run(["g++", *flags, "-o", str(library), str(source)], check=True, timeout=120)
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).moss_limits()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)],
        input="memory 1 0.01 4\nfp32 1 0.01\nint8 1 0.01\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    answers = [parse_answer("", line) for line in done.stdout.splitlines()]
    assert [answer.how for answer in answers] == ["plain"] * 3
    assert all(answer.amount > 0 for answer in answers)


def test_a_disk_is_read_while_another_process_computes(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(2 * PIECE_BYTES))
    with Limits(threads=1) as limits, Limits(threads=1) as load:
        found = limits.disk_beside(load, file, 0.01)
        assert found.amount > 0 and found.seconds >= 0.01
        load.close()
        with pytest.raises((StartupError, ValueError)):
            limits.disk_beside(load, file, 0.01)
