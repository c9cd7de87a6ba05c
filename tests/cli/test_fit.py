"""`moss-jt fit`: what it prints, in both languages, within 80 columns."""

from __future__ import annotations

import json
from pathlib import Path

import known_machine
import pytest
from click.testing import CliRunner, Result
from fake_hub import FakeHub
from host_device import HostDevice

from moss_jt.cli.fit import table
from moss_jt.cli.main import exit_code_of, make_group
from moss_jt.fit_device import DeviceRates
from moss_jt.language import set_language
from moss_jt.memory import GIB
from moss_jt.sharing import SharingRates

INT4 = ("--preset", "moss-moon-003", "--bits", "4")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibrated machine with 64 GiB free."""
    known_machine.install(monkeypatch, free=64 * GIB)


def run(*options: str) -> Result:
    return CliRunner().invoke(make_group(), ["fit", *options])


def columns(line: str) -> int:
    return sum(2 if ord(character) >= 0x2E80 else 1 for character in line)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(
    "options",
    [
        (*INT4, "--memory", "6GiB"),
        (*INT4,),
        ("--preset", "moss-moon-003", "--memory", "16GiB", "--compute", "exact"),
        ("--preset", "moss-moon-003", "--bits", "8", "--head", "int8", "--memory", "2GiB", "--kv", "int8"),
        ("--preset", "tiny"),
    ],
)
def test_the_report_is_readable_at_80_columns(options: tuple[str, ...], language: str) -> None:
    set_language("zh" if language == "zh" else "en")
    result = run(*options)
    assert result.exit_code == 0, result.output
    wide = [line for line in result.stdout.splitlines() if columns(line) > 80 and not line.startswith("!")]
    assert not wide, wide


def test_the_report_in_english() -> None:
    lines = run(*INT4, "--memory", "6GiB").stdout.splitlines()
    assert lines[0] == "moss-moon-003-random-int4: int4, 34 layers of width 6144"
    assert lines[1] == "6.00 GiB of memory, up to 2048 tokens"
    assert lines[3].split() == ["part", "size", "in", "memory", "on", "disk"]
    layers = next(line for line in lines if line.startswith("layers, int4"))
    assert layers.split()[2:4] == ["7.45", "GiB"]
    assert any(line.startswith("2047 ") and line.endswith(" disk") for line in lines)
    assert any(line.startswith("A prompt of 512 tokens: ") for line in lines)
    assert any(line.startswith("  4.00 GiB more memory") and line.endswith("nothing read from disk") for line in lines)
    assert any(line.startswith("! Reading from disk is not needed here") for line in lines)
    assert lines[-1] == "Measured 2026-01-01T00:00Z: memory 45.0 GB/s, disk 2.00 GB/s"


def test_the_report_in_chinese() -> None:
    set_language("zh")
    text = run(*INT4, "--memory", "6GiB").stdout
    assert "键值缓存（逐步增长）" in text
    assert "增加 4.00 GiB 内存" in text
    assert "compute" not in text


def test_json_is_one_object_alone() -> None:
    result = run(*INT4, "--memory", "6GiB", "--json")
    values = json.loads(result.stdout)
    assert values["memory"] == 6 * GIB
    assert values["model"] == "moss-moon-003-random-int4"
    assert [step["position"] for step in values["decode"]] == [0, 512, 1024, 2047]
    assert values["changes"][0]["factor"] > 1


def test_a_folder_and_options_reach_the_plan(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "moss", "n_embd": 6144, "n_head": 24, "n_layer": 34, "wbits": 8, "n_positions": 2048})
    )
    result = run("--model", str(tmp_path), "--memory", "8GB", "--context", "700", "--kv", "fp32", "--json")
    values = json.loads(result.stdout)
    assert (values["memory"], values["context"], values["kv"]) == (8 * 10**9, 700, "float32")


def test_one_of_model_and_preset_is_needed() -> None:
    assert "give either --model or --preset" in run().stderr
    assert "give either --model or --preset" in run("--model", ".", *INT4).stderr
    assert "--bits and --head are for --preset" in run("--model", ".", "--bits", "4").stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((*INT4, "--memory", "lots"), "--memory is 'lots'; give a size like 6GiB"),
        ((*INT4, "--memory", "1GiB", "--context", "2048"), "1GiB of memory is too little for a context of 2048 tokens"),
        (("--model", "nothing-here"), "there is neither a folder nothing-here nor a stored model"),
    ],
)
def test_refusals_are_one_line(options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(make_group(), ["fit", *options]) == 1
    written = capsys.readouterr()
    assert words in written.err
    assert written.err.count("\n") == 1
    assert written.out == ""


def test_a_table_counts_wide_characters_twice() -> None:
    assert table([["部分", "大小"], ["a", "1"]]) == ["部分  大小", "a        1"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_device_is_planned_for_before_it_is_bought(language: str) -> None:
    set_language("zh" if language == "zh" else "en")
    done = run(*INT4, "--vram", "6GiB", "--memory", "8GiB")
    set_language("en")
    assert done.exit_code == 0, done.output
    assert ("copied a token" if language == "en" else "每词元复制") in done.output
    assert all(columns(line) <= 80 for line in done.stdout.splitlines())
    found = json.loads(run(*INT4, "--vram", "6GiB", "--memory", "8GiB", "--json").stdout)
    assert found["vram"] == 6 * GIB and found["device"]["weights"] > GIB
    assert found["steps"][0]["link_bytes"] > 0 == found["steps"][0]["disk_bytes"]


def test_a_model_on_the_hub_is_planned_from_its_config(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, golden: Path
) -> None:
    name = "fnlp/moss-tiny-int4"
    with FakeHub() as hub:
        hub.use(monkeypatch, tmp_path / "hf")
        hub.add(name, golden / "tiny-int4" / "g32")
        result = run("--model", name, "--json")
        assert result.exit_code == 0, result.output
        told = json.loads(result.stdout)
        assert told["model"] == name and "int4" in {part["stored"] for part in told["parts"]}
        assert set(hub.sent) == {"config.json"}, "weights stay where they are"
        missing = run("--model", "fnlp/no-such-model")
        assert missing.exit_code != 0 and "no-such-model" in str(missing.exception)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("link", [20e9, 60e9])
def test_what_the_processor_could_take_over_is_told(
    link: float, language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = SharingRates(link=link, link_beside=15e9, host=30e9, host_beside=25e9, turn_s=0.0)
    monkeypatch.setattr("moss_jt.fit_device.measure", lambda *_: DeviceRates(1e12, link, rates))
    monkeypatch.setattr("moss_jt.accelerator.open_accelerator", lambda *_: HostDevice(Path("unused")))
    set_language("zh" if language == "zh" else "en")
    done = run(*INT4, "--vram", "6GiB", "--memory", "8GiB")
    set_language("en")
    assert done.exit_code == 0, done.output
    assert all(columns(line) <= 80 for line in done.stdout.splitlines())
    assert "25.0 GB/s" in done.stdout and "15.0 GB/s" in done.stdout
    last = done.stdout.splitlines()[-1]
    if link == 60e9:
        assert ("does not pay" if language == "en" else "没有好处") in last
    else:
        assert last.startswith("--host-share auto") and "0.62" in last
