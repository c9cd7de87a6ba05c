"""fit(): the same plan as loading makes, predictions from known rates, and what would help."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import known_machine
import pytest

from moss_jt.calibrate import Wanted
from moss_jt.config import MossConfig, Quantization
from moss_jt.converters.synth import preset_config, synthesize
from moss_jt.errors import ConfigError
from moss_jt.fit import Fit, fit, predictor_for
from moss_jt.load import load_model
from moss_jt.memory import GIB, MIB
from moss_jt.plan import make_plan, matrix_sizes, needs_of

MOON = MossConfig(n_embd=6144, n_head=24, n_layer=34, dtype="float16", name="moon")
INT4 = replace(MOON, quantization=Quantization(4, 128))
INT8 = replace(MOON, quantization=Quantization(8, 128))


@pytest.fixture(autouse=True)
def calibrated(monkeypatch: pytest.MonkeyPatch) -> list[Wanted]:
    """A calibrated machine with 64 GiB free; what was asked of the calibration."""
    return known_machine.install(monkeypatch, free=64 * GIB)


def test_the_plan_is_the_one_that_loading_makes() -> None:
    sizes = matrix_sizes(INT4)
    needs = needs_of(INT4, sizes, base=300 * MIB, kv="float16")
    assert fit(INT4, memory=4 * GIB, base=300 * MIB).plan == make_plan(sizes, needs, memory=4 * GIB)


def test_parts_add_up_to_what_is_taken() -> None:
    for memory in (2 * GIB, 4 * GIB, 12 * GIB):
        found = fit(INT4, memory=memory)
        assert memory * 0.85 < sum(part.memory for part in found.parts) <= memory or not found.plan.ring_slots
        parts = {part.key: part for part in found.parts}
        for key in ("layers", "head"):
            assert parts[key].memory + parts[key].disk == parts[key].total
        assert parts["layers"].disk + parts["head"].disk == found.plan.streamed_bytes
        assert parts["embedding"].memory == 0
        assert parts["embedding"].total == parts["head"].total == 107008 * 6144 * 2


def test_decoding_is_predicted_over_the_context() -> None:
    found = fit(INT4, memory=4 * GIB)
    assert [step.position for step in found.decoding] == [0, 512, 1024, 2047]
    rates = [step.tokens_per_s for step in found.decoding]
    assert rates == sorted(rates, reverse=True)
    assert 0.25 < rates[-1] < rates[0] < 0.4  # 5.7 GB at 2 GB/s, and 1.7 more at the end
    assert [prompt.tokens for prompt in found.prefill] == [128, 512]


def factors(found: Fit) -> dict[tuple[str, int | str], float]:
    return {(change.key, change.value): change.factor for change in found.changes}


def test_what_would_help_a_streamed_model() -> None:
    changes = factors(fit(INT8, memory=8 * GIB))
    assert changes["bits", 4] > 4
    assert 1.2 < changes["memory", 2 * GIB] < 2
    assert changes["memory", 16 * GIB] > 10  # nothing is streamed then
    assert list(changes.values()) == sorted(changes.values(), reverse=True)
    assert ("kv", "int8") in factors(fit(INT4, memory=6 * GIB))


def test_a_resident_model_is_told_nothing_about_memory() -> None:
    found = fit(INT4)
    assert found.plan.streamed_bytes == 0
    assert not any(change.key in ("memory", "context") for change in found.changes)
    assert found.warnings == ()


def test_formats_that_are_proposed_are_measured_too(calibrated: list[Wanted]) -> None:
    fit(MOON, memory=8 * GIB)
    assert calibrated[-1].stored == {"float16", "int8", "int4"}
    fit(INT4, memory=8 * GIB)
    assert calibrated[-1].stored == {"float16", "int8", "int4"}
    fit(replace(INT4, head_quantization=Quantization(8, 128)), memory=8 * GIB)
    assert calibrated[-1].stored == {"int8", "int4"}


@pytest.mark.parametrize(
    ("config", "memory", "free_gib", "words"),
    [
        (INT4, 6 * GIB, 32, "Reading from disk is not needed here"),
        (INT8, 12 * GIB, 12, "In int4 the whole model would fit"),
        (INT4, 16 * GIB, 8, "16GiB is more than the 8.33GiB that this process may take now"),
        (MOON, 3 * GIB, 8, "A token takes 15 s: the disk is too slow"),
    ],
)
def test_warnings(config: MossConfig, memory: int, free_gib: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moss_jt.fit.automatic_memory", lambda: free_gib * GIB)
    assert any(words in line for line in fit(config, memory=memory, base=330 * MIB).warnings)


def test_estimated_kernels_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "moss_jt.fit.calibrate",
        lambda wanted, **_: replace(known_machine.known(wanted.folder), kernels={}, layer_s=None),
    )
    found = fit(INT4)
    assert not found.measured
    assert any("not measured yet" in line for line in found.warnings)


def test_too_little_memory_is_refused_as_loading_refuses_it() -> None:
    with pytest.raises(ConfigError, match=r"^1GiB of memory is too little for a context of 2048 tokens: give at least"):
        fit(INT4, memory=GIB, context=2048)
    assert fit(INT4, memory=GIB).plan.context < 2048


def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigError, match='kv is "fp8"; known are fp32, fp16, int8'):
        fit(INT4, kv="fp8")


def test_a_context_past_the_model_s_is_cut() -> None:
    assert fit(INT4, context=5000).plan.context == 2048


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    """The original's config.json, before any weight is fetched."""
    values = {"model_type": "moss", "n_embd": 6144, "n_head": 24, "n_layer": 34, "wbits": 4, "groupsize": 128}
    (tmp_path / "config.json").write_text(json.dumps({**values, "n_positions": 2048, "vocab_size": 107008}))
    found = fit(tmp_path, memory=6 * GIB)
    assert found.config.quantization == Quantization(4, 128)
    assert found.plan.resident == fit(INT4, memory=6 * GIB).plan.resident
    assert found.name == tmp_path.name


def test_a_native_folder_is_read_for_its_layouts(tmp_path: Path, calibrated: list[Wanted]) -> None:
    folder = synthesize(preset_config("tiny", bits=4), tmp_path / "tiny").path
    found = fit(folder)
    assert [part.stored for part in found.parts[:3]] == ["int4", "float16", "float16"]
    assert calibrated[-1].folder == folder


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        fit(tmp_path)


def test_the_smallest_memory_is_told() -> None:
    found = fit(INT4, memory=6 * GIB, context=1024)
    assert fit(INT4, memory=found.smallest, context=1024).plan.context == 1024
    with pytest.raises(ConfigError):
        fit(INT4, memory=found.smallest - 1, context=1024)


@pytest.mark.parametrize("make", [lambda: fit(INT4, memory=6 * GIB), lambda: fit(MOON)])
def test_all_can_be_written_as_json(make: Callable[[], Fit]) -> None:
    values = json.loads(json.dumps(make().to_dict()))
    assert values["decode"][0]["tokens_per_s"] > 0
    assert values["decode"][0]["bound"] in ("disk", "compute")
    assert {part["key"] for part in values["parts"]} >= {"layers", "head", "embedding", "kv", "process"}
    assert values["calibration"] == {"when": "2026-01-01T00:00Z", "kernels_measured": True}


def test_a_loaded_model_is_predicted_from_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(synthesize(preset_config("tiny", bits=4), tmp_path / "tiny").path, compute="fast", memory=GIB)
    assert predictor_for(model) is None, "nothing was measured"
    monkeypatch.setattr("moss_jt.fit.load_calibration", lambda: known_machine.known(model.path))
    predictor = predictor_for(model)
    assert predictor is not None
    assert predictor.decoding(10).tokens_per_s > 10
    assert fit(model.path, memory=GIB).decoding[0].streamed_bytes == predictor.decoding(0).streamed_bytes == 0
