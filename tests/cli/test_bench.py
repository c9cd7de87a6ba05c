"""`moss-jt bench`: what it prints, keeps and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from moss_jt import record
from moss_jt.cli.bench import lines_of
from moss_jt.cli.main import exit_code_of, make_group
from moss_jt.language import set_language

QUICK = ["--prompt-tokens", "4,6", "--context", "12", "--new-tokens", "3", "--pairs", "1"]
TINY = ["--synthetic", "tiny-int4", "--layers", "1"]


def bench(*words: str) -> Result:
    """Run the command."""
    return CliRunner().invoke(make_group(), ["bench", *words])


def spread(value: float) -> dict[str, float]:
    """A measurement, as reports hold them."""
    return {"median": value, "min": value / 2, "max": value * 2, "runs": 8}


def report() -> dict[str, Any]:
    """What `measure` gives, with round numbers."""
    return {
        "load_s": 6.04,
        "peak_memory_bytes": 3 << 29,
        "model": {"name": "random", "layers": 34, "compute": "fast", "weight_bytes": 8_670_000_000},
        "prefill": [
            {
                "tokens": 128,
                "tokens_per_s": spread(36),
                "first_token_s": spread(3.5),
                "limit": {"gop_per_s": spread(340), "how": "avx2"},
                "of_limit": spread(0.4),
            }
        ],
        "decode": [
            {
                "context": 64,
                "batch": 1,
                "tokens_per_s": spread(4.75),
                "gb_per_s": spread(41.5),
                "limit": {"gb_per_s": spread(46), "how": "avx2"},
                "of_limit": spread(0.9),
            }
        ],
    }


def test_one_json_line(jittor: ModuleType) -> None:
    done = bench(*TINY, *QUICK, "--json")
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["benchmark"] == "bench"
    results = line["results"]
    assert [run["tokens"] for run in results["prefill"]] == [4, 6]
    assert results["model"]["layers"] == 1
    assert results["load_s"] >= 0
    assert results["start_s"] >= 0


def test_a_stored_model(jittor: ModuleType, tmp_path: Path) -> None:
    from moss_jt.converters.synth import preset_config, synthesize

    synthesize(preset_config("tiny", bits=8, layers=1), tmp_path / "model")
    done = bench("--model", str(tmp_path / "model"), "--compute", "exact", "--kv", "fp32", *QUICK, "--json")
    assert done.exit_code == 0, done.output
    model = json.loads(done.stdout.splitlines()[-1])["results"]["model"]
    assert (model["compute"], model["kv"], model["bits"]) == ("exact", "float32", 8)


def test_a_line_is_kept_when_asked(jittor: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "BENCHMARKS", tmp_path)
    assert bench(*TINY, *QUICK, "--save").exit_code == 0
    (kept,) = (tmp_path / "results").iterdir()
    assert json.loads(kept.read_text("utf-8"))["benchmark"] == "bench"


def test_words_for_people() -> None:
    assert lines_of(report()) == [
        "random, 34 layers, fast: 8.67 GB of weights a token; loaded in 6.0 s; peak memory 1.50 GiB",
        "prefill of 128: 36.00 (18.00-72.00) tokens/s, first token after 3.50 s; 40% (20-80) of 340 GOP/s (avx2)",
        "answering at 64 tokens, 1 at once: 4.75 (2.38-9.50) tokens/s, 41.5 GB/s; 90% (45-180) of memory's 46.0 GB/s",
    ]


def test_words_of_a_streamed_model() -> None:
    streamed = report()
    streamed["decode"][0] |= {"disk_limit": {"gb_per_s": spread(1.25)}, "of_disk_limit": spread(0.95)}
    assert lines_of(streamed)[-1].endswith("of memory's 46.0 GB/s, 95% (48-190) of the disk's 1.25 GB/s")


def test_words_in_chinese() -> None:
    set_language("zh")
    assert lines_of(report())[-1].startswith("缓存 64 个词元、1 个对话时的解码：4.75 (2.38-9.50) 词元/秒")


@pytest.mark.parametrize("words", [[], [*TINY, "--model", "somewhere"]])
def test_one_model_must_be_named(words: list[str]) -> None:
    done = bench(*words)
    assert done.exit_code == 2
    assert "either --model or --synthetic" in done.stderr


@pytest.mark.parametrize("value", ["", "128,", "0", "12,x", "-1", "1.5"])
def test_lists_of_numbers_are_checked(value: str) -> None:
    done = bench(*TINY, "--prompt-tokens", value)
    assert done.exit_code == 2
    assert f"{value!r} is not a list of numbers" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--synthetic", "gpt-2"], "no synthetic model 'gpt-2'"),
        ([*TINY, "--context", "16"], "more than the 16 new tokens"),
        ([*TINY, "--device", "cuda"], "bench measures the CPU"),
        ([*TINY, "--vram", "4GiB"], "vram or host_share was given"),
        ([*TINY, "--host-share", "0.5"], "vram or host_share was given"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(make_group(), ["bench", *words]) == 1
    assert said in capsys.readouterr().err
