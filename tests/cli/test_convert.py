"""moss-convert as a user runs it: words, exit codes, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from moss_folders import float_tensors, gptq_tensors, names_in, write_folder

from moss_jt.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]
START = "from moss_jt.cli.convert import main; main()"


def run(*args: object, lang: str = "en") -> subprocess.CompletedProcess[str]:
    """Run moss-convert in a process of its own."""
    words = [sys.executable, "-c", START, *map(str, args), "--lang", lang]
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)


def one_line_error(done: subprocess.CompletedProcess[str]) -> str:
    """The single line of a command that failed as it should."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("moss-convert: ")
    return lines[0]


def test_a_whole_round(golden: Path, tmp_path: Path) -> None:
    source = golden / "tiny-int4" / "g32-actorder"
    there = run("hf2jittor", source, tmp_path / "native")
    assert (there.returncode, there.stdout) == (0, f"{tmp_path / 'native'}\n")
    assert "Weights: 0.43 MB, int4, groups of 32" in there.stderr
    assert "Dropped: 2 causal_mask buffers (0.03 MB), which can be worked out" in there.stderr
    assert "all as written" in run("verify", tmp_path / "native").stdout
    back = run("jittor2hf", tmp_path / "native", tmp_path / "back", "--json")
    assert json.loads(back.stdout) == {
        "path": str(tmp_path / "back"),
        "bytes": (tmp_path / "back" / "model.safetensors").stat().st_size,
        "tensors": 45,
        "resumed_tensors": 0,
        "dequantised_head": None,
    }
    told = run("inspect", tmp_path / "back").stdout
    assert "int4, groups of 32, 8 matrices in act-order" in told
    assert "Tokenizer   none" in told


def test_json_of_a_conversion(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", gptq_tensors(8, -1))
    done = run("hf2jittor", source, "--json", "--delete-source")
    values = json.loads(done.stdout)
    assert values["path"] == str(tmp_path / "hf-jittor")
    assert (values["bits"], values["group_size"], values["dtype"]) == (8, -1, "float16")
    assert values["deleted_source_bytes"] > 0
    assert names_in(source) == ["config.json"]
    seen = json.loads(run("inspect", tmp_path / "hf-jittor", "--json").stdout)
    assert seen["tensors"]["lm_head.weight"] == [96, 64]
    assert (seen["format"], seen["bits"], seen["missing_markers"][0]) == ("native", 8, "<eoh>")


def test_types_and_chinese(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", float_tensors("float32"))
    done = run("hf2jittor", source, tmp_path / "half", "--dtype", "bf16", lang="zh")
    assert done.returncode == 0
    assert "权重：" in done.stderr
    assert "bfloat16" in done.stderr
    assert Checkpoint.open(tmp_path / "half").config.dtype == "bfloat16"
    assert "转换、查看和校验权重文件" in run("--help", lang="zh").stdout


def test_errors_are_one_line(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", gptq_tensors(8, 32), wbits=4, groupsize=32)
    assert "config.json says wbits 4" in one_line_error(run("hf2jittor", source))
    assert "nothing" in one_line_error(run("hf2jittor", tmp_path / "nothing"))
    assert "is not in the native format" in one_line_error(run("verify", source))
    assert names_in(tmp_path) == ["hf"]
    good = write_folder(tmp_path / "good", float_tensors())
    assert run("hf2jittor", good).returncode == 0
    assert "good-jittor exists already" in one_line_error(run("hf2jittor", good))
    shard = tmp_path / "good-jittor" / "model-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert "lm_head.bias is not what was written" in one_line_error(run("verify", tmp_path / "good-jittor"))


def test_synth(tmp_path: Path) -> None:
    done = run("synth", "--preset", "tiny", "--bits", "4", "--layers", "2", tmp_path / "m", "--json")
    assert json.loads(done.stdout)["layers"] == 2
    assert "byte-level BPE" in run("inspect", tmp_path / "m").stdout
    wrong = run("synth", "--preset", "tiny", "--format", "hf", "--resume", tmp_path / "n")
    assert wrong.returncode == 2
    assert "--resume works with --format native only" in wrong.stderr
    assert run("synth", "--preset", "tiny", "--format", "hf", tmp_path / "n").returncode == 0


def test_help_and_group_load_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from moss_jt.cli.convert import command, make_command\n"
        "assert make_command().list_commands(None) == list(command.list_commands(None))\n"
        "heavy = {'numpy', 'jittor', 'tokenizers', 'tqdm', 'cupy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize("name", ["hf2jittor", "jittor2hf", "inspect", "verify", "synth"])
def test_every_help_has_an_example(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0
    assert f"Example: moss-convert {name}" in done.stdout
