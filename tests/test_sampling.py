"""Sampling against transformers' processors (golden/sampling) and against plain, slow definitions."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moss_jt import sampling
from moss_jt.config import GenerationConfig
from moss_jt.errors import ShapeError

GOLDEN = Path(__file__).parent / "golden" / "sampling"
SETTINGS = json.loads((GOLDEN / "settings.json").read_text("utf-8"))
PLAIN: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
Scores = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(GOLDEN / "expected.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def config_of(setting: dict[str, Any]) -> GenerationConfig:
    names = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "rep": "repetition_penalty"}
    return GenerationConfig(**{**PLAIN, **{names[key]: setting[key] for key in setting.keys() & names.keys()}})


def softmax(scores: Scores) -> npt.NDArray[np.float64]:
    weights = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    result: npt.NDArray[np.float64] = weights / weights.sum(axis=-1, keepdims=True)
    return result


def slow_kept(scores: Scores, top_k: int, top_p: float) -> set[int]:
    """Which ids stay, by the book: sort everything."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if 0 < top_k < len(order):
        order = [i for i in order if scores[i] >= scores[order[top_k - 1]]]
    if top_p == 1.0:
        return set(order)
    weights = np.exp(scores[order].astype(np.float64) - float(scores[order[0]]))
    before = (np.cumsum(weights) - weights) / weights.sum()
    return {i for i, mass in zip(order, before, strict=True) if mass <= top_p}


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_golden_settings(golden: dict[str, Any], number: int) -> None:
    setting = SETTINGS[number]
    scores = sampling.process(golden["logits"], golden["history"], config_of(setting))
    expected = golden[f"s{number}_scores"]
    assert (np.isneginf(scores) == np.isneginf(expected)).all()
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    np.testing.assert_allclose(softmax(scores), golden[f"s{number}_probs"], atol=1e-6)
    assert (scores > -np.inf).sum(axis=-1).tolist() == setting["kept"]
    assert setting["same_kept_set_as_moss_inference"]
    assert ((golden[f"s{number}_moss_inference"] > -np.inf) == (scores > -np.inf)).all()


def test_golden_is_whole(golden: dict[str, Any]) -> None:
    assert len(SETTINGS) == 12
    assert len(golden) == 2 + 3 * len(SETTINGS)


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_rows_do_not_depend_on_the_batch(golden: dict[str, Any], number: int) -> None:
    config = config_of(SETTINGS[number])
    together = sampling.process(golden["logits"], golden["history"], config)
    for row, logits in enumerate(golden["logits"]):
        alone = sampling.process(logits, golden["history"][row].tolist(), config)
        np.testing.assert_array_equal(alone, together[row])


@pytest.mark.parametrize("size", [1, 3, 65, 1000, 20_000])
def test_kept_sets_by_the_book(size: int) -> None:
    rng = np.random.default_rng(size)
    for trial in range(20):
        scores = (rng.normal(size=size) * rng.choice([0.1, 2.0, 8.0])).astype(np.float32)
        if trial % 2:
            scores = np.round(scores)  # many ties
        top_k = int(rng.choice([0, 1, 2, 40, 300, size, 10 * size]))
        top_p = float(rng.choice([0.01, 0.5, 0.8, 0.95, 1.0]))
        config = GenerationConfig(temperature=1.0, top_k=top_k, top_p=top_p, repetition_penalty=1.0)
        got = sampling.process(scores, [], config)
        kept = np.flatnonzero(got > -np.inf)
        assert set(kept.tolist()) == slow_kept(scores, top_k, top_p), (size, trial, top_k, top_p)
        np.testing.assert_array_equal(got[kept], scores[kept])


def test_every_count_of_largest_values() -> None:
    values = np.random.default_rng(3).integers(0, 50, 5000).astype(np.float32)
    for count in (1, 2, 7, 19, 20, 78, 79, 1249, 1251, 4999, 5000):
        np.testing.assert_array_equal(sampling._largest(values, count), np.sort(values)[::-1][:count])


def test_penalty_once_a_token_and_by_sign() -> None:
    scores = np.array([2.0, -2.0, 0.0, 1.0], dtype=np.float32)
    config = GenerationConfig(**{**PLAIN, "repetition_penalty": 2.0})
    got = sampling.process(scores, [0, 0, 1, 1, 1, 2, -1, 4, 10**12], config)
    np.testing.assert_array_equal(got, [1.0, -4.0, 0.0, 1.0])
    np.testing.assert_array_equal(scores, [2.0, -2.0, 0.0, 1.0], "the logits given are not changed")


def test_greedy_ignores_temperature_and_filters_but_not_the_penalty() -> None:
    scores = np.array([3.0, 2.9, -1.0], dtype=np.float32)
    for config in (
        GenerationConfig(do_sample=False, top_k=1, temperature=0.1, repetition_penalty=1.5),
        GenerationConfig(temperature=0.0, top_k=1, repetition_penalty=1.5),
    ):
        got = sampling.process(scores, [0], config)
        np.testing.assert_allclose(got, [2.0, 2.9, -1.0])
        assert sampling.choose(got, config, np.random.default_rng(0))[0] == 1


def test_greedy_tie_goes_to_the_lowest_id() -> None:
    config = GenerationConfig(do_sample=False, repetition_penalty=1.0)
    token, logprob = sampling.choose(np.array([0, 1, 1, 1], dtype=np.float32), config, np.random.default_rng(0))
    assert token == 1
    assert logprob == pytest.approx(1 - np.log(3 * np.e + 1))


def test_ids_that_are_not_allowed_never_come_out() -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(size=320).astype(np.float32)
    allowed = np.ones(320, dtype=bool)
    allowed[[int(logits.argmax()), 300, 319]] = False
    for config in (
        GenerationConfig(**PLAIN),
        GenerationConfig(do_sample=False),
        GenerationConfig(repetition_penalty=0.5),
    ):
        scores = sampling.process(logits, [300], config, allowed=allowed)
        assert np.isneginf(scores[~allowed]).all()
        assert all(allowed[sampling.choose(scores, config, rng)[0]] for _ in range(200))


def test_draws_follow_the_probabilities() -> None:
    scores = np.log(
        np.array([0.5, 0.3, 0.0, 0.2], dtype=np.float32),
        where=[True, True, False, True],
        out=np.full(4, -np.inf, np.float32),
    )
    config = GenerationConfig(**PLAIN)
    rng = np.random.default_rng(11)
    drawn = [sampling.choose(scores, config, rng) for _ in range(20_000)]
    counts = np.bincount([token for token, _ in drawn], minlength=4) / len(drawn)
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.0, 0.2], atol=0.015)  # 4 standard deviations of 0.0035
    assert {token: round(float(np.exp(logprob)), 4) for token, logprob in drawn} == {0: 0.5, 1: 0.3, 3: 0.2}


def test_a_draw_takes_one_number_whatever_is_kept() -> None:
    config = GenerationConfig(**PLAIN)
    one, many = np.random.default_rng(7), np.random.default_rng(7)
    for _ in range(5):
        sampling.choose(np.array([0.0, -np.inf], dtype=np.float32), config, one)
        sampling.choose(np.zeros(1000, dtype=np.float32), config, many)
    assert one.random() == many.random()


def test_generator_of_a_step() -> None:
    first = sampling.step_rng(3, 5).random()
    assert first == sampling.step_rng(3, 5).random()
    assert (
        len(
            {
                first,
                sampling.step_rng(3, 6).random(),
                sampling.step_rng(4, 5).random(),
                sampling.step_rng(-3, 5).random(),
            }
        )
        == 4
    )


def test_temperature_beyond_the_range_of_floats_leaves_the_best() -> None:
    for scores in ([-5.0, -7.0, -5.0], [5.0, 1.0, 5.0], [0.0, -1.0, 0.0]):
        config = GenerationConfig(**{**PLAIN, "temperature": 1e-45})
        got = sampling.process(np.array(scores, dtype=np.float32), [], config)
        np.testing.assert_allclose(softmax(got), [0.5, 0.0, 0.5])


def test_extreme_values_stay_silent_and_sound() -> None:
    logits = np.array([3e38, -3e38, 0.0], dtype=np.float32)
    for penalty in (1e-50, 1e-40, 0.5, 1.02, 3.0, 1e38):
        config = GenerationConfig(temperature=1.0, repetition_penalty=penalty)
        scores = sampling.process(logits, [1, 2], config)
        assert sampling.choose(scores, config, np.random.default_rng(0)) == (0, 0.0)


@pytest.mark.parametrize(
    ("logits", "history", "words"),
    [
        (np.zeros((2, 3, 4)), [], r"logits have shape \(2, 3, 4\); wanted is \(V,\) or \(B, V\)"),
        (np.zeros(0), [], "not empty"),
        (np.zeros((2, 3)), [[1]], "1 histories for 2 rows"),
        (np.array([0.0, np.nan]), [], "largest of 2 logits is nan.*moss-convert verify"),
        (np.array([0.0, np.inf]), [], "largest of 2 logits is inf"),
        (np.full(4, -np.inf), [], "largest of 4 logits is -inf"),
    ],
)
def test_errors(logits: Scores, history: list[int], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        sampling.process(logits, history, GenerationConfig())


def test_mask_of_another_length() -> None:
    with pytest.raises(ShapeError, match=r"mask of allowed ids has shape \(3,\); the logits ask for \(4,\)"):
        sampling.process(np.zeros(4), [], GenerationConfig(), allowed=np.ones(3, dtype=bool))


def test_nothing_allowed() -> None:
    with pytest.raises(ShapeError, match="largest of 4 logits is -inf"):
        sampling.process(np.zeros(4), [], GenerationConfig(), allowed=np.zeros(4, dtype=bool))


def test_model_scores_are_the_logarithms_of_the_softmax() -> None:
    rng = np.random.default_rng(3)
    for size, count in ((1, 1), (7, 7), (500, 20), (500, 0)):
        logits = rng.normal(size=size).astype(np.float32) * 5
        logits[size // 2 :] = logits[: size - size // 2]  # with equals among them
        chosen = int(rng.integers(size))
        logprob, best = sampling.model_scores(logits, chosen, count)
        expected = np.log(softmax(logits))
        assert logprob == pytest.approx(expected[chosen], abs=1e-6)
        order = sorted(range(size), key=lambda i: (-logits[i], i))[:count]
        assert [i for i, _ in best] == order
        np.testing.assert_allclose([value for _, value in best], expected[order], atol=1e-6)


def test_model_scores_leave_out_what_is_not_allowed() -> None:
    allowed = np.array([True, False, True])
    logprob, best = sampling.model_scores([0.0, 9.0, 0.0], 0, 3, allowed=allowed)
    assert logprob == pytest.approx(np.log(0.5))
    assert [i for i, _ in best] == [0, 2]


def test_default_settings_are_quick_for_the_real_vocabulary() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=107_008).astype(np.float32) * 2
    history = rng.integers(0, 107_008, 2000).tolist()
    config = GenerationConfig()
    taken: list[float] = []
    for _ in range(30):
        start = time.perf_counter()
        sampling.choose(sampling.process(logits, history, config), config, rng)
        taken.append(time.perf_counter() - start)
    assert min(taken) < 0.01, f"{min(taken) * 1e3:.2f} ms; 0.8 ms was measured, and sorting everything takes 20"
