"""Faults of the disk and of the memory, and signals: a clear error, never a wrong token, nothing left behind.

Whole processes run on a small model of which most weights are streamed.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty import Ended, Runs, build_shim, places, small_model

EVERY = 1_000_000
END = 1 << 40
NEW = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("faults") / "model", tokenizer=False)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one test learns for all: the least memory, and the right tokens."""
    return {}


@pytest.fixture
def runs(own_home: Path, tmp_path: Path, model: Path, shim: Path, found: dict[str, Any]) -> Runs:
    runs = Runs(tmp_path, model, shim)
    if not found:
        runs.find_smallest()
        found["smallest"] = runs.smallest
    runs.smallest = found["smallest"]
    if "right" not in found:
        done = runs.run(runs.command(tokens=NEW))
        assert done.code == 0 and "read from disk for each token" in done.err, done.err
        found["right"] = done.ids
        assert len(set(done.ids)) > 3, "tokens that tell nothing"
    return runs


@pytest.fixture
def right(runs: Runs, found: dict[str, Any]) -> list[int]:
    tokens: list[int] = found["right"]
    return tokens


def reads(
    kind: str, span: tuple[int, int], after: int = 0, times: int = EVERY, milliseconds: int = 0
) -> dict[str, str]:
    return {"FAULT_READ": f"{kind},0001.safetensors,{span[0]},{span[1]},{after},{times},{milliseconds}"}


def assert_names_the_place(done: Ended, span: tuple[int, int]) -> None:
    named = re.search(r"\S*model-00001-of-00001\.safetensors.* (?:offset|byte) (\d+)", done.error)
    assert named is not None, done.error
    assert span[0] - (1 << 22) <= int(named.group(1)) < span[1], (span, done.error)
    assert "Input/output error" in done.error


def first_byte(child: subprocess.Popen[bytes]) -> bytes:
    """Wait until a process has told a token."""
    assert child.stdout is not None
    told: bytes = child.stdout.read(1)
    assert told.isdigit()
    return told


# --- the disk, whole processes


@pytest.mark.parametrize(
    ("place", "after"),
    [("header", 0), ("norm", 0), ("embedding", 0), ("embedding", 9), ("held", 0), ("streamed", 0), ("streamed", 3)],
)
def test_a_disk_that_fails(runs: Runs, right: list[int], place: str, after: int) -> None:
    """EIO at the start, while loading, or after some tokens."""
    span = places(runs.model)[place]
    done = runs.run(runs.command(tokens=NEW), reads("eio", span, after))
    assert_names_the_place(done, span)
    assert done.ids == right[: len(done.ids)] and len(done.ids) < NEW
    if after:
        assert done.ids, "it failed too early to tell anything"


def test_short_reads_are_finished(runs: Runs, right: list[int]) -> None:
    done = runs.run(runs.command(tokens=NEW), reads("short", (4096, END)))
    assert (done.code, done.ids) == (0, right), done.err


def test_slow_reads_change_nothing(runs: Runs, right: list[int]) -> None:
    done = runs.run(runs.command(tokens=NEW), reads("slow", (4096, END), milliseconds=3))
    assert (done.code, done.ids) == (0, right), done.err


def test_a_fault_that_passes_is_told_and_then_forgotten(runs: Runs, right: list[int]) -> None:
    """The next request in the same process computes what is right, with nothing loaded again."""
    program = """
from moss_jt import GenerationConfig, MossError, load_model
from moss_jt.engine import Engine
from moss_jt.messages import Request, TokenEvent
model = load_model(folder, compute="fast", memory=memory, max_tokens=256)
engine = Engine(model)
result["tokens"], result["errors"] = [], []
for turn in range(3):
    number = engine.submit(Request(tuple(prompt), GenerationConfig(do_sample=False, max_new_tokens=new), str(turn)))
    told = []
    while engine.busy:
        try:
            told += [event.id for event in engine.step() if isinstance(event, TokenEvent)]
        except MossError as error:
            result["errors"].append(str(error))
    result["tokens"].append(told)
"""
    span = places(runs.model)["streamed"]
    result = runs.evaluate(program, reads("eio", span, after=4, times=2), new=NEW)
    assert result["tokens"] == [right] * 3
    errors = result["errors"]
    assert isinstance(errors, list) and len(errors) == 2
    assert all(re.search(r"offset \d+, got \d+: Input/output error", error) for error in errors), errors


def test_a_file_cut_while_in_use(runs: Runs, right: list[int], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(runs.model, folder)
    own = Runs(tmp_path, folder, runs.shim, runs.smallest)
    child = own.start(own.command(tokens=200), reads("slow", (4096, END), milliseconds=4))
    told = first_byte(child)
    file = folder / "model-00001-of-00001.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    rest, err = child.communicate(timeout=60)
    done = Ended(child.returncode, (told + rest).decode(), err.decode(), 0)
    assert re.search(rf"{file.name}.* offset \d+", done.error)
    some = done.ids
    assert some[:NEW] == right[: len(some)] and 0 < len(some) < 200


# --- the memory, whole processes


@pytest.mark.parametrize(
    ("limit", "mib"), [("AS", 90), ("AS", 430), ("AS", 650), ("DATA", 40), ("DATA", 140), ("DATA", 200)]
)
def test_limits_of_the_process(runs: Runs, limit: str, mib: int) -> None:
    """Less than is needed, by a little and by much: numpy and Jittor, asked to start, would hang or crash."""
    done = runs.run(runs.command(), limits={getattr(resource, f"RLIMIT_{limit}"): mib << 20})
    assert re.search(r"ulimit -\w (leaves|or ulimit -d leave) \S+B.*(Raise|give less)", done.error)


def test_memory_that_the_system_does_not_give(runs: Runs) -> None:
    """The ring, and then the weights: what is wanted is named."""
    limit, errors = runs.smallest + (12 << 20), []
    for number in range(2):
        done = runs.run(runs.command(memory=limit), {"FAULT_MEMORY": f"{5 << 19},{16 << 20},{number},1"})
        errors.append(done.error)
    told = " ".join(errors)
    for words in (r"does not give [\d.]+MiB for reading weights ahead", r"does not give [\d.]+MiB for weights"):
        assert re.search(words, told), told


@pytest.mark.slow
def test_every_large_allocation_may_fail(runs: Runs, right: list[int], tmp_path: Path) -> None:
    """One after the other: the right tokens, or one line and exit code 1."""
    log = tmp_path / "log"
    for number in range(200):
        log.unlink(missing_ok=True)
        faults = {"FAULT_MEMORY": f"{1 << 20},{END},{number},1", "FAULT_LOG": str(log)}
        done = runs.run(runs.command(tokens=NEW), faults)
        if not log.exists():
            assert number > 10
            return
        if (
            "memory for thread-local data" in done.err
        ):  # the C library's own words, and its exit code, when Jittor starts
            continue
        assert done.ids == right if done.code == 0 else done.error
    raise AssertionError("there is no end to allocations")


def test_a_full_temporary_folder_is_not_needed(runs: Runs, right: list[int], tmp_path: Path) -> None:
    done = runs.run(runs.command(tokens=NEW), {"FAULT_FULL": str(tmp_path / "tmp")})
    assert (done.code, done.ids) == (0, right), done.err


# --- signals, whole processes


def test_sigkill_leaves_nothing_behind(runs: Runs) -> None:
    before = runs.left()
    child = runs.start(runs.command(tokens=200), reads("slow", (4096, END), milliseconds=4))
    first_byte(child)
    child.kill()
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert runs.left() == before


@pytest.mark.parametrize("when", ["loading", "streaming"])
def test_ctrl_c_does_not_wait_for_a_slow_disk(runs: Runs, when: str, tmp_path: Path) -> None:
    """Reads that take ten minutes: the program ends long before them."""
    before, log = runs.left(), tmp_path / "log"
    after = 0 if when == "loading" else 200
    faults = {**reads("slow", places(runs.model)["matrices"], after, milliseconds=600_000), "FAULT_LOG": str(log)}
    child = runs.start(runs.command(tokens=200), faults)
    until(log.exists)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and b"Interrupted." in err and b"Traceback" not in err, err
    assert runs.left() == before


def until(condition: Callable[[], bool]) -> None:
    """Wait for another process, for a minute at most."""
    pause = threading.Event()
    for _ in range(600):
        if condition():
            return
        pause.wait(0.1)
    raise AssertionError("it does not come to pass")
