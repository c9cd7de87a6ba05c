"""Measuring the kernels: what is passed through them, not how fast they are."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from moss_jt import measuring
from moss_jt.measuring import FixedTimes, cache_bytes, measure_fixed, measure_layers


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
    monkeypatch.setattr(measuring._Bench, "step", lambda _self, start, count: 1.5 if start else 1.0)
    rates = measure_layers("float32", "float16", rounding=False, fixed=FixedTimes(layer_s=0.3, token_s=0.1))
    assert rates.decode.median == pytest.approx(12 * 256 * 256 * 4 / 0.6)
    assert rates.prefill.median == pytest.approx(2 * 12 * 256 * 256 * 16)
    assert rates.attention.median == pytest.approx(2047 * 2 * 2 * 256 / 0.5)


def test_the_models_are_larger_than_the_caches(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = measuring._Bench("float16", "float16", rounding=False, width=256)
    assert bench.nbytes >= 1 << 20
    monkeypatch.setattr(measuring, "cache_bytes", lambda: 1 << 20)
    assert measuring._Bench("float16", "float16", rounding=False, width=256).nbytes >= 4 << 20


def test_the_last_cache_is_found(tmp_path: Path) -> None:
    assert cache_bytes(tmp_path) == 0
    for index, text in enumerate(("48K\n", "2048K\n", "32768K\n", "strange\n")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(text)
    assert cache_bytes(tmp_path) == 32 << 20
