"""How a request says that words are chosen, and what it leaves to the model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from moss_jt.config import GenerationConfig, MossConfig, Sampling
from moss_jt.server import schemas
from moss_jt.server.routes_openai import sampling_config


def chosen(config: MossConfig, **asked: Any) -> GenerationConfig:
    service = SimpleNamespace(
        speaker=SimpleNamespace(model=SimpleNamespace(config=config)),
        settings=SimpleNamespace(max_new_tokens=100, answer_s=None),
    )
    return sampling_config(service, schemas.Sampling(**asked), 9)  # type: ignore[arg-type]


def test_what_was_not_asked_is_the_models_own() -> None:
    model = replace(MossConfig(), sampling=Sampling(do_sample=False, repetition_penalty=1.0))
    config = chosen(model, seed=3)
    assert (config.greedy, config.repetition_penalty, config.seed, config.max_new_tokens) == (True, 1.0, 3, 9)
    asked = chosen(model, temperature=0.9, top_p=0.5)
    assert (asked.greedy, asked.temperature, asked.top_p, asked.repetition_penalty) == (False, 0.9, 0.5, 1.0)


def test_a_model_that_says_nothing_is_asked_as_moss() -> None:
    config = chosen(MossConfig(), seed=3)
    assert config == GenerationConfig(seed=3, max_new_tokens=9)
