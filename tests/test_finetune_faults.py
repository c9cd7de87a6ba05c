"""Fine-tuning where something lies in the way, a run is stopped, or the disk is full: what was there stays, and words say why."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pytest

from moss_jt.adapter import Adapter, AdapterShape, save_adapter
from moss_jt.checkpoint import Checkpoint
from moss_jt.config import MossConfig
from moss_jt.converters.byte_tokenizer import tokenizer_files
from moss_jt.converters.hf2jittor import hf2jittor
from moss_jt.converters.quantize import quantize
from moss_jt.errors import ConfigError, DiskError
from moss_jt.finetune import checkpoint, export, log, run
from moss_jt.finetune.data import load_samples
from moss_jt.finetune.export import Export, check_destination, export_model
from moss_jt.finetune.log import RunLog
from moss_jt.finetune.lora import Adapted
from moss_jt.finetune.merge import merge_adapter
from moss_jt.finetune.parameters import Parameters
from moss_jt.finetune.run import Request, finetune
from moss_jt.finetune.settings import DataSettings, TrainSettings
from moss_jt.finetune.start import from_nothing
from moss_jt.finetune.trainer import Alone
from moss_jt.finetune.vocabulary import extend_tokenizer, new_ids
from moss_jt.progress import Quiet
from moss_jt.tokenizer import load_tokenizer
from moss_jt.weights import WeightStore

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


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Let every file end at so many bytes; the system says "File too large" then, as it says that a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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


def parameters_of(values: float) -> Parameters:
    """A tensor of a megabyte."""
    parameters = Parameters({"a": (512, 512), "b": (3,)})
    parameters.values[:] = values
    return parameters


def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The safetensors package's error is no OSError: it was a traceback, and left a hidden folder."""
    folder = tmp_path / "out"
    checkpoint.save(folder, parameters_of(1), checkpoint.State(1, {}), keep=2)
    before = contents(folder)
    words = (
        "step-00000002 cannot be written: .* Make room on its disk. Earlier checkpoints are kept, and --resume goes on"
    )
    with full_disk(1 << 18), pytest.raises(DiskError, match=words):
        checkpoint.save(folder, parameters_of(2), checkpoint.State(2, {}), keep=2)
    assert contents(folder) == before and len(list(folder.iterdir())) == 1

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_force_to_disk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder, parameters_of(2), checkpoint.State(2, {}), keep=2)
    assert len(list(folder.iterdir())) == 1


def test_a_full_disk_while_a_model_is_written(new_model: Callable[[Path, int], Path], tmp_path: Path) -> None:
    folder = new_model(tmp_path / "model", 1)
    before = contents(folder)
    for limit in (1 << 12, 1 << 17):  # the foreign form, and the native form of all its layers
        with (
            full_disk(limit),
            pytest.raises(DiskError, match=r"/model cannot be written: .*\. Make room on its disk\.$"),
        ):
            new_model(folder, 2)
    assert contents(folder) == before and not list(tmp_path.glob(".model*"))


def test_a_disk_without_room_for_a_model(
    new_model: Callable[[Path, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was found out when all its floats had been written; the words named a hidden folder that was gone by then."""
    values = list(os.statvfs(tmp_path))
    values[4] = 1  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(values))
    with monkeypatch.context() as patched:
        patched.setattr(export, "_write_foreign", lambda *_: pytest.fail("written before the room was looked at"))
        with pytest.raises(DiskError, match=rf"^{tmp_path}/model needs 0\.02 GB on its disk .*; 0\.00 GB are free\. "):
            new_model(tmp_path / "model", 1)
    monkeypatch.setattr(export, "_check_room", lambda *_: None)  # room that another program takes meanwhile
    with pytest.raises(DiskError, match=f"^{tmp_path}/model needs .* more; .* are free on its disk. Free "):
        new_model(tmp_path / "model", 1)


def test_a_full_disk_while_an_adapter_is_written(base: Path, adapter: Path, words: Path) -> None:
    before, opened = contents(adapter), Checkpoint.open(base)
    shape = AdapterShape(rank=200, alpha=4.0)
    trained = Adapted(opened.config, shape, Parameters(shape.shapes(opened.config)), WeightStore(opened))
    with full_disk(1 << 16), pytest.raises(DiskError, match=r"/adapter cannot be written: .* Make room on its disk"):
        trained.write(adapter, tokenizer=words, dtype="float32", name="", progress=Quiet())
    assert contents(adapter) == before


def test_what_a_killed_run_left_of_an_adapter_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter.safetensors.new").write_bytes(b"half")
    check_destination(tmp_path / "adapter")


def test_a_run_says_that_its_checkpoints_are_kept(asked: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, made: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export, "_replace", full)
        words = "out/model cannot be written: No space .* The checkpoints are kept: the same command with --resume writes it"
        with pytest.raises(DiskError, match=words):
            finetune(asked)
    assert finetune(replace(asked, resume=True)).path.is_dir()


def test_a_full_disk_while_a_log_is_written(tmp_path: Path) -> None:
    """It was said of standard output, for the system named no file."""
    lines = RunLog(tmp_path, tensorboard=False)
    lines.write(1, {"loss": 2.0})
    with (
        full_disk(80),
        pytest.raises(DiskError, match=r"log\.jsonl cannot be written: .* Make room .* --resume goes on"),
    ):
        lines.write(2, {"loss": 1.0})
    lines.close()
    RunLog(tmp_path, begun=1, tensorboard=False).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()] == [1]
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(DiskError, match=r"file/log\.jsonl cannot be written: .* Something else lies in its place"):
        RunLog(tmp_path / "file", tensorboard=False)


def test_the_log_of_another_run_in_the_same_folder_is_put_aside(tmp_path: Path) -> None:
    """It was emptied where two runs had the same --log_dir."""
    for number in range(3):
        lines = RunLog(tmp_path, tensorboard=False)
        lines.write(1, {"loss": float(number)})
        lines.close()
    names = ("log-1.jsonl", "log-2.jsonl", "log.jsonl")
    assert [json.loads((tmp_path / name).read_text("utf-8"))["loss"] for name in names] == [0, 1, 2]


def test_a_log_that_a_disk_has_spoilt(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n\0\0\xff\n[]\n{"step": 2}\n')
    RunLog(tmp_path, begun=2, tensorboard=False).close()
    assert (tmp_path / "log.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_full_disk_while_data_is_kept(asked: Request, words: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with full_disk(64), pytest.raises(DiskError, match=r"cache/train-\w+\.npz cannot be written: .* Make room"):
        load_samples(asked.data_dir, "train", words, asked.data, cache_dir=cache)
    assert not list(cache.iterdir())
    (asked.data_dir / "val.jsonl").symlink_to("/proc/self/mem")  # opens, and gives EIO
    with pytest.raises(DiskError, match=r"val\.jsonl cannot be read: .* Check the disk"):
        load_samples(asked.data_dir, "val", words, asked.data, cache_dir=cache)


def test_a_full_disk_while_a_tokenizer_is_written(words: Path, tmp_path: Path) -> None:
    with full_disk(64), pytest.raises(DiskError, match=r"larger cannot be written: .* Make room"):
        extend_tokenizer(words, {"hello": 384}, tmp_path / "larger")


def test_files_are_for_whom_the_user_says(adapter: Path, tmp_path: Path) -> None:
    """The safetensors package leaves its files to their owner alone."""
    path = checkpoint.save(tmp_path / "out", parameters_of(1), checkpoint.State(1, {}), keep=1)
    plain = tmp_path / "plain"
    plain.write_text("", "utf-8")
    files = [*path.iterdir(), *adapter.iterdir()]
    assert len(files) == 5
    assert {file.stat().st_mode for file in files} == {plain.stat().st_mode}


def test_new_tokens_again_into_the_same_folder(asked: Request, words: Path, tmp_path: Path) -> None:
    """The run before had written added_tokens.json: the tokens were taken for old ones, and had no rows."""
    parts = [words / name for name in ("vocab.json", "added_tokens.json")]
    parts[0].write_text(json.dumps({k: v for part in parts for k, v in json.loads(part.read_bytes()).items()}), "utf-8")
    parts[1].unlink()
    count = load_tokenizer(words).vocab_size
    (tmp_path / "tokens.txt").write_text("hello\n", "utf-8")
    given = replace(asked, new_tokens=tmp_path / "tokens.txt")
    finetune(given)
    written = contents(asked.output_dir / "tokenizer")
    assert finetune(replace(given, resume=True)).steps == 4
    assert contents(asked.output_dir / "tokenizer") == written
    for folder in checkpoint.checkpoints(asked.output_dir):
        rmtree(folder)
    (tmp_path / "tokens.txt").write_text("ello\nhi\n", "utf-8")
    finetune(given)
    added = json.loads((asked.output_dir / "tokenizer" / "added_tokens.json").read_text("utf-8"))
    assert added == {"ello": count, "hi": count + 1}


def test_only_the_first_process_writes_the_tokenizer(
    asked: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Second(Alone):
        rank, size = 1, 2

        def add_up(self, values: object) -> None:
            """Until now the first one has written what others read."""
            target.mkdir(parents=True, exist_ok=True)

    def refuse(*_: object) -> None:
        raise AssertionError("others may be reading")

    (tmp_path / "tokens.txt").write_text("hello\n", "utf-8")
    target = asked.output_dir / "tokenizer"
    extend_tokenizer(tmp_path / "words", new_ids(tmp_path / "words", ["hello"]), target)
    monkeypatch.setattr(run, "extend_tokenizer", refuse)
    assert finetune(replace(asked, new_tokens=tmp_path / "tokens.txt"), team=Second()).steps == 2


def test_a_tokenizer_does_not_grow_in_its_own_place(words: Path) -> None:
    before = contents(words)
    with pytest.raises(ConfigError, match="is where the tokenizer with --new_tokens is written"):
        extend_tokenizer(words, {"hello": 384}, words)
    assert contents(words) == before


def test_what_killed_runs_left_is_removed(new_model: Callable[[Path, int], Path], tmp_path: Path) -> None:
    """Each killed export left a hidden folder of the size of the model, for ever."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f".model.{ended.pid}"
    for part in ("source", "made", "old", ".made.partial"):
        (left / part).mkdir(parents=True)
    (left / "old" / "config.json").write_text("{}", "utf-8")
    stays = [
        tmp_path / f".model.{os.getppid()}" / "source",  # another process that runs
        tmp_path / f".model.{ended.pid}0" / "notes",  # not ours
        tmp_path / f".model2.{ended.pid}" / "source",
        tmp_path / ".model.partial" / "out",
    ]
    for folder in stays:
        folder.mkdir(parents=True)
    new_model(tmp_path / "model", 1)
    assert {path for path in tmp_path.iterdir() if path.name.startswith(".")} == {path.parent for path in stays}
    assert all(folder.is_dir() for folder in stays)


def test_a_model_comes_back_from_a_killed_run(new_model: Callable[[Path, int], Path], tmp_path: Path) -> None:
    """Killed between the two renames; then a run that fails, for the disk is full."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    folder = new_model(tmp_path / "model", 1)
    before = contents(folder)
    (tmp_path / f".model.{ended.pid}").mkdir()
    folder.rename(tmp_path / f".model.{ended.pid}" / "old")
    with full_disk(1 << 12), pytest.raises(DiskError):
        new_model(folder, 2)
    assert contents(folder) == before
