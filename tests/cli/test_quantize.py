"""moss-jt quantize as a user runs it: words, exit codes, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from moss_folders import float_tensors, gptq_tensors, names_in, write_folder

ROOT = Path(__file__).parents[2]


def run(*args: object, lang: str = "en") -> subprocess.CompletedProcess[str]:
    """Run moss-jt in a process of its own."""
    words = [sys.executable, "-m", "moss_jt.cli", *map(str, args), "--lang", lang]
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)


def test_the_folder_the_notes_and_what_inspect_says(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    done = run("quantize", source, tmp_path / "q", "--bits", 4, "--group", 32, "--head", "int8")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'q'}\n")
    assert "Relative error: 6." in done.stderr
    assert "on average (plain rounding: 7." in done.stderr
    told = run("convert", "inspect", tmp_path / "q").stdout
    assert "12 x float16, 8 x int4, 1 x int8; int4, groups of 32; lm_head int8, groups of 128" in told
    assert json.loads(run("convert", "inspect", tmp_path / "q", "--json").stdout)["head_bits"] == 8
    assert "all as written" in run("convert", "verify", tmp_path / "q").stdout
    back = run("convert", "jittor2hf", tmp_path / "q", tmp_path / "back", "--json")
    assert json.loads(back.stdout)["dequantised_head"] == "float16"
    chinese = run("quantize", source, tmp_path / "zh", "--bits", 8, lang="zh")
    assert "相对误差：平均 0." in chinese.stderr


def test_json_tells_every_matrix(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", float_tensors("float32"))
    values = json.loads(run("quantize", source, tmp_path / "q", "--bits", 8, "--dtype", "bf16", "--json").stdout)
    assert values["path"] == str(tmp_path / "q")
    assert (values["bits"], values["group_size"], values["head_bits"], values["dtype"]) == (8, 128, None, "bfloat16")
    assert len(values["matrices"]) == 8
    for name, error in values["matrices"].items():
        assert 0.003 < error["relative_error"] < error["relative_error_plain"] < 0.01, name
    again = json.loads(run("quantize", source, tmp_path / "q", "--bits", 8, "--resume", "--json").stdout)
    assert (again["matrices"], again["resumed_tensors"]) == (values["matrices"], 21)


def test_errors_are_one_line(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    gptq = write_folder(tmp_path / "gptq", gptq_tensors(4, 32))
    for args, words in (
        ((source, tmp_path / "q"), "say whether its matrices shall have 4 bits or 8"),
        ((source, tmp_path / "q", "--bits", 4, "--group", 0), "groupsize is 0; it must be positive, or -1"),
        ((gptq, tmp_path / "q", "--bits", 4), "is int4 in groups of 32 already"),
        ((source, gptq, "--bits", 4), "gptq exists already"),
        ((tmp_path / "no", tmp_path / "q", "--bits", 4), "no"),
    ):
        done = run("quantize", *args)
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert words in done.stderr
    assert run("quantize", source, tmp_path / "q", "--bits", 5).returncode == 2
    assert names_in(tmp_path) == ["gptq", "hf"]


def test_a_conversion_with_an_int8_head(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", gptq_tensors(4, 32))
    done = run("convert", "hf2jittor", source, tmp_path / "n", "--head", "int8")
    assert "int4, groups of 32, lm_head int8" in done.stderr
    again = run("quantize", tmp_path / "n", tmp_path / "q", "--head", "int8")
    assert "nothing is left to be done" in again.stderr
