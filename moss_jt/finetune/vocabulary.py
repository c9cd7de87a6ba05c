"""New tokens for a model: in the tokenizer's files, and as rows of embedding and head.

A new row is the mean of the rows of the tokens that spelled the text until now, so the model starts from what it
knew; training does the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moss_jt.errors import ConfigError
from moss_jt.finetune.disk import writing
from moss_jt.finetune.export import copy_tokenizer
from moss_jt.finetune.parameters import Parameters
from moss_jt.finetune.start import Whole
from moss_jt.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer

_ADDED = "added_tokens.json"
_GROWING = ("transformer.wte.weight", "lm_head.weight", "lm_head.bias")


def read_tokens(file: Path) -> list[str]:
    """The tokens in a file, one a line.

    Raises:
        ConfigError: it cannot be read, or names a token twice.
    """
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--new_tokens {file} cannot be read as UTF-8 text: {error}.") from error
    tokens = [line for line in lines if line]
    twice = {token for token in tokens if tokens.count(token) > 1}
    if twice or not tokens:
        raise ConfigError(
            f"--new_tokens {file} has {min(twice)!r} twice." if twice else f"--new_tokens {file} is empty."
        )
    return tokens


def new_ids(source: Path, tokens: Sequence[str]) -> dict[str, int]:
    """The ids of those of the tokens that a tokenizer does not have, after its last.

    Args:
        source: its folder.
        tokens: the wanted ones.
    """
    tokenizer, added = load_tokenizer(source), _added(source)
    wanted = [token for token in tokens if token not in added and not _is_token(tokenizer, token)]
    return {token: tokenizer.vocab_size + place for place, token in enumerate(wanted)}


def extend_tokenizer(source: Path, new: Mapping[str, int], target: Path) -> None:
    """Write the files of a tokenizer with more tokens; those that it has keep their ids.

    Args:
        source: its folder.
        new: tokens and their ids, see `new_ids`.
        target: folder to write; the files of an earlier tokenizer there are gone afterwards.

    Raises:
        ConfigError: both folders are the same.
        DiskError: the disk is full or fails.
        CheckpointError: a token cannot be one.
    """
    if target.exists() and target.samefile(source):
        raise ConfigError(
            f"--tokenizer {source} is where the tokenizer with --new_tokens is written. Copy it to another folder, or "
            "take another --output_dir."
        )
    text = json.dumps({**_added(source), **new}, ensure_ascii=False, indent=1) + "\n"
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            (target / name).unlink(missing_ok=True)
        copy_tokenizer(source, target)
        (target / _ADDED).write_text(text, "utf-8")
    load_tokenizer(target)  # refuses what cannot be a token


def _is_token(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a tokenizer makes one token of a text already, as it does of common words."""
    ids = tokenizer.encode(text, inside=True)
    return len(ids) == 1 and tokenizer.decode(ids) == text


def _added(folder: Path) -> dict[str, int]:
    """The tokens that were added to a tokenizer, and their ids."""
    file = folder / _ADDED
    found: dict[str, int] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return found


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
