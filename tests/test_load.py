"""load_model: from a folder of either kind to a model that computes."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moss_jt
from moss_jt import paths
from moss_jt.batch import single_batch
from moss_jt.errors import CheckpointError, ConfigError, DiskError, ShapeError
from moss_jt.runner import Model

Load = Callable[[str], Model]


def test_a_hugging_face_folder_is_converted_once(
    golden: Path, tmp_path: Path, jittor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "weights"
    shutil.copytree(golden / "tiny-fp" / "bin-2shards", source)
    want = dict(np.load(golden / "tiny-fp" / "expected.npz"))
    with caplog.at_level(logging.WARNING):
        model = moss_jt.load_model(source)
    assert "converting it once to" in caplog.text and "GB" in caplog.text
    assert np.abs(model.logits(want["b0_ids"]) - want["b0_logits"]).max() < 1e-4
    caplog.clear()
    assert moss_jt.load_model(str(source)).path == model.path
    assert not caplog.text
    assert [path.name for path in (paths.models_dir() / "converted").iterdir()] == [model.path.name]
    assert not list(source.glob("*.partial"))


def test_a_cache_that_cannot_be_written_is_told_with_the_variable(golden: Path, own_home: Path) -> None:
    """The advice was to give another folder, and nobody had given one."""
    (own_home / "models").write_text("in the way")
    with pytest.raises(DiskError, match=r"models.* cannot be written: .* MOSS_JT_HOME names another place"):
        moss_jt.load_model(golden / "tiny-fp" / "safetensors-fp16")


def test_a_changed_folder_is_converted_again(golden: Path, tmp_path: Path, jittor: Any) -> None:
    source = tmp_path / "weights"
    shutil.copytree(golden / "tiny-fp" / "safetensors-fp16", source)
    first = moss_jt.load_model(source).path
    shutil.copy(golden / "tiny-fp" / "safetensors-bf16" / "model.safetensors", source)
    assert moss_jt.load_model(source).path != first


def test_a_tokenizer_that_comes_later_is_found(golden: Path, tmp_path: Path, jittor: Any) -> None:
    """The converted copy went on without one, whatever was put beside the weights."""
    source = tmp_path / "weights"
    shutil.copytree(golden / "tiny-fp" / "safetensors-fp16", source)
    first = moss_jt.load_model(source)
    assert not first.has_tokenizer
    for file in (golden / "tokenizer" / "a-plain-added").iterdir():
        shutil.copy(file, source)
    second = moss_jt.load_model(source)
    assert second.path == first.path
    assert second.tokenizer.decode(second.tokenizer.encode("你好")) == "你好"
    assert not (second.path / "expected.json").exists()
    (source / "added_tokens.json").write_text("{}")
    assert moss_jt.load_model(source).path == first.path
    assert (first.path / "added_tokens.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cuda:x"}, 'device is "cuda:x"; known are "auto", "cpu", "cuda" and "cuda:1"'),
        ({"device": "cpu", "vram": "4GiB"}, "vram or host_share was given, and no device is used"),
        ({"device": "cpu", "host_share": 0.5}, "no device is used"),
        ({"host_share": 1.5}, 'host_share is 1.5; it must be from 0 to 1, or "auto"'),
        ({"host_share": "most"}, 'host_share is most; it must be from 0 to 1, or "auto"'),
        ({"device": "cpu", "vram": "much"}, "vram is 'much'; give a size"),
        ({"device": "tpu"}, 'known are "auto", "cpu", "cuda"'),
        ({"compute": "quick"}, "known are exact, fast"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be a whole number from 1"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5; it must be a whole number"),
    ],
)
def test_arguments_are_checked(golden: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        moss_jt.load_model(golden / "tiny-fp" / "safetensors-fp16", **options)


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        moss_jt.load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"xxx cannot be looked at: File name too long\. Check the path"):
        moss_jt.load_model("x" * 300)  # was a bare OSError
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        moss_jt.load_model(tmp_path)


def test_fast_compute_is_near(golden: Path, golden_model: Load) -> None:
    exact = golden_model("tiny-fp/safetensors-fp16")
    fast = moss_jt.load_model(
        exact.path, compute="fast", device="cpu", host_share="auto"
    )  # it has nothing to share with
    ids = np.load(golden / "tiny-fp" / "expected.npz")["b3_ids"]
    difference = np.abs(fast.logits(ids) - exact.logits(ids)).max()
    assert 0 < difference < 2e-2  # keys and values rounded to half; an fp16 run of the original differs by 0.01


def test_logits_at_the_door(golden_model: Load) -> None:
    model = golden_model("tiny-fp/safetensors-fp16")
    long = model.config.n_positions
    assert model.logits([1, 2, 3]).shape == (1, 3, model.config.vocab_size)
    with pytest.raises(ShapeError, match=f"{long + 1} tokens are more than the model's n_positions {long}"):
        model.logits(np.zeros((1, long + 1), int))
    with pytest.raises(ShapeError, match="token id -1 is outside"):
        model.logits([[1, -1]])
    with pytest.raises(ShapeError, match="must be the same"):
        model.logits([[1, 2]], [[1]])
    with pytest.raises(ShapeError, match="whole numbers"):
        model.logits([[0.5]])
    with pytest.raises(ShapeError, match="the rows of ids are not of one length; pad them"):
        model.logits([[1, 2], [3]])
    assert model.logits([]).shape == (1, 0, model.config.vocab_size)
    assert model.logits([[], []]).shape == (2, 0, model.config.vocab_size)
    assert not model.logits([[400, 400]], [[0, 0]]).any()


def test_logits_from_several_threads(golden_model: Load) -> None:
    """Threads shared one cache without knowing of each other, and got each other's logits."""
    model = golden_model("tiny-fp/safetensors-fp16")
    prompts = [[1, 2, 3, 4, 5] * 20, [9, 8, 7] * 10]
    wanted = [model.logits(ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        for i, logits in enumerate(pool.map(model.logits, prompts * 10)):
            assert np.array_equal(logits, wanted[i % 2])


def test_one_thread_at_a_time_is_in_jittor(golden_model: Load, jittor: Any) -> None:
    """Its flags belong to the process: two engines at once left it without gradients for good."""
    runners = [golden_model(name).runner() for name in ("tiny-fp/safetensors-fp16", "tiny-int4/g32")]
    for runner in runners:
        runner.cache.reserve(0, 1)
    inside = threading.Event()
    runners[1].ops.on_layer = lambda layer: inside.set()
    with ThreadPoolExecutor(1) as pool:

        def meet(_layer: int) -> None:
            others.append(pool.submit(runners[1].forward, single_batch([1])))
            met.append(inside.wait(0.1))

        met: list[bool] = []
        others: list[Future[Any]] = []
        runners[0].ops.on_layer = meet
        runners[0].forward(single_batch([1]))
        for other in others:
            other.result()
    assert met == [False] * golden_model("tiny-fp/safetensors-fp16").config.n_layer
    assert not jittor.flags.no_grad


def test_no_compilation_at_any_length(golden_model: Load, jittor: Any) -> None:
    """After `warm_up` no length, batch or position makes Jittor compile anything."""
    model = golden_model("tiny-int8/g32")
    folder = Path(jittor.flags.cache_path) / "jit"
    before = {path.name for path in folder.glob("*.cc")}
    for length in (1, 2, 3, 17, model.config.n_positions):
        model.logits(np.ones((2, length), int))
    assert {path.name for path in folder.glob("*.cc")} == before
