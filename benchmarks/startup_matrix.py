"""Does Jittor start where users have trouble with it? A table: one row for each kind of machine.

    python benchmarks/startup_matrix.py --scratch DIR --python python3.11 python3.12 [--torch-site DIR] [--only a,b]

Each row starts Jittor in processes of their own, in environments made for it under --scratch, and ends in right
numbers (12 dtypes read back, matrix products, an op compiled on the spot) or in the one-line error that is asked
for. In each the user's own ~/.cache/jittor must stay as it was. Four rows compile Jittor from nothing, minutes
each: no-network, no-python-config, two-first-starts, sigkill. Environments and compiled cores under --scratch are
used again by later calls; delete the folder to begin anew. Making the environments needs pip's network, the rows
do not. One JSON line comes last; exit code 1 if a row is not as asked.

The first --python makes most environments, the others take turns in the rows that compile from nothing, so that
several releases are tried; --torch-site is a folder of packages with torch for the first --python.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from moss_jt.record import keep

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("astunparse", "six", "pillow", "tqdm", "click")
ONEDNN = ("onednn-cpu-gomp==2021.2.0", "onednn-devel-cpu-gomp==2021.2.0")
KILL_POINTS = (0, 1, 15, 30, 50, 70, 90, 110, 130, 149)  # keys of compiled files that are there
LIMIT_S = 3600

PROBE = """
import json, sys, time
begun = time.time()
BEFORE
import numpy as np
from moss_jt import startup
from moss_jt.errors import StartupError
try:
    jt = startup.import_jittor(device="auto")
except StartupError as error:
    print(json.dumps({"error": str(error)}))
    sys.exit(0)
started = time.time() - begun
wrong = []
for name in "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split():
    whole = np.arange(20).reshape(4, 5).astype(name)
    for shape, array in (("whole", whole), ("transposed", whole.T), ("sliced", whole[1:, ::2])):
        if not np.array_equal(jt.array(array).numpy(), array):
            wrong.append(f"{name} {shape}")
a, b = np.random.rand(65, 129).astype("float32"), np.random.rand(129, 33).astype("float32")
if abs((jt.array(a) @ jt.array(b)).numpy() - a @ b).max() > 1e-4:
    wrong.append("matmul")
if abs((jt.array(a) @ jt.array(b.T.copy()).transpose(1, 0)).numpy() - a @ b).max() > 1e-4:
    wrong.append("transposed matmul")
AFTER
print(json.dumps({"wrong": wrong, "device": startup.device_in_use(), "why": startup.device_reason(),
    "python": sys.version.split()[0], "numpy": np.__version__, "onednn": bool(jt.mkl_ops), "started_s": started,
    "torch": "torch" in sys.modules}))
"""


@dataclass
class Row:
    """What came of one row."""

    name: str
    asked: str
    found: str = ""
    good: bool = False
    seconds: float = 0.0
    starts: list[dict[str, Any]] = field(default_factory=list)


class Matrix:
    """The environments, homes and probes under one scratch folder."""

    def __init__(self, scratch: Path, pythons: list[str], torch_site: Path | None) -> None:
        self.scratch, self.pythons, self.torch_site = scratch, pythons, torch_site
        self.user = scratch / "user"
        settings = self.user / ".cache" / "jittor" / "config.json"
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text('{"JITTOR_HOME": "/a/folder/of/the/user"}', "utf-8")

    def turn(self, number: int) -> str:
        """The interpreter for a row that compiles from nothing."""
        return self.pythons[number % len(self.pythons)]

    def venv(self, name: str, python: str, numpy: str, *, onednn: bool = False) -> Path:
        """The interpreter of an environment with Jittor, made at the first call."""
        folder = self.scratch / "venvs" / name
        inner = folder / "bin" / "python"
        done = folder / "whole"
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([python, "-m", "venv", str(folder)], check=True)
            wanted = ["jittor==1.3.11.0", *NEEDED, numpy, *(ONEDNN if onednn else ())]
            pip = [str(inner), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "--only-binary=numpy", *wanted], check=True)
            done.touch()
        return inner

    def environment(self, home: str, **changes: str) -> dict[str, str]:
        """The variables of a user who has this home for us."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        own = {"HOME": str(self.user), "MOSS_JT_HOME": str(self.scratch / "homes" / home), "PYTHONPATH": str(ROOT)}
        return {**kept, **own, **changes}

    def probe(
        self,
        python: Path,
        home: str,
        *,
        before: str = "",
        after: str = "",
        prefix: tuple[str, ...] = (),
        **changes: str,
    ) -> dict[str, Any]:
        """Start Jittor and compute; what the program found, or how it ended."""
        program = PROBE.replace("BEFORE", before).replace("AFTER", after)
        done = subprocess.run(
            [*prefix, str(python), "-c", program],
            env=self.environment(home, **changes),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        return outcome(done.returncode, done.stdout, done.stderr)

    def settings(self) -> dict[str, bytes]:
        """The files in the user's own Jittor folder, and whatever else appeared in the user's home."""
        return {str(file): file.read_bytes() for file in sorted(self.user.rglob("*")) if file.is_file()}


def outcome(code: int, stdout: str, stderr: str) -> dict[str, Any]:
    """The last line of a probe as data, or its exit code and last words."""
    try:
        return dict(json.loads(stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        return {"exit": code, "words": (stderr.strip().splitlines() or ["nothing"])[-1]}


def is_right(start: dict[str, Any]) -> bool:
    """Whether a probe started and all its numbers were right."""
    return start.get("wrong") == []


def describe(start: dict[str, Any]) -> str:
    """A probe in a few words."""
    if "error" in start:
        return f"refused: {start['error']}"
    if "exit" in start:
        return f"ended with {start['exit']}: {start['words']}"
    numbers = "numbers right" if is_right(start) else f"wrong: {', '.join(start['wrong'])}"
    onednn = " oneDNN" if start["onednn"] else ""
    return f"{numbers}; Python {start['python']} numpy {start['numpy']}{onednn} {start['device']}, {start['started_s']:.1f} s"


def judge(row: Row, *starts: dict[str, Any], good: bool | None = None) -> None:
    """Write what was found into a row; right numbers in every start are good unless said otherwise."""
    row.starts += starts
    row.found = " | ".join(map(describe, starts))
    row.good = all(map(is_right, starts)) if good is None else good


def offline_prefix() -> tuple[tuple[str, ...], dict[str, str]]:
    """How to start a program that reaches no network: a command before it, or proxies that lead nowhere."""
    command = ("unshare", "-rn")
    if shutil.which("unshare") and subprocess.run([*command, "true"], check=False, capture_output=True).returncode == 0:
        return command, {}
    return (), dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


def fresh(matrix: Matrix, home: str) -> None:
    """Forget what was compiled in a home."""
    shutil.rmtree(matrix.scratch / "homes" / home, ignore_errors=True)


def main_venv(matrix: Matrix) -> Path:
    """The environment of most rows: numpy 1.26 and oneDNN."""
    return matrix.venv("main", matrix.pythons[0], "numpy<2", onednn=True)


def no_network(matrix: Matrix, row: Row) -> None:
    """Compile from nothing without a network."""
    prefix, proxies = offline_prefix()
    python = main_venv(matrix)
    fresh(matrix, "main")
    row.asked += f" ({' '.join(prefix) or 'closed proxies'}); compiles from nothing"
    judge(row, matrix.probe(python, "main", prefix=prefix, **proxies))


def numpy_1(matrix: Matrix, row: Row) -> None:
    """Start with numpy 1.26."""
    judge(row, matrix.probe(main_venv(matrix), "main"))


def numpy_2(matrix: Matrix, row: Row) -> None:
    """Start with numpy 2 in another environment, without compiling again."""
    start = matrix.probe(matrix.venv("numpy2", matrix.pythons[0], "numpy>=2", onednn=True), "main")
    judge(row, start)
    row.good = row.good and start["numpy"].startswith("2.") and start["started_s"] < 60


def no_python_config(matrix: Matrix, row: Row) -> None:
    """Compile from nothing in an environment without python3.x-config."""
    python = matrix.venv("turn1", matrix.turn(1), "numpy>=1.26,<3")
    named = list(python.parent.glob("python*-config"))
    fresh(matrix, "no-python-config")
    judge(row, matrix.probe(python, "no-python-config"))
    row.good = row.good and not named


def torch_beside(matrix: Matrix, row: Row) -> None:
    """Start with torch installed, imported before, imported after."""
    if matrix.torch_site is None:
        row.found, row.good = "not tried: no --torch-site", True
        return
    python = matrix.venv("torch", matrix.pythons[0], "numpy<2", onednn=True)
    packages = next((python.parent.parent / "lib").glob("python*/site-packages"))
    (packages / "torch-beside.pth").write_text(f"{matrix.torch_site}\n", "utf-8")
    use = "import torch\nif torch.ones(3, 4).matmul(torch.ones(4, 2)).sum() != 24: wrong.append('torch')"
    plain = matrix.probe(python, "main")
    first = matrix.probe(python, "main", before=f"wrong = []\n{use}")
    later = matrix.probe(python, "main", after=use)
    judge(row, plain, first, later)
    row.good = row.good and [start["torch"] for start in row.starts] == [False, True, True]


def stray_nvcc(matrix: Matrix, row: Row) -> None:
    """Start with an nvcc on PATH, in CUDA_HOME and in Jittor's own variable, and no GPU."""
    folder = matrix.scratch / "stray"
    folder.mkdir(exist_ok=True)
    (folder / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.99'\n", "ascii")
    (folder / "nvcc").chmod(0o755)
    start = matrix.probe(
        main_venv(matrix),
        "main",
        PATH=f"{folder}:{os.environ['PATH']}",
        CUDA_HOME=str(folder),
        nvcc_path=str(folder / "nvcc"),
    )
    judge(row, start)
    row.good = row.good and start["device"] == "cpu"


def read_only_home(matrix: Matrix, row: Row) -> None:
    """Start with a home on a read-only mount, or without write permission where mounts are not allowed."""
    folder = matrix.scratch / "read-only"
    folder.mkdir(exist_ok=True)
    prefix: tuple[str, ...] = (
        "unshare",
        "-rm",
        "sh",
        "-c",
        f'mount --bind {folder} {folder} && mount -o remount,bind,ro {folder} && exec "$@"',
        "sh",
    )
    if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode != 0:
        prefix = ()
        folder.chmod(0o555)
    start = matrix.probe(main_venv(matrix), "main", prefix=prefix, MOSS_JT_HOME=str(folder / "moss-jt"))
    words = start.get("error", "")
    judge(row, start, good="MOSS_JT_HOME" in words and str(folder) in words and "\n" not in words)


def two_first_starts(matrix: Matrix, row: Row) -> None:
    """Compile from nothing in two processes at once."""
    python = matrix.venv("turn2", matrix.turn(2), "numpy>=1.26,<3")
    fresh(matrix, "two")
    program = PROBE.replace("BEFORE", "").replace("AFTER", "")
    both = [
        subprocess.Popen(
            [str(python), "-c", program],
            env=matrix.environment("two"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    judge(row, *(outcome(one.wait(), *texts) for one in both for texts in [one.communicate(timeout=LIMIT_S)]))


def sigkill(matrix: Matrix, row: Row) -> None:
    """Kill the start at ten points, by turns the parent alone and every process of it at once."""
    python = matrix.venv("turn3", matrix.turn(3), "numpy>=1.26,<3", onednn=True)
    home = "killed"
    fresh(matrix, home)
    reached = []
    for number, point in enumerate(KILL_POINTS):
        process = subprocess.Popen(
            [str(python), "-c", "from moss_jt import startup; startup.import_jittor()"], env=matrix.environment(home)
        )
        while process.poll() is None and keys_in(matrix, home) < point:
            time.sleep(0.05)
        time.sleep(0.3 if point else 1.0)  # into the middle of the next files
        tree = [process.pid] if number % 2 else [process.pid, *descendants(process.pid)]
        for pid in tree:
            end(pid)
        process.wait()
        reached.append(keys_in(matrix, home))
        leftovers = wait_for_quiet(matrix, home)
        if leftovers:
            judge(row, {"exit": -9, "words": f"still running 60 s after the kill: {leftovers}"}, good=False)
            return
    start = matrix.probe(python, home)
    judge(row, start)
    row.found = f"killed {len(KILL_POINTS)} times at {reached} of 157 files, then {row.found}"


def keys_in(matrix: Matrix, home: str) -> int:
    """How many compiled files of a home are whole."""
    return sum(1 for _ in (matrix.scratch / "homes" / home).rglob("*.key"))


def end(pid: int) -> None:
    """Kill a process, if it is still there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def parents() -> dict[int, int]:
    """Every process and its parent."""
    found = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            found[int(place.parent.name)] = int(place.read_text("utf-8").rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def descendants(pid: int) -> list[int]:
    """The processes under this one, all generations."""
    above = parents()
    found = [pid]
    for one in found:
        found += [child for child, parent in above.items() if parent == one]
    return found[1:]


def wait_for_quiet(matrix: Matrix, home: str) -> list[int]:
    """Wait until no process works for this home; those that still do after a minute."""
    mark = f"MOSS_JT_HOME={matrix.scratch / 'homes' / home}\0".encode()
    busy: list[int] = []
    for _ in range(600):
        busy = [pid for pid in parents() if mark in variables_of(pid)]
        if not busy:
            break
        time.sleep(0.1)
    return busy


def variables_of(pid: int) -> bytes:
    """The environment that a process was started with."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it is over, or not ours
        return b""


def child_killed(matrix: Matrix, row: Row) -> None:
    """Kill a child of a process that runs Jittor."""
    after = (
        "import subprocess\nchild = subprocess.Popen(['sleep', '600'])\nchild.kill()\n"
        "if child.wait() != -9 or jt.ones(3).numpy().sum() != 3: wrong.append('after the child')\ntime.sleep(0.2)"
    )
    judge(row, matrix.probe(main_venv(matrix), "main", after=after))


def ctrl_c(matrix: Matrix, row: Row) -> None:
    """Interrupt a matrix product."""
    after = (
        "import os, signal, threading\nx = jt.array(np.random.rand(2500, 2500).astype('float32'))\n"
        "threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "try:\n    for _ in range(10**6): (x @ x).sync()\n    wrong.append('no KeyboardInterrupt')\n"
        "except KeyboardInterrupt:\n    pass\n"
        "if abs((jt.array(a) @ jt.array(b)).numpy() - a @ b).max() > 1e-4: wrong.append('after Ctrl-C')"
    )
    judge(row, matrix.probe(main_venv(matrix), "main", after=after))


ROWS: dict[str, tuple[Callable[[Matrix, Row], None], str]] = {
    "no-network": (no_network, "no network at all"),
    "numpy-1.26": (numpy_1, "numpy 1.26, core compiled before"),
    "numpy-2": (numpy_2, "numpy 2 in another venv, same core"),
    "no-python-config": (no_python_config, "venv without python-config; compiles from nothing"),
    "torch-beside": (torch_beside, "torch installed; imported before; imported after"),
    "stray-nvcc": (stray_nvcc, "an nvcc and no GPU"),
    "read-only-home": (read_only_home, "read-only home: one line that names the variable"),
    "two-first-starts": (two_first_starts, "two first starts at once; compile from nothing"),
    "sigkill": (sigkill, "SIGKILL at 10 points of the compilation, then a start"),
    "child-killed": (child_killed, "a child killed"),
    "ctrl-c": (ctrl_c, "Ctrl-C in the middle of an op"),
}


@contextmanager
def settings_kept(matrix: Matrix, row: Row) -> Iterator[None]:
    """Take a row's time, and see to it that the user's home stays as it was."""
    before, begun = matrix.settings(), time.monotonic()
    yield
    row.seconds = time.monotonic() - begun
    if matrix.settings() != before:
        row.good, row.found = False, f"{row.found}; THE USER'S OWN SETTINGS CHANGED"


def run_row(matrix: Matrix, name: str) -> Row:
    """Run one row and print it."""
    action, asked = ROWS[name]
    row = Row(name, asked)
    with settings_kept(matrix, row):
        action(matrix, row)
    print(
        f"{'good' if row.good else 'BAD '} {row.name:<17} {row.seconds:7.1f} s  {row.asked}\n{'':28}{row.found}",
        flush=True,
    )
    return row


def main() -> int:
    """Run the rows asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--scratch", type=Path, required=True, help="a folder with 3 GB of room")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters, not in a venv")
    parser.add_argument("--torch-site", type=Path, help="a folder of packages with torch for the first interpreter")
    parser.add_argument("--only", default=",".join(ROWS), help="rows, with commas: " + ", ".join(ROWS))
    parser.add_argument("--save", action="store_true", help="keep the JSON line under results/")
    options = parser.parse_args()
    matrix = Matrix(options.scratch.resolve(), options.python, options.torch_site)
    rows = list(map(partial(run_row, matrix), options.only.split(",")))
    results = {row.name: {"good": row.good, "seconds": round(row.seconds, 1), "found": row.found} for row in rows}
    print(keep("startup_matrix", results, save=options.save))
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
