"""moss-jt eval-ppl as a user runs it: words, exit codes, JSON."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moss_jt.converters.quantize import quantize
from moss_jt.converters.synth import preset_config, synthesize

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a tokenizer."""
    return synthesize(preset_config("tiny", layers=2), tmp_path_factory.mktemp("models") / "m").path


def run(*args: object, lang: str = "en") -> subprocess.CompletedProcess[str]:
    """Run moss-jt eval-ppl in a process of its own."""
    words = [sys.executable, "-m", "moss_jt.cli", "eval-ppl", *map(str, args), "--lang", lang]
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, timeout=600)


def test_text_ids_and_formats(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"\xef\xbb\xbf" + b"plain words, over and over. " * 8)
    exact = json.loads(run("--model", folder, text, "--json", "--compute", "exact", "--context", 100).stdout)
    assert exact["perplexity"] == pytest.approx(math.exp(exact["mean_nats"]))
    assert 20 < exact["perplexity"] < 5000
    assert (exact["tokens"], exact["scored_tokens"], exact["context"], exact["stride"]) == (224, 223, 100, 50)
    assert (exact["compute"], exact["kv"], exact["windows"]) == ("exact", "float32", 4)
    ids = tmp_path / "ids"
    numbers = np.random.default_rng(0).integers(95, size=30)
    ids.write_text(json.dumps(numbers.tolist()))
    said = run("--model", folder, "--ids", ids, lang="zh")
    assert float(said.stdout) > 1
    assert "共 30 个词元，计分 29 个" in said.stderr
    int8 = quantize(folder, tmp_path / "q", bits=8, head="int8").conversion.path
    found = json.loads(run("--model", int8, text, "--json", "--compute", "exact", "--context", 100).stdout)
    assert 0 < abs(found["perplexity"] / exact["perplexity"] - 1) < 0.02


def test_errors_are_one_line(folder: Path, tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_bytes(b"")
    binary.write_bytes(b"ab\xff\xfe")
    for args, words in (
        ((empty,), "the text has 0 tokens; at least 2 are needed"),
        ((binary,), "binary is not UTF-8 at byte 2 (0xff)"),
        ((tmp_path / "no",), "no cannot be read: No such file"),
        ((binary, "--ids"), "entry 1 is 'ab"),
        ((empty, "--stride", 3000), "stride is 3000; it must be a whole number from 1 to 2048"),
    ):
        done = run("--model", folder, *args)
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert done.stderr.splitlines()[-1].startswith("moss-jt: ")
        assert words in done.stderr.splitlines()[-1]
        assert ("loaded in" in done.stderr) == (args[0] == empty), "a text is read before weights fill the memory"
    assert run("--model", folder, empty, "--ids", "--markers").returncode == 2
    assert run("--model", folder, empty, "--context", 0).returncode == 2
