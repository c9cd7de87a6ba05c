"""New tokens for a model: in the tokenizer's files, and as rows of embedding and head.

A new row is the mean of the rows of the tokens that spelled the text until now, so the model starts from what it
knew; training does the rest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moss_jt.errors import ConfigError
from moss_jt.finetune.disk import writing
from moss_jt.finetune.export import copy_tokenizer
from moss_jt.finetune.parameters import Parameters
from moss_jt.finetune.start import Whole
from moss_jt.tokenizer import Tokenizer, load_tokenizer

_ADDED = "added_tokens.json"
_GROWING = ("transformer.wte.weight", "lm_head.weight", "lm_head.bias")


def read_tokens(file: Path) -> list[str]:
    """The tokens in a file, one a line.

    Raises:
        ConfigError: it cannot be read, or names a token twice.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--new_tokens {file} cannot be read as UTF-8 text: {error}.") from error
    tokens = [line for line in lines if line]
    twice = {token for token in tokens if tokens.count(token) > 1}
    if twice or not tokens:
        raise ConfigError(
            f"--new_tokens {file} has {min(twice)!r} twice." if twice else f"--new_tokens {file} is empty."
        )
    return tokens


def extend_tokenizer(source: Path, tokens: Sequence[str], target: Path) -> dict[str, int]:
    """Write the files of a tokenizer with more tokens, after its last; those that it has keep their ids.

    Args:
        source: its folder.
        tokens: the new ones.
        target: folder to write.

    Returns:
        the ids of the tokens that are new.
    """
    tokenizer = load_tokenizer(source)
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(source, target)
        file = target / _ADDED
        added: dict[str, int] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        wanted = [token for token in tokens if token not in added]
        new = {token: tokenizer.vocab_size + place for place, token in enumerate(wanted)}
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps({**added, **new}, ensure_ascii=False, indent=1) + "\n", "utf-8")
        scratch.replace(file)
    load_tokenizer(target)  # refuses what cannot be a token
    return new


def with_rows(whole: Whole, tokenizer: Tokenizer, new: Mapping[str, int]) -> Whole:
    """A model with rows for new tokens; the model's other values stay.

    Args:
        whole: the model; rows that it has beyond its tokens are used first.
        tokenizer: before the tokens came.
        new: the tokens and their ids.
    """
    rows = max([whole.config.vocab_size, *(number + 1 for number in new.values())])
    old = whole.parameters
    parameters = Parameters(
        {name: (rows, *slot.shape[1:]) if name in _GROWING else slot.shape for name, slot in old.slots.items()}
    )
    for name, slot in old.slots.items():
        parameters.array(name)[: slot.shape[0]] = old.array(name)
    for token, number in new.items():
        spelled = tokenizer.encode(token, inside=True)
        for name in _GROWING:
            array = parameters.array(name)
            array[number] = np.mean(array[spelled], axis=0)
    return replace(whole, config=replace(whole.config, vocab_size=rows), parameters=parameters)
