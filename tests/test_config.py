"""Both configs: what cannot work is refused where it is written, and what is written can be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moss_jt.config import GenerationConfig, MossConfig, Quantization
from moss_jt.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"top_k": 1.5}, "top_k is 1.5; it must be a whole number"),
        ({"top_k": -1}, "top_k is -1; it must be 0"),
        ({"max_new_tokens": "3"}, "max_new_tokens is '3'; it must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is True; it must be a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"temperature": None}, "temperature is None; it must be a number"),
        ({"temperature": float("nan")}, "temperature is nan; it must be a finite number"),
        ({"temperature": float("inf")}, "temperature is inf; it must be a finite number"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be above 0 and at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0; it must be above 0"),
        ({"max_time": "1"}, "max_time is '1'; it must be a number"),
        ({"stop_ids": 5}, "stop_ids is 5; it must be a list"),
        ({"stop_ids": [1.5]}, "it must be a list of token ids"),
        ({"stop_strings": "abc"}, "stop_strings is 'abc'; it must be a list of texts"),
        ({"stop_strings": [5]}, "it must be a list of texts"),
        ({"stop_strings": [""]}, "an empty stop string"),
    ],
)
def test_what_cannot_work_is_refused(values: dict[str, Any], words: str) -> None:
    """A negative seed was a traceback out of numpy, a text of stop strings was taken letter by letter."""
    with pytest.raises(ConfigError, match=words):
        GenerationConfig(**values)


def test_numbers_of_numpy_are_numbers() -> None:
    config = GenerationConfig(
        seed=np.int64(4),  # type: ignore[arg-type]
        top_k=np.int32(2),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        stop_ids=np.array([1, 2]),  # type: ignore[arg-type]
    )
    assert [type(value) for value in (config.seed, config.top_k, config.temperature)] == [int, int, float]
    assert config == GenerationConfig(seed=4, top_k=2, temperature=0.5, stop_ids=(1, 2))
    assert hash(config) == hash(GenerationConfig(seed=4, top_k=2, temperature=0.5, stop_ids=(1, 2)))


@pytest.mark.parametrize("head", [None, Quantization(8, 128), Quantization(4, -1)])
@pytest.mark.parametrize("blocks", [None, Quantization(4, 32)])
def test_a_quantised_head_needs_version_2_and_nothing_else_does(
    blocks: Quantization | None, head: Quantization | None
) -> None:
    config = MossConfig(quantization=blocks, head_quantization=head, dtype="float16", template="readme", name="m")
    values = config.to_dict()
    assert MossConfig.from_dict(values) == config
    assert values["moss_jt"]["version"] == config.format_version == (1 if head is None else 2)
    assert ("head_quantization" in values["moss_jt"]) == (head is not None)


@pytest.mark.parametrize("key", ["quantization", "head_quantization"])
@pytest.mark.parametrize(
    "value", [{"bits": 8}, {"bits": "8", "group_size": 128}, {"bits": True, "group_size": 8}, 8, [8]]
)
def test_a_broken_quantisation_is_named(key: str, value: Any) -> None:
    """A missing key was a KeyError."""
    values = MossConfig(head_quantization=Quantization(8, 128)).to_dict()
    values["moss_jt"][key] = value
    with pytest.raises(ConfigError, match=rf'"{key}" of the key "moss_jt" is .* it must hold bits and group_size'):
        MossConfig.from_dict(values)
    values["moss_jt"][key] = {"bits": 3, "group_size": 128}
    with pytest.raises(ConfigError, match=r"only 4 and 8"):
        MossConfig.from_dict(values)


def test_a_model_says_how_it_is_best_asked() -> None:
    ours = {"format": "moss-jt", "version": 1, "sampling": {"do_sample": False, "repetition_penalty": 1.0}}
    config = MossConfig.from_dict({"moss_jt": ours})
    assert MossConfig.from_dict(config.to_dict()).sampling == config.sampling
    asked = GenerationConfig.for_model(config, max_new_tokens=5)
    assert (asked.greedy, asked.repetition_penalty, asked.max_new_tokens) == (True, 1.0, 5)
    hotter = GenerationConfig.for_model(config, temperature=0.9)
    assert (hotter.greedy, hotter.temperature, hotter.repetition_penalty) == (False, 0.9, 1.0), "who gives one, draws"
    assert GenerationConfig.for_model(config, do_sample=True, repetition_penalty=1.1).repetition_penalty == 1.1
    assert GenerationConfig.for_model(config, do_sample=False, top_k=3).greedy


def test_a_model_that_says_nothing_is_asked_as_moss() -> None:
    assert GenerationConfig.for_model(MossConfig()) == GenerationConfig()
    assert "sampling" not in MossConfig().to_dict()["moss_jt"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("greedy", '"sampling" of the key "moss_jt" is \'greedy\'; it may hold do_sample, temperature'),
        ({"max_new_tokens": 5}, "it may hold do_sample, temperature"),
        ({"do_sample": 1}, "do_sample is 1; it must be true or false"),
        ({"temperature": -1}, "temperature is -1.0; it must be a finite number"),
    ],
)
def test_a_way_to_ask_that_cannot_work_is_refused(value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MossConfig.from_dict({"moss_jt": {"format": "moss-jt", "version": 1, "sampling": value}})
