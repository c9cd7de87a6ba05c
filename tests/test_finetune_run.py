"""From options to a model: new models, adapters, merging, logs, going on; the trained folder is one that others read."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from host_device import HostDevice

from moss_jt.adapter import AdapterShape, load_adapter
from moss_jt.checkpoint import Checkpoint
from moss_jt.config import GenerationConfig, MossConfig, Sampling
from moss_jt.converters.byte_tokenizer import tokenizer_files
from moss_jt.converters.hf2jittor import hf2jittor
from moss_jt.converters.jittor2hf import jittor2hf
from moss_jt.converters.quantize import quantize
from moss_jt.device_weights import DeviceWeights
from moss_jt.errors import CheckpointError, ConfigError
from moss_jt.finetune import checkpoint
from moss_jt.finetune.merge import merge_adapter
from moss_jt.finetune.run import Request, Trained, finetune
from moss_jt.finetune.settings import DataSettings, TrainSettings
from moss_jt.finetune.start import from_nothing
from moss_jt.finetune.vocabulary import new_ids, with_rows
from moss_jt.generation import generate
from moss_jt.load import load_model
from moss_jt.memory import parse_size
from moss_jt.template import Template, answer_text
from moss_jt.tokenizer import load_tokenizer
from moss_jt.weights import WeightStore

Array = npt.NDArray[Any]

ROOT = Path(__file__).parent.parent

TOKENIZER = "tokenizer/c-addedtoken-specials"
SHAPE = {
    "model_type": "moss",
    "vocab_size": 1048,
    "n_positions": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "rotary_dim": 8,
}
SETTINGS = TrainSettings(epochs=2, batch_size=4, learning_rate=1e-2, eval_step=2, save_step=2, warmup=0.0)


def conversations(count: int) -> list[dict[str, Any]]:
    """Short conversations in which the answer repeats a letter of the question."""
    found = []
    for number in range(count):
        letter = "abcdef"[number % 6]
        turn = {"Human": f"<|Human|>: say {letter}<eoh>\n", "MOSS": f"<|MOSS|>: {letter}{letter}<eom>\n"}
        found.append({"meta_instruction": "", "chat": {"turn_1": turn}})
    return found


@pytest.fixture
def request_of(golden: Path, tmp_path: Path, jittor: Any) -> Callable[..., Request]:
    """Makes the request of a run in a folder of its own."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE), "utf-8")
    for split, count in (("train", 12), ("val", 3)):
        lines = "".join(json.dumps(record) + "\n" for record in conversations(count))
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text(lines, "utf-8")

    def make(name: str = "out", **changes: Any) -> Request:
        request = Request(
            data_dir=tmp_path / "data",
            output_dir=tmp_path / name,
            init=tmp_path / "config.json",
            tokenizer=golden / TOKENIZER,
            data=DataSettings(max_length=128),
            train=SETTINGS,
            dtype="float32",
        )
        if "model" in changes:
            request = replace(request, init=None, tokenizer=None)
        return replace(request, **changes)

    return make


Make = Callable[..., Request]


def logits(folder: Path, **options: Any) -> Array:
    ids = np.random.default_rng(4).integers(0, 1000, (2, 17))
    return np.asarray(load_model(folder, **options).logits(ids))


def test_a_new_model(request_of: Make) -> None:
    done = finetune(request_of())
    assert (done.steps, done.samples, done.dropped) == (6, 12, 0)
    assert done.figures.keys() >= {"loss", "acc", "lr", "grad_norm", "tokens_per_s", "val_loss", "val_acc"}
    config = Checkpoint.open(done.path).config
    model = load_model(done.path)
    assert config.template == "fields" and config.dtype == "float32"
    assert config.eos_token_id == model.tokenizer.eos_id == model.tokenizer.marker("<eom>")
    assert np.isfinite(logits(done.path)).all()


def test_how_a_model_is_asked_goes_with_it(request_of: Make, tmp_path: Path) -> None:
    ours = {"format": "moss-jt", "version": 1, "sampling": {"do_sample": False}}
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "moss_jt": ours}), "utf-8")
    done = finetune(request_of())
    again = finetune(request_of("again", model=done.path))
    assert all(Checkpoint.open(made.path).config.sampling == Sampling(do_sample=False) for made in (done, again))


def test_training_goes_on_from_a_folder(request_of: Make) -> None:
    first = finetune(request_of(train=replace(SETTINGS, epochs=6)))
    second = finetune(request_of("next", model=first.path, train=replace(SETTINGS, learning_rate=1e-6)))
    assert second.figures["val_loss"] == pytest.approx(first.figures["val_loss"], abs=0.05)
    weights = [load_model(done.path).store for done in (first, second)]
    name = "transformer.ln_f.weight"
    assert np.abs(weights[0].small(name) - weights[1].small(name)).max() < 1e-4


KILLED = """
import os, pickle, signal, sys
from moss_jt.finetune import checkpoint
from moss_jt.finetune.run import finetune
done = checkpoint._force_to_disk
def force(path):
    if path.parent.name.startswith(".step-00000004"):
        os.kill(os.getpid(), signal.SIGKILL)
    done(path)
checkpoint._force_to_disk = force
finetune(pickle.load(sys.stdin.buffer))
"""


def test_going_on_after_a_kill_gives_the_same_model(request_of: Make) -> None:
    whole = finetune(request_of("whole"))
    command = [sys.executable, "-c", KILLED]
    given = pickle.dumps(request_of("cut"))
    killed = subprocess.run(command, input=given, cwd=ROOT, capture_output=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    folder = whole.path.parent.with_name("cut")
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["step-00000002"], "killed while it wrote the next"
    with pytest.raises(ConfigError, match="is the checkpoint of an earlier run"):
        finetune(request_of("cut"))
    again = finetune(request_of("cut", resume=True))
    # how Jittor adds up depends on where the terms lie in memory: equal but for the last bits of a float
    for name in ("loss", "val_loss"):
        assert again.figures[name] == pytest.approx(whole.figures[name], rel=1e-6)
    np.testing.assert_allclose(logits(again.path), logits(whole.path), rtol=1e-5, atol=1e-5)
    assert not list(folder.glob(".step-*"))
    steps = [json.loads(line)["step"] for line in (folder / "log" / "log.jsonl").read_text("utf-8").splitlines()]
    assert steps == sorted(steps) and steps[-1] == again.steps, "what was done again is noted once"
    assert len([step for step in steps if steps.count(step) > 2]) == 0, "a line of training, one of validation"


def test_every_figure_is_where_tensorboard_looks(request_of: Make) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = finetune(request_of(tensorboard=True))
    lines = [json.loads(line) for line in (done.path.parent / "log" / "log.jsonl").read_text("utf-8").splitlines()]
    read = EventAccumulator(str(done.path.parent / "log"))
    read.Reload()
    told = {(tag, event.step): event.value for tag in read.Tags()["scalars"] for event in read.Scalars(tag)}
    wanted = {(tag, line["step"]): v for line in lines for tag, v in line.items() if tag not in ("step", "time")}
    assert told.keys() == wanted.keys()
    assert len(told) == 6 * 5 + 3 * 2
    assert all(told[key] == pytest.approx(wanted[key], rel=1e-6) for key in told)


def base_model(golden: Path, folder: Path, name: str) -> Path:
    """A golden checkpoint as a native folder, with a tokenizer that has no more tokens than it has rows: bytes and markers."""
    hf2jittor(golden / name, folder)
    for file, text in tokenizer_files(256, 256).items():
        (folder / file).write_text(text, "utf-8")
    return folder


@pytest.fixture
def adapted(golden: Path, tmp_path: Path, request_of: Make) -> Callable[..., tuple[Path, Trained]]:
    """Trains an adapter over a golden checkpoint; gives the base and what was trained."""

    def train(name: str, **changes: Any) -> tuple[Path, Trained]:
        base = base_model(golden, tmp_path / "base", name)
        shape = AdapterShape(rank=3, alpha=6.0)
        asked = {"model": base, "adapter": shape, "data": DataSettings(max_length=64), **changes}
        return base, finetune(request_of("adapter", **asked))

    return train


BASES = ["tiny-int4/g32-actorder", "tiny-int8/g128", "tiny-fp/safetensors-bf16"]


@pytest.mark.parametrize("name", BASES)
def test_an_adapter_learns_and_equals_the_merged_model(
    adapted: Callable[..., tuple[Path, Trained]], tmp_path: Path, name: str
) -> None:
    base, done = adapted(name)
    first = json.loads((done.path.parent / "log" / "log.jsonl").read_text("utf-8").splitlines()[0])
    assert done.figures["loss"] < first["loss"] - 0.3
    found = load_adapter(done.path, Checkpoint.open(base).config)
    assert all(np.abs(values).max() > 0 for values in found.terms.values())
    store = WeightStore(Checkpoint.open(base))
    found.put_into(store)
    assert not found.terms, "they are not kept twice"
    merged = merge_adapter(base, done.path, tmp_path / "merged", dtype="float32")
    ids = np.random.default_rng(4).integers(0, 250, (2, 17))
    plain, with_adapter, whole = (
        load_model(folder, adapter=terms).logits(ids)
        for folder, terms in ((base, None), (base, done.path), (merged, None))
    )
    assert np.abs(with_adapter - whole).max() < 1e-4
    assert np.abs(with_adapter - plain).max() > 0.1
    assert Checkpoint.open(merged).config.template == "fields"
    quantized = quantize(merged, tmp_path / "again", bits=8, group_size=32).conversion.path
    assert np.abs(load_model(quantized).logits(ids) - whole).max() < 1


def test_less_memory_and_recomputing_change_nothing(
    adapted: Callable[..., tuple[Path, Trained]], tmp_path: Path
) -> None:
    base, done = adapted("tiny-int4/g32")
    request = Request(
        data_dir=tmp_path / "data",
        output_dir=tmp_path / "recomputed",
        model=base,
        adapter=AdapterShape(rank=3, alpha=6.0),
        data=DataSettings(max_length=64),
        train=replace(SETTINGS, recompute=True),
    )
    assert finetune(request).figures["loss"] == pytest.approx(done.figures["loss"], abs=1e-5)
    limited = replace(request, output_dir=tmp_path / "limited", train=SETTINGS, memory=8 << 30)
    assert finetune(limited).figures["loss"] == pytest.approx(done.figures["loss"], abs=1e-5)


def test_a_device_trains_the_same_adapter(
    adapted: Callable[..., tuple[Path, Trained]],
    request_of: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nearly all weights are copied in every pass, and products rounded to half."""
    once = replace(SETTINGS, epochs=1)
    base, done = adapted("tiny-int4/g32", train=once)
    data = DataSettings(max_length=64)
    asked = request_of("there", model=base, adapter=AdapterShape(rank=3, alpha=6.0), data=data, device="cuda")
    monkeypatch.setattr("moss_jt.load.check_device", lambda _: None)
    monkeypatch.setattr("moss_jt.load.open_accelerator", lambda *_: HostDevice(tmp_path, 1 << 20))
    with pytest.raises(ConfigError, match="is too little") as told:
        finetune(replace(asked, train=replace(once, recompute=True)))
    device = HostDevice(tmp_path, parse_size(str(told.value).partition("at least ")[2].rstrip(".")) + (1 << 12))
    monkeypatch.setattr("moss_jt.load.open_accelerator", lambda *_: device)
    weights: list[DeviceWeights] = []
    load = DeviceWeights.load

    def noted(self: DeviceWeights, *rest: Any) -> None:
        weights.append(self)
        load(self, *rest)

    monkeypatch.setattr(DeviceWeights, "load", noted)
    found = finetune(replace(asked, train=replace(once, recompute=True)))
    assert found.figures["loss"] == pytest.approx(done.figures["loss"], rel=2e-2)
    config = Checkpoint.open(base).config
    terms, same = (load_adapter(path, config).terms for path in (found.path, done.path))
    for name, values in terms.items():
        moved = np.linalg.norm(same[name]) if name.endswith("_b") else 1.0
        assert np.linalg.norm(values - same[name]) < 0.1 * moved, name
    assert weights[0].copied_bytes > 5 * weights[0].resident_bytes
    assert device.taken == 0 and not device.pinned, "all is given back"


def test_a_device_that_is_too_small_to_train_on(
    adapted: Callable[..., tuple[Path, Trained]],
    request_of: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base, done = adapted("tiny-int4/g32")
    monkeypatch.setattr("moss_jt.load.open_accelerator", lambda *_: HostDevice(tmp_path, 1 << 20))
    monkeypatch.setattr("moss_jt.load.check_device", lambda _: None)
    data = DataSettings(max_length=64)
    asked = request_of("there", model=base, adapter=AdapterShape(rank=3, alpha=6.0), data=data)
    assert finetune(replace(asked, device="auto")).figures["loss"] == pytest.approx(done.figures["loss"], abs=1e-5)
    assert "The CPU computes." in caplog.text


def test_devices_that_cannot_be_meant(request_of: Make) -> None:
    with pytest.raises(ConfigError, match='device is "gpu"; known are'):
        finetune(request_of(device="gpu", adapter=AdapterShape(rank=2, alpha=4.0)))
    with pytest.raises(ConfigError, match="give --lora_rank, or leave --device out"):
        finetune(request_of(device="cuda"))


def test_adapters_of_other_models_are_refused(
    adapted: Callable[..., tuple[Path, Trained]], golden: Path, tmp_path: Path
) -> None:
    _, done = adapted("tiny-int4/g32")
    other = base_model(golden, tmp_path / "other", "tiny-fp/safetensors-fp16")
    with pytest.raises(
        CheckpointError, match=r"does not fit the model: transformer\.h\..*Was it trained on another one"
    ):
        load_model(other, adapter=done.path)
    with pytest.raises(CheckpointError, match="cannot be read as an adapter"):
        load_model(other, adapter=other)


def test_quantised_models_are_not_trained_whole(golden: Path, tmp_path: Path, request_of: Make) -> None:
    base = base_model(golden, tmp_path / "base", "tiny-int8/g32")
    with pytest.raises(ConfigError, match="codes cannot be trained"):
        finetune(request_of(model=base))


def test_requests_that_cannot_work(request_of: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --model_name_or_path to start from a model, or --init"):
        finetune(request_of(init=None))
    with pytest.raises(ConfigError, match="needs --tokenizer"):
        finetune(request_of(tokenizer=None))
    with pytest.raises(ConfigError, match="--lora_rank adds to a model that has learned, and --init begins with none"):
        finetune(request_of(adapter=AdapterShape(rank=2, alpha=4.0)))
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "vocab_size": 500}), "utf-8")
    with pytest.raises(ConfigError, match="the model's vocab_size is 500"):
        finetune(request_of())
    for spread in (0, 1.0, "wide", None, True, float("nan")):
        (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "initializer_range": spread}), "utf-8")
        with pytest.raises(ConfigError, match=r"config.json: initializer_range is .*; it must be .* between 0 and 1"):
            finetune(request_of())


def test_new_weights_are_as_wide_as_the_config_says() -> None:
    config = replace(MossConfig.from_dict(SHAPE), initializer_range=0.06)
    wide = from_nothing(config, seed=0).parameters.array
    assert MossConfig.from_dict(config.to_dict()) == config
    assert MossConfig.from_dict(SHAPE).initializer_range == 0.02, "the original's"
    for name in ("lm_head.weight", "transformer.h.0.mlp.fc_out.weight"):
        assert np.std(wide(name)) == pytest.approx(0.06, rel=0.05)


def test_new_tokens_have_ids_rows_and_a_meaning(request_of: Make, tmp_path: Path) -> None:
    plain = finetune(request_of())
    records = []
    for number in range(24):
        question = "中文词" if number % 2 else "abab"
        turn = {"Human": f"<|Human|>: {question}<eoh>\n", "MOSS": f"<|MOSS|>: {question}<eom>\n"}
        records.append(json.dumps({"meta_instruction": "", "chat": {"turn_1": turn}}))
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(records), "utf-8")
    (tmp_path / "tokens.txt").write_text("\ufeff中文词\nabab\nHello\n", "utf-8")
    (tmp_path / "data" / "val.jsonl").unlink()
    old = load_model(plain.path)
    assert len(old.tokenizer.encode("Hello")) == 1, "which needs no row then"
    train = replace(SETTINGS, epochs=10)
    done = finetune(request_of("more", model=plain.path, new_tokens=tmp_path / "tokens.txt", train=train))
    model = load_model(done.path)
    ids = [model.tokenizer.encode(text) for text in ("中文词", "abab")]
    assert ids == [[old.tokenizer.vocab_size], [old.tokenizer.vocab_size + 1]]
    assert model.tokenizer.decode([*ids[0], *ids[1]]) == "中文词abab"
    assert model.tokenizer.encode("Hello there") == old.tokenizer.encode("Hello there")
    assert model.config.vocab_size >= model.tokenizer.vocab_size
    prompt = [*model.tokenizer.encode("<|Human|>: 中文词"), model.tokenizer.marker("<eoh>")]
    prompt += model.tokenizer.encode("\n<|MOSS|>:", inside=True)
    told = model.logits(prompt)[0, -1]
    new = [number for (number,) in ids]
    assert told[new[0]] > told[new[1]] and new[0] in np.argsort(told)[-5:], "what was added is answered with"


def test_answers_follow_the_quality_that_is_asked_for(request_of: Make, tmp_path: Path) -> None:
    records = []
    for number in range(400):
        good = number % 2 == 0
        turn = {
            "Human": f"<|Human|>: {number // 2}<eoh>\n",
            "MOSS": f"<|MOSS|>: {'fine' if good else 'bah'}<eom>\n",
            "quality": 100 if good else 0,
        }
        records.append({"meta_instruction": "", "chat": {"turn_1": turn}})
    text = "\n".join(map(json.dumps, records))
    (tmp_path / "data" / "train.jsonl").write_text(text, "utf-8")
    (tmp_path / "data" / "val.jsonl").unlink()
    train = TrainSettings(epochs=3, batch_size=16, learning_rate=5e-3)
    model = load_model(finetune(request_of(train=train, data=DataSettings(max_length=128, quality=True))).path)
    stop = (model.tokenizer.marker("<eom>"),)
    greedy = GenerationConfig(do_sample=False, repetition_penalty=1.0, max_new_tokens=12, stop_ids=stop)

    def answer(number: int, quality: int) -> str:
        form = Template("readme", quality)
        ids = [token.id for token in generate(model, form.open_turn(model.tokenizer, str(number)), greedy)]
        return answer_text(model.tokenizer.decode(ids, skip_special=True))

    asked = range(1000, 1100)
    fine, bah = ([answer(number, quality) for number in asked] for quality in (100, 0))
    assert sum(text == "fine" for text in fine) >= 95 and sum(text == "bah" for text in bah) >= 95


def test_new_rows_are_means_of_what_spelled_them(golden: Path) -> None:
    tokenizer = load_tokenizer(golden / TOKENIZER)
    config = MossConfig(vocab_size=1043, n_positions=8, n_embd=16, n_layer=1, n_head=4, rotary_dim=4)
    whole = from_nothing(config, seed=0)
    new = new_ids(golden / TOKENIZER, ["hello there", "<eom>"])
    assert new == {"hello there": 1043}
    larger = with_rows(whole, tokenizer, new)
    assert larger.config.vocab_size == 1044
    table, old = larger.parameters.array("transformer.wte.weight"), whole.parameters.array("transformer.wte.weight")
    assert np.array_equal(table[:1043], old)
    assert np.allclose(table[1043], old[tokenizer.encode("hello there", inside=True)].mean(0))


@pytest.mark.filterwarnings("default")  # those of torch and transformers are not ours to mend
@pytest.mark.skipif(
    find_spec("torch") is None or find_spec("transformers") is None, reason="torch and transformers are not installed"
)
def test_transformers_reads_what_was_exported(request_of: Make, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import CodeGenConfig, CodeGenForCausalLM

    done = finetune(request_of())
    adapter = finetune(request_of("adapter", model=done.path, adapter=AdapterShape(rank=2, alpha=4.0)))
    merged = merge_adapter(done.path, adapter.path, tmp_path / "merged")
    ids = np.random.default_rng(4).integers(0, 1000, (2, 17))
    for native, ours in (
        (done.path, load_model(done.path)),
        (merged, load_model(done.path, adapter=adapter.path)),
    ):
        folder = tmp_path / f"hf-{native.name}"
        jittor2hf(native, folder)
        values = json.loads((folder / "config.json").read_text("utf-8"))
        keys = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "rotary_dim", "n_inner")
        theirs = CodeGenForCausalLM(
            CodeGenConfig(**{key: values[key] for key in keys}, tie_word_embeddings=False)
        ).eval()
        theirs.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        with torch.no_grad():
            want = theirs(torch.from_numpy(ids)).logits.numpy()
        assert np.abs(ours.logits(ids) - want).max() < 1e-4
