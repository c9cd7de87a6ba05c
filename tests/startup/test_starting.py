"""A process that starts Jittor is afterwards what it was; each test looks into a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moss_jt.errors import StartupError
from moss_jt.startup import starting
from moss_jt.startup.selfcheck import check

ROOT = Path(__file__).parent.parent.parent
START = "from moss_jt import startup\njt = startup.import_jittor(device='cpu')\n"


@pytest.fixture
def user_home(tmp_path: Path, jittor: ModuleType) -> Path:
    """The home of a user who has Jittor settings of their own; Jittor's core is compiled."""
    settings = tmp_path / "user" / ".cache" / "jittor" / "config.json"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"JITTOR_HOME": "/somewhere/else"}', "utf-8")
    return tmp_path / "user"


def run(program: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def answer(program: str, home: Path, **variables: str) -> Any:
    """What a program prints as JSON in its last line."""
    done = run(program, home, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def tree(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text("utf-8") for file in folder.rglob("*") if file.is_file()}


def test_process_is_as_before(user_home: Path) -> None:
    program = (
        "import faulthandler, json, os, resource, signal, ssl, sys\n"
        "import numpy, multiprocessing, threading, urllib.request\n"  # what comes in with Jittor and leaves traces of its own
        "threading.Thread(target=int).start()\n"  # the C library catches a signal of its own from the first thread on
        "def state():\n"
        "    handlers = [str(signal.getsignal(s)) for s in range(1, 32)]\n"
        "    caught = [l for l in open('/proc/self/status') if l.startswith(('SigCgt', 'SigIgn', 'SigBlk'))]\n"
        "    return [dict(os.environ), sys.getrecursionlimit(), sys.getdlopenflags(), sys.executable, handlers, caught,\n"
        "            list(resource.getrlimit(resource.RLIMIT_STACK)), str(ssl._create_default_https_context)]\n"
        "before, path = state(), list(sys.path)\n"
        f"{START}"
        "jt.zeros(3).numpy()\n"
        "new = [p for p in sys.path if p not in path]\n"
        "print(json.dumps([state() == before, new, jt.__version__, startup.device_in_use()]))\n"
    )
    same, new, version, device = answer(program, user_home, nvcc_path="/none", debug="1")
    assert same
    assert all("/.cache/jittor/jt1.3.11/" in place for place in new)
    assert version.startswith("1.3.11.")
    assert device == "cpu"


def test_user_s_own_jittor_settings_are_untouched(user_home: Path) -> None:
    before = tree(user_home)
    program = START + (
        "import json, numpy as np, time\n"
        "x = jt.array(np.arange(6, dtype='float32'))\n"
        "y = jt.code([6], 'float32', [x], cpu_src=f'for (int i=0; i<6; i++) out0_p[i] = in0_p[i] + {time.time_ns() % 10**6};')\n"
        "print(json.dumps(int((y - x).numpy()[0]) >= 0))\n"  # a kernel of a new text: the compiler and its helpers run
    )
    assert answer(program, user_home) is True
    assert tree(user_home) == before
    assert not list(user_home.rglob("jt*"))


def test_ctrl_c_in_an_op_is_a_keyboard_interrupt(user_home: Path) -> None:
    program = START + (
        "import json, os, signal, threading\n"
        "x = jt.rand(1500, 1500)\n"
        "threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "try:\n"
        "    while True:\n"
        "        (x @ x).sync()\n"
        "except KeyboardInterrupt:\n"
        "    print(json.dumps(jt.ones(3).numpy().tolist()))\n"
    )
    assert answer(program, user_home) == [1, 1, 1]


def test_killed_child_does_not_take_us_along(user_home: Path) -> None:
    program = START + (
        "import json, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "child.kill()\n"
        "status = child.wait()\n"
        "time.sleep(0.2)\n"
        "print(json.dumps([status, jt.ones(2).numpy().tolist()]))\n"
    )
    assert answer(program, user_home) == [-signal.SIGKILL, [1, 1]]


def test_sigterm_ends_the_process_as_usual(user_home: Path) -> None:
    done = run(f"{START}import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n", user_home)
    assert done.returncode == -signal.SIGTERM


def test_threads_sleep_and_are_one_per_core(user_home: Path) -> None:
    program = START + (
        "import ctypes, json\n"
        "openmp = ctypes.CDLL('libgomp.so.1')\n"
        "print(json.dumps([openmp.omp_get_max_threads(), startup.device_reason()]))\n"
    )
    assert answer(program, user_home, OMP_NUM_THREADS="1")[0] == 1
    from moss_jt.startup.machine import physical_cores

    assert answer(program, user_home)[0] == physical_cores()


def test_start_is_repeatable_and_keeps_its_device(user_home: Path) -> None:
    program = START + (
        "import json\n"
        "from moss_jt.errors import StartupError\n"
        "again = startup.import_jittor(), startup.import_jittor(device='cpu'), startup.compile_needed()\n"
        "try:\n"
        "    startup.import_jittor(device='cuda')\n"
        "except StartupError as error:\n"
        "    print(json.dumps([again[0] is jt, again[1] is jt, again[2], str(error)]))\n"
    )
    assert answer(program, user_home) == [
        True,
        True,
        False,
        "Jittor already runs on cpu in this process, cuda was asked for: start a new process, and ask for cuda first",
    ]


def test_two_warm_starts_at_once(user_home: Path) -> None:
    program = [sys.executable, "-c", f"{START}print(jt.ones(2).numpy().sum())"]
    variables = {**os.environ, "HOME": str(user_home), "PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen(program, env=variables, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=300)[0].split() for process in both] == [["2.0"], ["2.0"]]


def test_jittor_utils_imported_by_somebody_else(user_home: Path) -> None:
    program = (
        "import sys, types\n"
        "sys.modules['jittor_utils'] = types.ModuleType('jittor_utils')\n"
        "from moss_jt import startup\n"
        "startup.import_jittor()\n"
    )
    done = run(program, user_home)
    assert "StartupError: jittor_utils was imported before moss-jt could prepare it" in done.stderr


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process had not started Jittor."""
    for name, value in (("module", None), ("device", None), ("failure", None)):
        monkeypatch.setattr(starting._Started, name, value)
    for name in [name for name in sys.modules if name.split(".")[0] in ("jittor", "jittor_utils")]:
        monkeypatch.delitem(sys.modules, name)


class FakeVar:
    """What a Jittor gives back that reads no array of this numpy."""

    def __init__(self, array: np.ndarray[Any, Any], factor: int) -> None:
        self.array, self.factor = array, factor

    def numpy(self) -> np.ndarray[Any, Any]:
        return self.array * self.factor

    def __matmul__(self, other: FakeVar) -> FakeVar:
        return FakeVar(self.array @ other.array, self.factor)


def fake_jittor(factor: int) -> Any:
    return SimpleNamespace(array=lambda array: FakeVar(array, factor), flags=SimpleNamespace(use_cuda=0))


def test_foreign_jittor_that_works_is_taken(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = fake_jittor(1)
    monkeypatch.setitem(sys.modules, "jittor", foreign)
    assert starting.import_jittor() is foreign
    assert starting.device_in_use() == "cpu"
    assert starting.device_reason() == "jittor was already imported"


def test_foreign_jittor_that_gives_garbage_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jittor", fake_jittor(3))
    with pytest.raises(
        StartupError, match=r"a float32 array read back should be \[1\.0, .*\], found \[3\.0, .*before anything"
    ):
        starting.import_jittor()


def test_device_before_the_start(fresh: None) -> None:
    with pytest.raises(StartupError, match="Jittor is not started yet"):
        starting.device_in_use()


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (
            ModuleNotFoundError("no", name="astunparse"),
            r"Jittor needs the package astunparse: .* -m pip install astunparse",
        ),
        (RuntimeError("\n boom \nmore"), r"importing Jittor failed: RuntimeError: boom \(its last compilation's log: "),
        (SystemExit(0), "compiled core was out of date and has been renewed: start again"),
    ],
)
def test_import_that_fails_is_told_and_not_tried_again(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raised: BaseException, words: str
) -> None:
    calls = []
    stamp = tmp_path / "stamp"
    stamp.touch()
    monkeypatch.setattr(starting, "stamp_file", lambda plan: stamp)

    def load(plan: object) -> None:
        calls.append(plan)
        raise raised

    monkeypatch.setattr(starting, "ensure_built", lambda plan, progress: None)
    monkeypatch.setattr(starting, "load", load)
    for _ in range(2):
        with pytest.raises(StartupError, match=words):
            starting.import_jittor(device="cpu")
    assert len(calls) == 1
    assert stamp.exists() != isinstance(raised, RuntimeError), "what was compiled is looked through at the next start"


def test_interrupted_import_is_not_tried_again(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(plan: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(starting, "ensure_built", lambda plan, progress: None)
    monkeypatch.setattr(starting, "load", load)
    with pytest.raises(KeyboardInterrupt):
        starting.import_jittor(device="cpu")
    with pytest.raises(StartupError, match="the start of Jittor was interrupted in this process: start a new one"):
        starting.import_jittor(device="cpu")


def test_self_check_is_quick_once_warm(jittor: ModuleType) -> None:
    check(jittor)
    best = min(timed(jittor) for _ in range(5))
    assert best < 0.05


def timed(jittor: ModuleType) -> float:
    begun = time.perf_counter()
    check(jittor)
    return time.perf_counter() - begun
