"""Measuring the kernels: what is passed through them, not how fast they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from moss_jt import measuring
from moss_jt.launch import Buffer
from moss_jt.measuring import FixedTimes, cache_bytes, measure_fixed, measure_layers
from moss_jt.plan import LOGIT_ROWS, buffer_bytes


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, jittor: ModuleType) -> None:
    """Models of a few megabytes, measured for a moment."""
    monkeypatch.setattr(measuring, "WIDTH", 256)
    monkeypatch.setattr(measuring, "_LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(measuring, "_SECONDS", 0.02)
    monkeypatch.setattr(measuring, "cache_bytes", lambda: 0)


@pytest.mark.parametrize(
    ("stored", "rounding"), [("int4", True), ("int4", False), ("int8", True), ("float16", True), ("bfloat16", False)]
)
def test_every_format_is_measured(small: None, stored: str, rounding: bool) -> None:
    rates = measure_layers(stored, "float16", rounding=rounding, fixed=FixedTimes(0, 0))
    for spread in (rates.decode, rates.prefill, rates.attention):
        assert 0 < spread.low <= spread.median <= spread.high < 1e15


def test_fixed_times_are_times(small: None) -> None:
    fixed = measure_fixed("float32")
    assert 0 <= fixed.layer_s < 1
    assert 0 <= fixed.token_s < 1


def test_the_rate_counts_the_weights_and_leaves_out_the_fixed_times(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass of a second, 0.4 of it fixed: the bytes took 0.6; 16 tokens took as long as one."""
    monkeypatch.setattr(measuring.Bench, "step", lambda _self, start, count: 1.5 if start else 1.0)
    rates = measure_layers("float32", "float16", rounding=False, fixed=FixedTimes(layer_s=0.3, token_s=0.1))
    assert rates.decode.median == pytest.approx(12 * 256 * 256 * 4 / 0.6)
    assert rates.prefill.median == pytest.approx(2 * 12 * 256 * 256 * 16 / 0.6)
    assert rates.attention.median == pytest.approx(2047 * 2 * 2 * 256 / 0.5)


def test_the_models_are_larger_than_the_caches(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = measuring.Bench("float16", "float16", rounding=False)
    assert bench.nbytes >= 1 << 20
    monkeypatch.setattr(measuring, "cache_bytes", lambda: 1 << 20)
    assert measuring.Bench("float16", "float16", rounding=False).nbytes >= 4 << 20


@pytest.mark.parametrize(("stored", "rounding"), [("int4", True), ("int8", False), ("float16", False)])
def test_the_plan_counts_the_buffers_of_a_pass(small: None, stored: str, rounding: bool) -> None:
    """What a plan sets aside for activations is what the steps take, to a tenth."""
    bench = measuring.Bench(stored, "float16", rounding=rounding, layers=1)
    bench.step(0, measuring.TOKENS)
    taken = sum(buffer.array.nbytes for buffer in buffers_of(bench._ops))
    planned = buffer_bytes(bench.config, measuring.TOKENS)
    rows = measuring.TOKENS * bench.config.n_embd * 4  # of the embedding, on their way
    inputs = measuring.TOKENS * bench.config.inner_dim * 4  # in order: only where a matrix is permuted
    copied = LOGIT_ROWS * bench.config.vocab_size * 4
    assert taken <= planned <= 1.1 * (taken + rows + inputs + copied) + 65536


def buffers_of(thing: object) -> Iterator[Buffer]:
    """The buffers within an object, however deep, each once; neither the cache nor weights are among them."""
    for name, value in vars(thing).items():
        if name in ("_small", "_memory"):
            continue  # the weights
        if isinstance(value, Buffer):
            yield value
        elif isinstance(value, dict):
            yield from (item for item in value.values() if isinstance(item, Buffer))
        elif type(value).__module__ == "moss_jt.ops":
            yield from buffers_of(value)


def test_the_last_cache_is_found(tmp_path: Path) -> None:
    assert cache_bytes(tmp_path) == 0
    for index, text in enumerate(("48K\n", "2048K\n", "32768K\n", "strange\n")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(text)
    assert cache_bytes(tmp_path) == 32 << 20
