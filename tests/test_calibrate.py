"""Calibration: what is measured, what is kept, what is measured again; the measurements themselves are stand-ins."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moss_jt import calibrate as module
from moss_jt import measuring, paths
from moss_jt.calibrate import Calibration, Wanted, calibrate, load_calibration, machine_key
from moss_jt.errors import DiskError
from moss_jt.kv_layout import KVType
from moss_jt.limits import Measured
from moss_jt.predict import Spread


class FakeLimits:
    """A machine that reads 20 GB/s and a disk of 2 GB/s; counts what it was asked."""

    asked: list[str]

    def __enter__(self) -> FakeLimits:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def memory(self, seconds: float) -> Measured:
        self.asked.append("memory")
        return Measured(20e9 * seconds, seconds, 2 * seconds, "plain")

    def fp32(self, seconds: float) -> Measured:
        return Measured(1e11 * seconds, seconds, seconds, "plain")

    def int8(self, seconds: float) -> Measured:
        return Measured(4e11 * seconds, seconds, seconds, "plain")

    def disk(self, file: Path, seconds: float) -> Measured:
        assert file.stat().st_size >= 64 << 20, "too small to measure with"
        self.asked.append(f"disk {file.name}")
        return Measured(2e9 * seconds, seconds, seconds / 4, "direct")

    def disk_beside(self, load: FakeLimits, file: Path, seconds: float) -> Measured:
        assert load is not self, "it would wait for itself"
        self.asked.append(f"disk beside {file.name}")
        return Measured(1.5e9 * seconds, seconds, seconds / 4, "direct")


Machine = list[str]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """What was measured, in order, on a machine where Jittor is compiled."""
    asked: list[str] = []
    monkeypatch.setattr(FakeLimits, "asked", asked, raising=False)
    monkeypatch.setattr(module, "Limits", FakeLimits)
    monkeypatch.setattr("moss_jt.calibrate.startup.compile_needed", lambda _device: False)
    monkeypatch.setattr(module, "_start_kernels", lambda _progress: asked.append("start"))

    def fixed(_kv: KVType) -> measuring.FixedTimes:
        asked.append("fixed")
        return measuring.FixedTimes(0.001, 0.002)

    def layers(stored: str, kv: KVType, *, rounding: bool, fixed: measuring.FixedTimes) -> measuring.LayerRates:
        assert fixed == measuring.FixedTimes(0.001, 0.002)
        asked.append(f"{stored} {kv} {rounding}")
        return measuring.LayerRates(Spread(10e9, 9e9, 11e9), Spread(2e11, 2e11, 2e11), Spread(5e9, 5e9, 5e9))

    monkeypatch.setattr(measuring, "measure_fixed", fixed)
    monkeypatch.setattr(measuring, "measure_layers", layers)
    return asked


@pytest.fixture
def wanted(tmp_path: Path) -> Wanted:
    """An int4 model with a half-precision head, on a disk of 64 MiB at least."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(65 << 20)
    return Wanted(frozenset({"int4", "float16"}), "fast", "float16", tmp_path)


def test_all_is_measured_once_and_kept(machine: Machine, wanted: Wanted) -> None:
    first = calibrate(wanted)
    assert machine == [
        "start",
        *["memory"] * 8,
        "disk model.safetensors",
        *["disk model.safetensors", "disk beside model.safetensors"] * 5,
        "fixed",
        "float16 float16 True",
        "int4 float16 True",
    ]
    machine.clear()
    assert calibrate(wanted) == first == load_calibration()
    assert machine == []


def test_only_what_is_missing_is_measured(machine: Machine, wanted: Wanted) -> None:
    calibrate(wanted)
    machine.clear()
    calibrate(replace(wanted, stored=frozenset({"int8", "float16"})))
    assert machine == ["start", "int8 float16 True"]
    machine.clear()
    calibrate(replace(wanted, compute="exact"))
    assert machine == ["start", "int4 float16 False"]  # floating point computes the same in both
    machine.clear()
    calibrate(replace(wanted, kv="float32"))
    assert machine == ["start", "float16 float32 True"]
    assert set(load_calibration().kernels) == {"float16", "int4 fast", "int4 exact", "int8 fast"}


def test_again_measures_anew_and_keeps_the_rest(machine: Machine, wanted: Wanted) -> None:
    calibrate(replace(wanted, stored=frozenset({"int8"})))
    machine.clear()
    calibrate(wanted, again=True)
    assert [step for step in machine if "memory" not in step and "disk" not in step] == [
        "start",
        "fixed",
        "float16 float16 True",
        "int4 float16 True",
    ]
    assert "int8 fast" in load_calibration().kernels


def test_rates_are_the_medians(machine: Machine, wanted: Wanted) -> None:
    rates = calibrate(wanted).rates(wanted)
    assert (rates.disk, rates.disk_beside) == (2e9, 1.5e9)
    assert rates.disk_cpu == pytest.approx(0.125e-9)
    assert (rates.kernels["int4"].decode, rates.kernels["int4"].prefill) == (10e9, 2e11)
    assert (rates.attention, rates.layer_s, rates.token_s) == (5e9, 0.001, 0.002)


def test_a_type_of_cache_that_was_not_measured_computes_as_many_numbers(machine: Machine, wanted: Wanted) -> None:
    found = calibrate(wanted)
    assert found.rates(replace(wanted, kv="float32")).attention == pytest.approx(10e9)


def test_without_jittor_the_limits_stand_for_the_kernels(
    machine: Machine, wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moss_jt.calibrate.startup.compile_needed", lambda _device: True)
    found = calibrate(wanted)
    assert not any(step.startswith(("start", "fixed", "int4")) for step in machine)
    assert not found.is_measured(wanted)
    rates = found.rates(wanted)
    assert 10e9 < rates.kernels["int4"].decode < 20e9
    assert rates.kernels["int4"].prefill == pytest.approx(2e11)  # products of int8
    assert rates.kernels["float16"].prefill == pytest.approx(5e10)
    machine.clear()
    assert calibrate(wanted) == found
    assert machine == []
    assert calibrate(wanted, again=True).is_measured(wanted)


def test_the_disk_of_a_model_that_is_not_there_is_measured_with_a_file_that_goes_again(
    machine: Machine, wanted: Wanted, tmp_path: Path
) -> None:
    folder = tmp_path / "later"
    folder.mkdir()
    calibrate(replace(wanted, folder=folder / "not" / "yet"))
    assert any(step.startswith("disk .moss-jt-disk-") for step in machine)
    assert list(folder.iterdir()) == []


def test_a_disk_that_takes_no_file_is_named(machine: Machine, wanted: Wanted, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_file: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskError, match=r"cannot be measured: No space left on device\. Make room for 128 MiB"):
        calibrate(replace(wanted, folder=wanted.folder / "later"))


def kept() -> Path:
    return paths.state_dir() / "calibration.json"


def broken_json(text: str) -> str:
    return text[: len(text) // 2]


def broken_entry(text: str) -> str:
    return json.dumps({machine_key(): {**json.loads(text)[machine_key()], "memory": 3}})


@pytest.mark.parametrize("spoil", [broken_json, broken_entry, lambda _: "[1]", lambda _: ""])
def test_a_broken_file_means_measuring_again(machine: Machine, wanted: Wanted, spoil: Callable[[str], str]) -> None:
    first = calibrate(wanted)
    kept().write_text(spoil(kept().read_text("utf-8")), "utf-8")
    assert load_calibration() == Calibration()
    machine.clear()
    assert replace(calibrate(wanted), when=first.when) == first
    assert machine


def test_other_machines_keep_their_own(machine: Machine, wanted: Wanted, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = calibrate(wanted)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("moss_jt.calibrate.machine.processor", lambda: "another")
        assert load_calibration() == Calibration()
        assert set(calibrate(replace(wanted, stored=frozenset({"int8"}))).kernels) == {"int8 fast"}
    assert load_calibration() == mine
    assert len(json.loads(kept().read_text("utf-8"))) == 2


def test_old_entries_go(machine: Machine, wanted: Wanted, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10):
        monkeypatch.setattr("moss_jt.calibrate.machine.processor", lambda number=number: f"kind {number}")
        calibrate(wanted)
    assert len(json.loads(kept().read_text("utf-8"))) == 8
    assert load_calibration().memory is not None


def test_a_folder_that_cannot_be_written_is_named(machine: Machine, wanted: Wanted) -> None:
    paths.state_dir().write_text("a file")
    with pytest.raises(DiskError, match=r"calibration\.json cannot be written: .*MOSS_JT_HOME names another place"):
        calibrate(wanted)


def test_a_busy_machine_is_remembered(machine: Machine, wanted: Wanted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moss_jt.calibrate.machine.logical_cores", lambda: 8)
    assert calibrate(wanted).idle == pytest.approx(0.25)
