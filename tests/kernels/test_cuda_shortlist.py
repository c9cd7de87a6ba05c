"""The kernel that finds candidates: choosing among them gives what choosing among all logits gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cuda_sources import Kernels, kernels_of

from moss_jt import sampling
from moss_jt.config import GenerationConfig
from moss_jt.shortlist import FOUND, MOST, Shortlist, Wish, choose_from, read_found

Array = npt.NDArray[Any]
THREADS = 1024
CONFIGS = [
    GenerationConfig(do_sample=False, repetition_penalty=1.0),
    GenerationConfig(do_sample=False, repetition_penalty=1.3),
    GenerationConfig(temperature=0.7, top_k=40, top_p=0.8, repetition_penalty=1.02),
    GenerationConfig(temperature=1.5, top_k=1, top_p=1.0, repetition_penalty=1.0),
    GenerationConfig(temperature=0.01, top_k=256, top_p=0.999, repetition_penalty=0.5),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return kernels_of("shortlist", tmp_path_factory.mktemp("cuda"))


def find(kernels: Kernels, logits: Array, wishes: list[Wish], allowed: Array | None = None) -> list[Shortlist]:
    """Shortlists of rows of logits, which stay as they are."""
    rows, vocabulary = logits.shape
    scores, found = logits.copy(), np.zeros(rows, FOUND)
    past = [np.unique(np.array(wish.history, np.int32)) for wish in wishes]
    history = np.full((rows, max(1, *(len(ids) for ids in past))), -1, np.int32)
    for row, ids in zip(history, past, strict=True):
        row[: len(ids)] = ids
    penalties = np.array([wish.config.repetition_penalty for wish in wishes], np.float32)
    wanted = np.array([wish.wanted for wish in wishes], np.int32)
    mask = None if allowed is None else allowed.astype(np.uint8)
    arguments = (scores, mask, history, penalties, wanted, found, vocabulary, history.shape[1])
    kernels.launch("shortlist", (rows,), THREADS, arguments)
    return [read_found(each, lambda row=row: scores[row]) for row, each in enumerate(found)]  # type: ignore[misc]


@pytest.mark.parametrize("vocabulary", [3, 320, 1024, 5003])
def test_choices_are_those_among_all_logits(kernels: Kernels, vocabulary: int) -> None:
    random = np.random.default_rng(vocabulary)
    logits = (4 * random.normal(size=(len(CONFIGS), vocabulary))).astype(np.float32)
    logits[:, random.integers(0, vocabulary, vocabulary // 4)] = logits.max()  # ties
    allowed = random.random(vocabulary) < 0.8
    allowed[0] = True
    for mask in (None, allowed):
        wishes = [Wish(random.integers(0, vocabulary + 3, 50).tolist(), config) for config in CONFIGS]
        assert all(wish.wanted for wish in wishes)
        for row, (wish, shortlist) in enumerate(zip(wishes, find(kernels, logits, wishes, mask), strict=True)):
            scores = sampling.process(logits[row], wish.history, wish.config, allowed=mask)
            for seed in range(20):
                want = sampling.choose(scores, wish.config, np.random.default_rng(seed))
                got = choose_from(shortlist, wish.config, np.random.default_rng(seed))
                assert got[0] == want[0], (row, seed)
                assert got[1] == pytest.approx(want[1], abs=2e-6)


def test_few_candidates_of_many(kernels: Kernels) -> None:
    logits = np.random.default_rng(1).normal(size=(1, 20000)).astype(np.float32)
    (shortlist,) = find(kernels, logits, [Wish([], GenerationConfig(top_k=40))])
    assert 40 <= len(shortlist.ids) < 60
    assert set(np.argsort(-logits[0])[:40]) <= set(shortlist.ids.tolist())
    assert (np.diff(shortlist.ids) > 0).all()


def test_scores_that_a_division_makes_equal_are_all_there(kernels: Kernels) -> None:
    """Neighbouring floats may become one when they are divided by the temperature; top-k then keeps both."""
    logits = np.full((1, 600), -50, np.float32)
    value = np.float32(3.0)
    for place in range(0, 60, 3):
        logits[0, place] = value
        value = np.nextafter(value, np.float32(4))
    config = GenerationConfig(temperature=1.7, top_k=5, top_p=1.0, repetition_penalty=1.0)
    (shortlist,) = find(kernels, logits, [Wish([], config)])
    scores = sampling.process(logits[0], [], config)
    assert set(np.flatnonzero(np.isfinite(scores)).tolist()) <= set(shortlist.ids.tolist())
    for seed in range(50):
        want = sampling.choose(scores, config, np.random.default_rng(seed))
        assert choose_from(shortlist, config, np.random.default_rng(seed))[0] == want[0]


def test_more_than_can_be_given_are_read_in_full(kernels: Kernels) -> None:
    logits = np.zeros((1, 5000), np.float32)
    logits[0, :3] = -1
    config = GenerationConfig(temperature=0.7, top_k=5, repetition_penalty=1.5)
    (shortlist,) = find(kernels, logits, [Wish([0, 4999], config)])
    assert len(shortlist.ids) == 5000 > MOST
    scores = sampling.process(logits[0], [0, 4999], config)
    for seed in range(20):
        want = sampling.choose(scores, config, np.random.default_rng(seed))
        assert choose_from(shortlist, config, np.random.default_rng(seed))[0] == want[0]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_told(kernels: Kernels, wrong: float) -> None:
    logits = np.zeros((2, 700), np.float32)
    logits[1, 699] = wrong
    fine, broken = find(kernels, logits, [Wish([], CONFIGS[0])] * 2)
    assert not fine.is_broken and broken.is_broken


def test_what_cannot_be_shortlisted() -> None:
    assert Wish([], GenerationConfig(top_k=0)).wanted == 0
    assert Wish([], GenerationConfig(top_k=1000)).wanted == 0
    assert Wish([], GenerationConfig(top_k=40, temperature=1e9)).wanted == 0
    assert Wish([], GenerationConfig(do_sample=False, repetition_penalty=1e-60)).wanted == 0
