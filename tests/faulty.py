"""Whole processes of moss-jt under faults: a shim before the C library, limits, signals; and what they leave behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from moss_jt.checkpoint import Checkpoint
from moss_jt.converters.synth import preset_config, synthesize
from moss_jt.memory import parse_size

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 120
PROMPT = (5, 17, 250, 3, 99, 8)
# Starts a program within limits and tells the most memory that it took. Small itself, for the peak is handed down.
_WATCH = """
import json, os, resource, sys
for which, most in json.loads(sys.argv[2]):
    resource.setrlimit(which, (most, most))
number = os.posix_spawnp(sys.argv[3], sys.argv[3:], os.environ)
_, status, used = os.wait4(number, 0)
with open(sys.argv[1], "w") as file:
    file.write(str(used.ru_maxrss << 10))
sys.exit(os.waitstatus_to_exitcode(status) & 255)
"""


def build_shim(folder: Path) -> Path:
    """Compile faults.cpp."""
    shim = folder / "faults.so"
    source = Path(__file__).parent / "faults.cpp"
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-o", str(shim), str(source), "-ldl"]
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
    return shim


def small_model(folder: Path, *, tokenizer: bool = True) -> Path:
    """25 MB of random float16 weights: enough to be streamed."""
    config = replace(preset_config("tiny"), n_embd=512, n_head=8, n_positions=512)
    synthesize(config, folder)
    if not tokenizer:  # then tokens are told as numbers, and none of them ends an answer but one
        for name in (
            "vocab.json",
            "merges.txt",
            "added_tokens.json",
            "special_tokens_map.json",
            "tokenizer_config.json",
        ):
            (folder / name).unlink()
    return folder


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str
    peak: int

    @property
    def error(self) -> str:
        """Its one line of error."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("moss-jt: ")]
        assert self.code == 1 and len(lines) == 1, (self.code, self.err)
        return lines[0]

    @property
    def ids(self) -> list[int]:
        """The tokens that it printed."""
        return [int(word) for word in self.out.split()]


@dataclass
class Runs:
    """Starts processes in folders of their own and looks what is left there.

    Attributes:
        folder: for the model, the working folder and the temporary one.
        model: weights without a tokenizer.
        shim: see faults.cpp.
        smallest: the least memory that a process names.
    """

    folder: Path
    model: Path
    shim: Path
    smallest: int = 0
    places: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.places = [self.folder / "cwd", self.folder / "tmp", self.model]
        for place in self.places:
            place.mkdir(exist_ok=True)

    def environment(self, faults: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
        """Of a process with these faults."""
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.folder / "tmp"), "LC_ALL": "C.UTF-8"}
        return {**variables, **({"LD_PRELOAD": str(self.shim), **faults} if faults else {})}

    def left(self) -> list[str]:
        """Every file in the places where something could be left behind; Jittor's compiled core is shared and left out."""
        home = Path(os.environ["MOSS_JT_HOME"])
        files = [path for place in (*self.places, home) for path in place.rglob("*") if path.name != "jittor"]
        return sorted(str(path) for path in files if home / "jittor" not in path.parents)

    def command(self, *more: str, memory: int | None = None, tokens: int = 8) -> list[str]:
        """`moss-jt generate` that streams most of the weights."""
        limit = self.smallest + (4 << 20) if memory is None else memory
        words = f"--memory {limit} --context 256 --greedy --max-new-tokens {tokens}".split()
        ids = ",".join(map(str, PROMPT))
        return ["-m", "moss_jt.cli", "generate", "--model", str(self.model), "--ids", ids, *words, *more]

    def start(
        self, arguments: Sequence[str], faults: Mapping[str, str] = MappingProxyType({})
    ) -> subprocess.Popen[bytes]:
        """Start a process that somebody else ends; nothing that it writes is read ahead."""
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.folder / "cwd",
            env=self.environment(faults),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )

    def run(
        self,
        arguments: Sequence[str],
        faults: Mapping[str, str] = MappingProxyType({}),
        *,
        text: str = "",
        limits: Mapping[int, int] = MappingProxyType({}),
    ) -> Ended:
        """Run a process to its end; nothing may be left behind."""
        before = self.left()
        with tempfile.NamedTemporaryFile("r") as peak:
            done = subprocess.run(
                [
                    sys.executable,
                    "-S",
                    "-E",
                    "-c",
                    _WATCH,
                    peak.name,
                    json.dumps(list(limits.items())),
                    sys.executable,
                    *arguments,
                ],
                cwd=self.folder / "cwd",
                env=self.environment(faults),
                input=text,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
            assert self.left() == before
            return Ended(done.returncode, done.stdout, done.stderr, int(peak.read() or 0))

    def find_smallest(self) -> None:
        """Ask a process for the least memory that does."""
        refused = self.run(self.command(memory=1)).error
        found = re.search(r"give at least ([\d.]+\w+)", refused)
        assert found is not None, refused
        self.smallest = parse_size(found.group(1))

    def evaluate(
        self, program: str, faults: Mapping[str, str] = MappingProxyType({}), **values: object
    ) -> dict[str, object]:
        """What a Python program puts into `result`, which it finds with `values` in its names."""
        names = {"folder": str(self.model), "prompt": list(PROMPT), "memory": self.smallest + (4 << 20), **values}
        lines = ["import json, sys", f"globals().update(json.loads({json.dumps(names)!r}))", "result = {}", program]
        done = self.run(["-c", "\n".join([*lines, "print(json.dumps(result))"])], faults)
        assert done.code == 0, done.err
        found: dict[str, object] = json.loads(done.out.splitlines()[-1])
        return {**found, "peak": done.peak}


def places(model: Path) -> dict[str, tuple[int, int]]:
    """(first byte, first byte behind) of parts of the only weight file."""
    entries = Checkpoint.open(model).entries
    spans = {name: (entry.offset, entry.offset + entry.nbytes) for name, entry in entries.items()}
    return {
        "header": (0, 8),
        "matrices": (spans["transformer.h.0.attn.qkv_proj.weight"][0], spans["lm_head.weight"][1]),
        "embedding": spans["transformer.wte.weight"],
        "norm": spans["transformer.ln_f.weight"],
        "held": (spans["transformer.h.1.mlp.fc_in.weight"][0], spans["transformer.h.1.mlp.fc_in.weight"][0] + 4096),
        "streamed": (
            spans["transformer.h.2.mlp.fc_out.weight"][1] - 8192,
            spans["transformer.h.2.mlp.fc_out.weight"][1],
        ),
    }
