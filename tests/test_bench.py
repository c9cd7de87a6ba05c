"""bench: its arithmetic, what it counts, and that it measures what it says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from moss_jt import bench
from moss_jt.bench import Settings, measure, operations, parse_synthetic, pass_bytes, ratios, synthetic_model
from moss_jt.config import MossConfig
from moss_jt.errors import ConfigError
from moss_jt.limits import Limits, Measured
from moss_jt.memory import MIB, parse_size, resident_memory
from moss_jt.plan import MatrixSize, matrix_sizes
from moss_jt.synthetic import layouts_of

SIZES = [
    MatrixSize("transformer.h.0.mlp.fc_in.weight", 40, 16, 1000, 0, 10, "int4"),
    MatrixSize("lm_head.weight", 64, 16, 100, 0, 10, "int8"),
]
SHORT = Settings(prompt_tokens=(5, 9), contexts=(12, 20), new_tokens=4, pairs=2)


class FakeLimits(Limits):
    """A machine of known rates; counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def memory(self, seconds: float = 0.25, *, mib: int = 512) -> Measured:
        return self._say("memory", 4e9)

    def int8(self, seconds: float = 0.1) -> Measured:
        return self._say("int8", 2e9)

    def fp32(self, seconds: float = 0.1) -> Measured:
        return self._say("fp32", 1e9)

    def disk(self, file: Path, seconds: float = 1.0, *, readers: int = 4) -> Measured:
        assert file.is_file()
        return self._say("disk", 0.5e9)

    def _say(self, what: str, rate: float) -> Measured:
        self.asked.append(what)
        return Measured(rate / 2, 0.5, 1.0, what)


def tiny(kind: str, layers: int = 2) -> MossConfig:
    """A small model of random weights."""
    return replace(parse_synthetic(f"tiny-{kind}", layers=layers), n_positions=64)


def test_bytes_of_a_pass() -> None:
    assert pass_bytes(SIZES) == 3 * 1000 + 4 * 100


def test_the_head_answers_one_token_of_a_prompt() -> None:
    assert operations(SIZES, 7) == 2 * (7 * 40 * 10 + 64 * 10)


def test_a_ratio_is_that_to_the_limits_on_both_sides() -> None:
    assert ratios([3.0, 4.0], [2.0, 4.0, 6.0]) == [1.0, 0.8]
    with pytest.raises(AssertionError, match="enclose"):
        ratios([1.0], [1.0])


def test_names_of_synthetic_models() -> None:
    config = parse_synthetic("moss-moon-003-int4")
    assert config.n_layer == 34
    assert config.quantization is not None and config.quantization.bits == 4
    assert config.head_quantization is not None and config.head_quantization.bits == 8
    assert parse_synthetic("tiny-fp16", layers=3).head_quantization is None
    assert parse_synthetic("moss-moon-003-int8", head_bits=16).head_quantization is None


@pytest.mark.parametrize("name", ["moss", "moss-moon-003", "moss-moon-003-int3", "int4", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="known are moss-moon-003, tiny, each with -int4, -int8 or -fp16"):
        parse_synthetic(name)


def test_layers_are_at_least_one() -> None:
    with pytest.raises(ConfigError, match="layers is 0"):
        parse_synthetic("tiny-int4", layers=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"new_tokens": 1}, "new_tokens is 1; it must be 2 or more"),
        ({"pairs": 0}, "pairs is 0; it must be 1 or more"),
        ({"batch": 0}, "batch is 0"),
        ({"prompt_tokens": (0,)}, "a prompt has 1 token or more"),
        ({"contexts": (128, 16)}, "more than the 16 new tokens"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Settings(**settings)  # type: ignore[arg-type]


def test_the_longest_conversation() -> None:
    assert Settings(prompt_tokens=(128, 512), contexts=(64,)).longest == 513
    assert Settings(prompt_tokens=(), contexts=(2048,)).longest == 2048


@pytest.mark.parametrize(("kind", "arithmetic"), [("int4", "int8"), ("int8", "int8"), ("fp16", "fp32")])
def test_runs_and_limits_alternate(kind: str, arithmetic: str, jittor: ModuleType) -> None:
    config, limits = tiny(kind), FakeLimits()
    report = measure(synthetic_model(config, max_tokens=32), SHORT, limits)
    assert limits.asked == [arithmetic] * 6 + ["memory"] * 6
    assert [run["tokens"] for run in report["prefill"]] == [5, 9]
    assert [run["context"] for run in report["decode"]] == [12, 20]
    assert report["model"]["weight_bytes"] == pass_bytes(matrix_sizes(config, layouts_of(config)))
    assert report["peak_memory_bytes"] > 0
    assert report["written_bytes"] == 0
    assert all(run["same_answers"] and len(run["answer"]) == 4 for run in report["decode"])
    for run in [*report["prefill"], *report["decode"]]:
        assert run["of_limit"]["runs"] == run["tokens_per_s"]["runs"] == 2
    json.dumps(report)


def test_rates_are_those_of_the_times(jittor: ModuleType) -> None:
    settings = replace(SHORT, prompt_tokens=(6,), contexts=(16,), pairs=1, batch=2)
    report = measure(synthetic_model(tiny("int4"), kv="fp32", max_tokens=32), settings, FakeLimits())
    (run,) = report["decode"]
    per_pass = 2 / run["tokens_per_s"]["median"]
    per_token = 2 * 2 * 256 * 4  # layers, keys and values, width, float32
    assert run["kv_bytes"] == 2 * (16 - 2) * per_token
    moved = report["model"]["weight_bytes"] + run["kv_bytes"]
    assert run["gb_per_s"]["median"] == pytest.approx(moved / per_pass / 1e9, rel=0.02, abs=1e-4)
    assert run["of_limit"]["median"] == pytest.approx(moved / per_pass / 4e9, rel=0.02, abs=1e-4), "the limit is 4 GB/s"
    (run,) = report["prefill"]
    assert run["first_token_s"]["median"] == pytest.approx(6 / run["tokens_per_s"]["median"], abs=1e-4)


def test_an_answer_is_timed_after_the_first_token_of_all(jittor: ModuleType) -> None:
    model = synthetic_model(tiny("int4"), max_tokens=32)
    measuring = bench.Bench(model, replace(SHORT, batch=3), FakeLimits())
    prompts = [measuring.prompt(8, number) for number in range(3)]
    assert len(set(prompts)) == 3
    first = measuring.time_answers(prompts, 12, 1)
    counts = measuring.engine.stats()
    answered = measuring.time_answers(prompts, 12, 4)
    assert answered.count == 3
    assert [len(answer) for answer in answered.answers] == [4, 4, 4]
    assert [answer[:1] for answer in answered.answers] == list(first.answers)
    after = measuring.engine.stats()
    assert float(after["reused_tokens"]) - float(counts["reused_tokens"]) == 3 * 7, "prompts are not computed again"


def test_a_streamed_model_is_compared_with_the_disk(tmp_path: Path, jittor: ModuleType) -> None:
    from moss_jt.converters.synth import synthesize
    from moss_jt.load import load_model

    folder = tmp_path / "model"
    synthesize(parse_synthetic("tiny-int8", layers=12), folder)
    with pytest.raises(ConfigError, match="give at least") as refused:
        load_model(folder, compute="fast", memory=1, max_tokens=32)
    least = re.search(r"give at least ([\d.]+MiB)", str(refused.value))
    assert least is not None
    model = load_model(folder, compute="fast", memory=parse_size(least.group(1)) + 2 * MIB, max_tokens=32)
    assert model.store.streamed_bytes > 0
    limits = FakeLimits()
    report = measure(model, replace(SHORT, contexts=(12,)), limits)
    (run,) = report["decode"]
    assert limits.asked[6:] == ["memory", "disk"] * 3
    assert run["streamed_bytes"] == model.store.streamed_bytes == report["model"]["streamed_bytes"]
    assert run["of_disk_limit"]["runs"] == 2


def test_weights_that_are_on_no_disk_cannot_be_streamed(jittor: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"on no disk to be streamed from.*moss-convert synth"):
        synthetic_model(parse_synthetic("moss-moon-003-int4", layers=2), memory=resident_memory() + 800 * MIB)


def test_a_context_that_does_not_fit_is_refused(jittor: ModuleType) -> None:
    model = synthetic_model(tiny("int4"), max_tokens=16)
    with pytest.raises(ConfigError, match="20 tokens are asked for; this model holds 16"):
        measure(model, SHORT, FakeLimits())


@pytest.mark.parametrize(("name", "value"), [("device", "cuda"), ("kv", "int3"), ("compute", "quick")])
def test_arguments_are_checked_as_load_model_does(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=value):
        synthetic_model(tiny("int4"), **{name: value})  # type: ignore[arg-type]
