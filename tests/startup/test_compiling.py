"""The one-time compilation, with small scripts in place of Jittor's hour of g++: lock, reports, kills, remnants."""

from __future__ import annotations

import _thread
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from moss_jt.errors import StartupError
from moss_jt.language import set_language
from moss_jt.startup import build, compiling
from moss_jt.startup.plan import Plan, make_plan

WAIT_S = 20

# A child with the real guard; BODY is what the builder does, with `plan`, `report`, `stamp()` at hand.
CHILD = """
import json, os, sys, time
sys.path[:] = json.loads(sys.argv[1])
from pathlib import Path
from moss_jt.startup import build
from moss_jt.startup.compiling import stamp_file
def work(plan, report):
    def stamp():
        stamp_file(plan).parent.mkdir(exist_ok=True)
        stamp_file(plan).write_text(json.dumps({"files": {os.__file__: os.stat(os.__file__).st_size}}))
    home = plan.home
    BODY
build._build = work
build.main()
"""


class Recorder:
    """A Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, ...] | float] = []

    def begin(self, task: str, total: float, unit: str) -> None:
        self.heard.append((task, str(total), unit))

    def advance(self, amount: float) -> None:
        self.heard.append(amount)

    def end(self) -> None:
        self.heard.append(("end",))


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan in a home of its own, for which nothing has to be copied."""
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path))
    monkeypatch.setattr(compiling, "prepare", lambda plan: None)
    monkeypatch.setattr(compiling, "is_prepared", lambda plan: True)
    return make_plan("cpu")


def child_does(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.setattr(compiling, "_CHILD", CHILD.replace("BODY", body.strip().replace("\n", "\n    ")))


def wait_for(truth: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not truth():
        assert time.monotonic() < deadline, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.02)


def is_over(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_reports_reach_the_progress(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    child_does(
        monkeypatch, 'report.begin("core", 2, "files"); report.advance(1); report.advance(1); report.end(); stamp()'
    )
    progress = Recorder()
    compiling.ensure_built(plan, progress)
    assert progress.heard == [("Compiling Jittor (once on this computer)", "2.0", "files"), 1.0, 1.0, ("end",)]
    assert compiling.is_built(plan)


def test_words_follow_the_parent_s_language(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    child_does(
        monkeypatch, 'report.begin("kernels", 1, "kernels"); report.begin("core", 1, "files"); report.end(); stamp()'
    )
    set_language("zh")
    progress = Recorder()
    compiling.ensure_built(plan, progress)
    assert [heard[0] for heard in progress.heard if isinstance(heard, tuple)] == [
        "编译首批内核（仅需一次）",
        "end",
        "编译 Jittor（本机仅需一次）",
        "end",
    ]


def test_what_is_built_is_not_built_again(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    child_does(monkeypatch, 'stamp(); open(home / "runs", "a").write("x")')
    for _ in range(3):
        compiling.ensure_built(plan, Recorder())
    assert (plan.home / "runs").read_text("ascii") == "x"


def test_stamp_counts_only_while_its_files_are_there(plan: Plan, tmp_path: Path) -> None:
    core = tmp_path / "core.so"
    core.write_text("code", "ascii")
    stamp = compiling.stamp_file(plan)
    stamp.parent.mkdir()
    stamp.write_text(json.dumps({"files": {str(core): 4}}), "utf-8")
    assert compiling.is_built(plan)
    core.write_text("", "ascii")
    assert not compiling.is_built(plan), "cut off by a loss of power"
    core.unlink()
    assert not compiling.is_built(plan)
    for broken in ("", "[]", "{}", '{"files": 3}', '{"files": ["core.so"]}', "\0"):
        stamp.write_text(broken, "utf-8")
        assert not compiling.is_built(plan)


def test_compiler_s_error_is_told_with_the_log(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    child_does(
        monkeypatch, 'print("a.cc: In function f"); print("a.cc:3: fatal error: x.h: No such file"); os._exit(1)'
    )
    with pytest.raises(StartupError) as caught:
        compiling.ensure_built(plan, Recorder())
    log = plan.home / "build.log"
    assert str(caught.value) == (
        f"compiling Jittor failed: a.cc:3: fatal error: x.h: No such file (whole output: {log})"
    )
    assert "In function f" in log.read_text("utf-8")


def test_full_disk_is_told(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    child_does(monkeypatch, 'print("error: x"); print("/tmp/x.s: No space left on device"); os._exit(1)')
    with pytest.raises(StartupError, match=r"compiling Jittor failed: /tmp/x\.s: No space left on device \(whole"):
        compiling.ensure_built(plan, Recorder())


@pytest.mark.parametrize(
    "body",
    ["os.kill(os.getpid(), 9)", 'print("g++: fatal error: Killed signal terminated program cc1plus"); os._exit(1)'],
)
def test_out_of_memory_is_guessed(plan: Plan, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    child_does(monkeypatch, body)
    with pytest.raises(
        StartupError, match=r"was killed, which happens when memory runs out .* it goes on where it stopped"
    ):
        compiling.ensure_built(plan, Recorder())


def test_child_that_claims_success_without_a_stamp(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    child_does(monkeypatch, "pass")
    with pytest.raises(StartupError, match="compiling Jittor failed: no output"):
        compiling.ensure_built(plan, Recorder())


def test_jittor_s_wish_to_be_started_again_is_granted(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    child_does(
        monkeypatch,
        """
if not (home / "seen").exists():
    (home / "seen").touch()
    sys.exit(0)
stamp()
""",
    )
    compiling.ensure_built(plan, Recorder())
    assert compiling.is_built(plan)


def test_ctrl_c_ends_the_whole_group(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    child_does(
        monkeypatch,
        """
import subprocess
sleeper = subprocess.Popen(["sleep", "600"])
(home / "pids").write_text(f"{os.getpid()} {sleeper.pid}\\n")
time.sleep(600)
""",
    )
    pids = plan.home / "pids"

    def interrupt() -> None:
        wait_for(lambda: pids.is_file() and pids.read_text("ascii").endswith("\n"), "the start of the child")
        _thread.interrupt_main()

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        compiling.ensure_built(plan, Recorder())
    for pid in map(int, pids.read_text("ascii").split()):
        wait_for(partial(is_over, pid), f"the end of {pid}")


PARENT = """
import sys
sys.path[:0] = {path!r}
from moss_jt.progress import Quiet
from moss_jt.startup import compiling
from moss_jt.startup.plan import make_plan
compiling.prepare = lambda plan: None
compiling.is_prepared = lambda plan: True
compiling._CHILD = {child!r}
compiling.ensure_built(make_plan("cpu"), Quiet())
"""


def start_parent(body: str) -> subprocess.Popen[bytes]:
    child = CHILD.replace("BODY", body.strip().replace("\n", "\n    "))
    return subprocess.Popen([sys.executable, "-c", PARENT.format(path=sys.path, child=child)])


def test_parent_s_death_ends_everything_and_frees_the_lock(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = start_parent(
        """
import subprocess
sleeper = subprocess.Popen(["sleep", "600"], close_fds=False)
(home / "pids").write_text(f"{os.getpid()} {sleeper.pid}\\n")
time.sleep(600)
"""
    )
    pids = plan.home / "pids"
    wait_for(lambda: pids.is_file() and pids.read_text("ascii").endswith("\n"), "the start of the child")
    parent.kill()
    parent.wait()
    for pid in map(int, pids.read_text("ascii").split()):
        wait_for(partial(is_over, pid), f"the end of {pid}")
    child_does(monkeypatch, "stamp()")
    progress = Recorder()
    compiling.ensure_built(plan, progress)
    assert progress.heard == []  # had to wait for nobody


def test_second_process_waits_and_then_finds_it_built(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start_parent('(home / "begun").touch()\nwhile not (home / "go").exists(): time.sleep(0.02)\nstamp()')
    wait_for((plan.home / "begun").exists, "the start of the first")
    child_does(monkeypatch, 'raise SystemError("must not run")')

    class LetGo(Recorder):
        def advance(self, amount: float) -> None:
            super().advance(amount)
            (plan.home / "go").touch()

    progress = LetGo()
    compiling.ensure_built(plan, progress)
    assert isinstance(progress.heard[0], tuple)
    assert progress.heard[0][0] == "Another process is compiling Jittor, waiting for it"
    assert first.wait(WAIT_S) == 0


def test_no_room(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moss_jt.startup.machine.free_bytes", lambda folder: 1 << 20)
    with pytest.raises(StartupError, match="needs 1024 MiB of free disk"):
        compiling.ensure_built(plan, Recorder())


@pytest.mark.parametrize(
    ("name", "content", "key", "key_age_s", "broken"),
    [
        ("a.o", b"x", b"k", 0, False),
        ("whole.so", b"x", b"k", -5, False),
        ("no_key.o", b"x", None, 0, True),
        ("empty.so", b"", b"k", 0, True),
        ("empty_key.o", b"x", b"", 0, True),
        ("newer_than_key.o", b"x", b"k", 5, True),
        ("data.o", b"x", None, 0, False),
    ],
)
def test_remnants_of_a_killed_compiler(
    tmp_path: Path, *, name: str, content: bytes, key: bytes | None, key_age_s: int, broken: bool
) -> None:
    output = tmp_path / name
    output.write_bytes(content)
    now = time.time()
    os.utime(output, (now, now))
    if key is not None:
        key_file = tmp_path / f"{name}.key"
        key_file.write_bytes(key)
        os.utime(key_file, (now - key_age_s, now - key_age_s))
    assert build._is_broken(output) is broken
