"""The line of a benchmark: what it holds, and where it is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moss_jt import record
from moss_jt.errors import ConfigError


def test_spread() -> None:
    assert record.spread([3.0, 1.0, 2.00004]) == {"median": 2.0, "min": 1.0, "max": 3.0, "runs": 3}


def test_a_line_is_kept_under_the_name_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(record, "machine", lambda: {"cpu": "A (R) CPU", "device": None})
    lines = [record.keep("speed", {"run": number}, save=True) for number in (1, 2)]
    assert (tmp_path / "results" / "speed-a-r-cpu.jsonl").read_text("utf-8").splitlines() == lines
    assert json.loads(lines[1])["results"] == {"run": 2}
    assert json.loads(lines[1])["benchmark"] == "speed"


def test_nothing_is_kept_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "BENCHMARKS", tmp_path)
    record.keep("speed", {}, save=False)
    assert list(tmp_path.iterdir()) == []


def test_outside_of_a_checkout_a_line_is_only_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "BENCHMARKS", tmp_path / "missing")
    assert json.loads(record.keep("speed", {}, save=False))["commit"] is None
    with pytest.raises(ConfigError, match="kept in a checkout"):
        record.keep("speed", {}, save=True)


def test_a_copy_without_git_is_told_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(record, "ask", lambda *_: None)
    assert record.commit() is None
    monkeypatch.setenv("MOSS_JT_COMMIT", "0123456789ab")
    assert record.commit() == "0123456789ab"


def test_the_machine_names_its_processor_and_nobody() -> None:
    here = record.machine()
    assert here["cores"] >= 1
    assert here["cpu"]
    assert set(here) == {"cpu", "cores", "memory_gib", "device", "system", "python"}
