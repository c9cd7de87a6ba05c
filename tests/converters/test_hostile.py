"""Nothing that a stranger puts into a checkpoint runs, crashes, hangs or fills the memory: each gives one clear line."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile import CASES, make_hostile
from hostile.base import Hostile
from hostile.pickles import instance_payload, object_payload, os_system, stack_payload, text_payload

from moss_jt.converters.source import open_source
from moss_jt.errors import MossError

HERE = Path(__file__).parent
MEMORY = 256 << 20  # bytes that the reader may take beyond what Python and numpy take
SECONDS = 5.0

READER = """
import json, resource, sys, time
from pathlib import Path
import numpy
from moss_jt.converters.source import open_source
from moss_jt.errors import CheckpointError, ConfigError

size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]),) * 2)
results = {}
for folder in sys.argv[2:]:
    begun = time.process_time()
    try:
        open_source(Path(folder)).close()
        kind, message = "opened", ""
    except (CheckpointError, ConfigError) as error:
        kind, message = "refused", str(error)
    except BaseException as error:
        kind, message = "crashed", repr(error)
    results[folder] = kind, message, time.process_time() - begun
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of each bad checkpoint: (kind, message, seconds, its folder); all read by one process with little memory."""
    made = make_hostile(tmp_path_factory.mktemp("hostile"))
    command = [sys.executable, "-c", READER, str(MEMORY), *(str(folder) for _, folder in made)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    return {name: (*results[str(folder)], folder) for name, folder in made}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_is_refused_in_one_clear_line(case: Hostile, outcome: dict[str, Any]) -> None:
    kind, message, seconds, folder = outcome[case.name]
    assert kind == "refused", message
    assert case.words in message
    assert str(folder) in message
    assert message.isprintable()
    assert len(message) < 600 + len(str(folder))
    assert seconds < SECONDS


def test_nothing_ran(outcome: dict[str, Any]) -> None:
    ran = [name for name, (*_, folder) in outcome.items() if (folder / "RAN").exists()]
    assert len(outcome) == len(CASES) >= 30
    assert ran == []


@pytest.mark.parametrize("make", [os_system, instance_payload, object_payload, stack_payload, text_payload])
def test_the_payloads_are_real(make: Any, tmp_path: Path) -> None:
    pickle.loads(make(f"touch '{tmp_path / 'RAN'}'"))
    assert (tmp_path / "RAN").exists()


def damage(data: bytes, rng: random.Random) -> bytes:
    """One to three bytes changed, or the end cut off, or a piece taken out."""
    kind = rng.random()
    if kind < 0.1:
        return data[: rng.randrange(len(data))]
    if kind < 0.2:
        start = rng.randrange(len(data))
        return data[:start] + data[start + rng.randrange(1, 40) :]
    result = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        result[rng.randrange(len(data))] = rng.choice((0, 255, rng.randrange(256)))
    return bytes(result)


def fuzz(data: bytes, path: Path, *, seed: int, rounds: int) -> int:
    """Open and read `rounds` damaged copies; returns how many were refused. Whatever is no MossError passes through."""
    rng = random.Random(seed)
    refused = 0
    for _ in range(rounds):
        path.unlink(missing_ok=True)
        path.write_bytes(damage(data, rng))
        try:
            with open_source(path) as source:
                for name, found in source.tensors.items():
                    assert source.read(name).nbytes == found.nbytes
        except MossError as error:
            assert str(error).isprintable()
            refused += 1
    return refused


def small_safetensors() -> bytes:
    """Three small tensors."""
    header = {
        "__metadata__": {"format": "pt"},
        "lm_head.bias": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]},
        "lm_head.weight": {"dtype": "BF16", "shape": [4, 2], "data_offsets": [8, 24]},
        "transformer.h.0.attn.causal_mask": {"dtype": "BOOL", "shape": [1, 1, 2, 2], "data_offsets": [24, 28]},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(range(28))


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin", "no-checksums.bin", "model.safetensors"])
def test_random_damage_is_refused_or_harmless(name: str, tmp_path: Path) -> None:
    data = small_safetensors() if name == "model.safetensors" else (HERE / "data" / name).read_bytes()
    refused = fuzz(data, tmp_path / name, seed=11, rounds=500)
    assert 125 < refused < 500  # much of a file is padding and numbers, where damage cannot be seen
