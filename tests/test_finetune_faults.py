"""Fine-tuning where something lies in the way, a run is stopped, or the disk is full: what was there stays, and words say why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt.adapter import Adapter, AdapterShape, save_adapter
from moss_jt.checkpoint import Checkpoint
from moss_jt.config import MossConfig
from moss_jt.converters.byte_tokenizer import tokenizer_files
from moss_jt.converters.hf2jittor import hf2jittor
from moss_jt.converters.quantize import quantize
from moss_jt.errors import ConfigError
from moss_jt.finetune import export, log, run
from moss_jt.finetune.export import Export, check_destination, export_model
from moss_jt.finetune.merge import merge_adapter
from moss_jt.finetune.run import Request, finetune
from moss_jt.finetune.settings import DataSettings, TrainSettings
from moss_jt.finetune.start import from_nothing

SHAPE = {
    "model_type": "moss",
    "vocab_size": 272,
    "n_positions": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "rotary_dim": 8,
}


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A tokenizer of bytes."""
    (tmp_path / "words").mkdir()
    for name, text in tokenizer_files(256, 128).items():
        (tmp_path / "words" / name).write_text(text, "utf-8")
    return tmp_path / "words"


@pytest.fixture
def base(golden: Path, tmp_path: Path) -> Path:
    """A model's native folder."""
    folder = tmp_path / "base"
    hf2jittor(golden / "tiny-fp/safetensors-fp16", folder)
    for name, text in tokenizer_files(256, 256).items():
        (folder / name).write_text(text, "utf-8")
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter of the model."""
    config, shape = Checkpoint.open(base).config, AdapterShape(rank=2, alpha=4.0)
    terms = {name: np.ones(size, np.float32) for name, size in shape.shapes(config).items()}
    save_adapter(tmp_path / "adapter", Adapter(shape, terms), config)
    return tmp_path / "adapter"


@pytest.fixture
def new_model(words: Path) -> Callable[[Path, int], Path]:
    """Writes a model of random weights as a training run does."""

    def write(folder: Path, seed: int) -> Path:
        config = MossConfig.from_dict(SHAPE)
        values = from_nothing(config, seed=seed).parameters.array
        return export_model(folder, Export(config, values, words, "float32", "fields", "new"))

    return write


@pytest.fixture
def asked(words: Path, tmp_path: Path, jittor: Any) -> Request:
    """A run of four steps with a checkpoint every second."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE), "utf-8")
    turn = {"Human": "<|Human|>: hi<eoh>\n", "MOSS": "<|MOSS|>: hello<eom>\n"}
    (tmp_path / "data").mkdir()
    record = json.dumps({"meta_instruction": "", "chat": {"turn_1": turn}})
    (tmp_path / "data" / "train.jsonl").write_text("\n".join([record] * 8), "utf-8")
    return Request(
        data_dir=tmp_path / "data",
        output_dir=tmp_path / "out",
        init=tmp_path / "config.json",
        tokenizer=words,
        data=DataSettings(max_length=64),
        train=TrainSettings(batch_size=4, learning_rate=1e-2, save_step=2),
        dtype="float32",
        tensorboard=False,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_merging_replaces_nothing(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that lay at DST, the base itself even, was renamed away and deleted."""
    before = contents(tmp_path)
    monkeypatch.chdir(base)
    for dst in (base, adapter, Path(), base / "config.json"):
        with pytest.raises(ConfigError, match=r"exists already\. Choose another name or delete it"):
            merge_adapter(base, adapter, dst)
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    merge_adapter(base, adapter, tmp_path / "empty")
    assert Checkpoint.open(tmp_path / "empty").config.name == "empty"


def test_a_file_in_the_place_of_a_model_stays(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("notes", "utf-8")
    with pytest.raises(ConfigError, match="model holds something else than a model"):
        check_destination(tmp_path / "model")


def test_a_model_stays_where_its_successor_does_not_come(
    new_model: Callable[[Path, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two renames an interrupt left nothing but a hidden folder, which was then deleted."""
    folder = new_model(tmp_path / "model", 1)
    before, rename = contents(folder), Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name == "made":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", interrupted)
        new_model(folder, 2)
    assert contents(folder) == before
    assert not list(tmp_path.glob(".model.*"))
    assert contents(new_model(folder, 2)) != before, "a run's own model is replaced by its next one"


def test_a_run_that_is_refused_leaves_everything(asked: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """It emptied the log of the run before."""
    finetune(asked)
    before = contents(asked.output_dir)
    assert len(before["log/log.jsonl"].splitlines()) == 4
    other = replace(asked, train=replace(asked.train, learning_rate=1e-3), resume=True)
    with pytest.raises(ConfigError, match="was made with learning_rate"):
        finetune(other)
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="--tensorboard needs the package"):
        patched.setattr(log, "find_spec", lambda _: None)
        finetune(replace(asked, resume=True, tensorboard=True))
    monkeypatch.setattr(run, "load_tokenizer", None)  # nothing is read before the refusal
    with pytest.raises(ConfigError, match="is the checkpoint of an earlier run"):
        finetune(asked)
    assert contents(asked.output_dir) == before


def test_another_adapter_or_model_does_not_go_on(asked: Request, base: Path, tmp_path: Path) -> None:
    """Another alpha, fewer targets, another base: the run went on, with terms left out or over other weights."""
    shape = AdapterShape(rank=2, alpha=4.0)
    first = replace(asked, init=None, tokenizer=None, model=base, adapter=shape)
    finetune(first)
    assert finetune(replace(first, resume=True)).steps == 4
    for change, words in (
        ({"rank": 1}, r"lora_rank 2; now it is 1\."),
        ({"alpha": 8.0}, r"lora_alpha 4\.0; now it is 8\.0\."),
        ({"targets": ("fc_in", "qkv_proj")}, r"lora_targets \['fc_in', .*; now it is \['fc_in', 'qkv_proj'\]\."),
    ):
        with pytest.raises(ConfigError, match=f"step-00000004 was made with {words} Resume with the same"):
            finetune(replace(first, adapter=replace(shape, **change), resume=True))
    other = tmp_path / "other"
    quantize(base, other, bits=8, group_size=32)
    (tmp_path / "no-manifest").mkdir()
    for file in base.iterdir():
        if file.name != "manifest.json":
            (tmp_path / "no-manifest" / file.name).write_bytes(file.read_bytes())
    for model in (other, tmp_path / "no-manifest"):
        with pytest.raises(ConfigError, match=r"was made with model '\w{16}'; now it is '\w{16}'\."):
            finetune(replace(first, model=model, resume=True))


def test_another_shape_of_the_same_sizes_does_not_go_on(asked: Request) -> None:
    finetune(asked)
    assert asked.init is not None
    asked.init.write_text(json.dumps({**SHAPE, "rotary_dim": 4}), "utf-8")
    with pytest.raises(ConfigError, match="was made with model"):
        finetune(replace(asked, resume=True))
