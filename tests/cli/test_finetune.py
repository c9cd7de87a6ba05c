"""moss-jt finetune and merge, and what was trained in generate and chat, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moss_jt.converters.byte_tokenizer import tokenizer_files

ROOT = Path(__file__).parents[2]
SHAPE = {
    "model_type": "moss",
    "vocab_size": 272,
    "n_positions": 128,
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 4,
    "rotary_dim": 4,
}


def run(*args: object, lang: str = "en", typed: str = "") -> subprocess.CompletedProcess[str]:
    """Run moss-jt in a process of its own."""
    words = [sys.executable, "-m", "moss_jt.cli", *map(str, args), "--lang", lang]
    return subprocess.run(words, input=typed, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data, a shape and a tokenizer of bytes."""
    (tmp_path / "words").mkdir()
    for name, text in tokenizer_files(256, 128).items():
        (tmp_path / "words" / name).write_text(text, "utf-8")
    (tmp_path / "config.json").write_text(json.dumps(SHAPE), "utf-8")
    turn = {"Human": "<|Human|>: hi<eoh>\n", "MOSS": "<|MOSS|>: hello<eom>\n", "quality": 90}
    record = {"meta_instruction": "", "chat": {"turn_1": turn}}
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps(record)] * 8), "utf-8")
    return tmp_path


def test_train_adapt_merge_and_talk(folder: Path) -> None:
    """The originals' names of options; every folder that comes out is one that the next command takes."""
    new = ["--init", folder / "config.json", "--tokenizer", folder / "words", "--data_dir", folder]
    options = ["--n_epochs", 30, "--train_bsz_per_gpu", 4, "--eval_bsz_per_gpu", 4, "--weight_decay", 0.01]
    options += ["--learning_rate", "2e-2", "--warmup_rates", 0.1, "--max_seq_len", 64, "--save_step", 50, "--seed", 7]
    done = run("finetune", *new, "--output_dir", folder / "out", *options)
    assert (done.returncode, done.stdout) == (0, f"{folder / 'out' / 'model'}\n"), done.stderr
    assert "8 samples, 60 steps" in done.stderr and "loss: " in done.stderr
    said = run(
        "chat", "--model", folder / "out" / "model", "--template", "readme", "--system", "", "--greedy", typed="hi\n"
    )
    assert said.stdout.strip() == "hello", said.stderr

    base = ["--model_name_or_path", folder / "out" / "model", "--data_dir", folder, "--output_dir", folder / "more"]
    adapter = ["--lora_rank", 2, "--lora_targets", "qkv_proj,fc_in", "--memory", "8GiB", "--quality", "--n_epochs", 1]
    told = json.loads(run("finetune", *base, *adapter, "--learning_rate", 1e-2, "--json").stdout)
    assert told["path"] == str(folder / "more" / "adapter") and told["steps"] == 2 and told["loss"] > 0
    with_it = ["--adapter", folder / "more" / "adapter"]
    merged = run("merge", folder / "out" / "model", folder / "more" / "adapter", folder / "merged", "--dtype", "fp32")
    assert merged.stdout == f"{folder / 'merged'}\n", merged.stderr
    ask = ["--ids", "40,41,42,43", "--greedy", "--max-new-tokens", 8, "--json", "--compute", "exact"]
    found = [
        json.loads(run("generate", "--model", *model, *ask).stdout)
        for model in ([folder / "out" / "model", *with_it], [folder / "merged"])
    ]
    assert found[0]["text"] == found[1]["text"]
    said = run("chat", "--model", folder / "out" / "model", *with_it, "--quality", 100, "--system", "", typed="hi\n")
    assert said.returncode == 0, said.stderr


def test_going_on_in_words(folder: Path) -> None:
    options = [
        "--init",
        folder / "config.json",
        "--tokenizer",
        folder / "words",
        "--data_dir",
        folder,
        "--max_steps",
        2,
    ]
    assert run("finetune", *options, "--output_dir", folder / "out").returncode == 0
    again = run("finetune", *options, "--output_dir", folder / "out")
    assert again.returncode == 1
    assert "is the checkpoint of an earlier run. Add --resume to go on" in again.stderr
    assert "8 个样本，2 步" in run("finetune", *options, "--output_dir", folder / "out", "--resume", lang="zh").stderr


def test_going_on_without_a_checkpoint_says_so(folder: Path) -> None:
    options = ["--init", folder / "config.json", "--tokenizer", folder / "words", "--data_dir", folder]
    done = run("finetune", *options, "--max_steps", 2, "--output_dir", folder / "out", "--resume")
    assert done.returncode == 0
    assert f"There is no checkpoint in {folder / 'out'} yet: training begins at the first step." in done.stderr


INTERRUPTED = """
import os, signal, sys
from moss_jt.cli.main import main
from moss_jt.finetune import trainer
step, at = trainer.Trainer.step, int(sys.argv.pop(1))
def interrupted(self):
    if self.done == at:
        os.kill(os.getpid(), signal.SIGINT)
    return step(self)
trainer.Trainer.step = interrupted
main()
"""


@pytest.mark.parametrize(
    ("at", "said"),
    [
        (
            0,
            "Stopped before the first checkpoint: the same command begins anew. --save_step says how often one is kept.",
        ),
        (3, "Stopped; the same command with --resume goes on from the last checkpoint, step-00000003."),
    ],
)
def test_what_is_said_of_an_interrupted_run(folder: Path, at: int, said: str) -> None:
    """It promised a checkpoint where there was none."""
    options = ["--init", folder / "config.json", "--tokenizer", folder / "words", "--data_dir", folder]
    options += ["--output_dir", folder / "out", "--save_step", 2, "--lang", "en"]
    words = [sys.executable, "-c", INTERRUPTED, at, "finetune", *options]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert done.returncode == 130, done.stderr
    assert said in done.stderr.splitlines()


def test_options_that_do_not_go_together(folder: Path) -> None:
    base = ["--data_dir", folder, "--output_dir", folder / "out"]
    done = run("finetune", *base, "--init", folder / "config.json", "--lora_alpha", 3)
    assert done.returncode == 2 and "--lora_alpha is for --lora_rank." in done.stderr
    model = ["--model", folder, "--lora_rank", 2, "--unfreeze_every"]
    done = run("finetune", *base, *model, 10)
    assert done.returncode == 2 and "with --lora_rank there is nothing else to train" in " ".join(done.stderr.split())
    assert run("finetune", *base, *model, 0).returncode == 1, "0 trains everything from the start"
