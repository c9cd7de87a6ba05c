"""The JSON files around a tokenizer, read with suspicion: ids, added tokens, special tokens.

A tokenizer's folder often comes from strangers. Everything that is read here is checked for its
kind, its size and against the other files before anything is built from it, and each complaint
names the file and the value.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_jt.errors import CheckpointError

MAX_FILE_BYTES = 256 << 20  # the published vocab.json has 2 MB
MAX_ID = (1 << 24) - 1  # the published vocabulary ends at 107007
MARKERS = ("<eoh>", "<eom>", "<eot>", "<eoc>", "<eor>")
END_OF_TEXT = "<|endoftext|>"

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_BRACKETS = {"<": ">", "[": "]", "{": "}"}


@dataclass(frozen=True)
class SpecialTokens:
    """What special_tokens_map.json and tokenizer_config.json say.

    Attributes:
        roles: "bos_token" and its like to the token's text; None where a file says null.
        names: the text of every special token.
        strips: for tokens registered as objects, whether white space to the left and to the
            right belongs to them; tokens not named here swallow both in the original's encoding.
    """

    roles: Mapping[str, str | None]
    names: frozenset[str]
    strips: Mapping[str, tuple[bool, bool]]


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer is made of, whatever its files are.

    Attributes:
        folder: where it was read.
        pieces: the bytes that each known id stands for.
        added: tokens that are cut out of a text before the rest is encoded.
        control: ids that text of a user must never become.
        bos_id: the beginning of a text, None where the files name none.
        eos_id: the end of an answer, None where the files name none.
        encode_text: text without added tokens -> ids, none of them in `control`; the flag says that
            the text continues earlier ids.
        drops_first_space: the encoder puts a space before a text, and decoding removes it.
        strips: as in SpecialTokens.
    """

    folder: Path
    pieces: Mapping[int, bytes]
    added: Mapping[str, int]
    control: frozenset[int]
    bos_id: int | None
    eos_id: int | None
    encode_text: Callable[[str, bool], list[int]]
    drops_first_space: bool
    strips: Mapping[str, tuple[bool, bool]]


def read_bytes(path: Path) -> bytes:
    """Read a file of a tokenizer.

    Raises:
        CheckpointError: it is missing, cannot be read, or is far too large.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a file. Fetch the tokenizer's files again.")
        if (size := status.st_size) > MAX_FILE_BYTES:
            raise CheckpointError(
                f"{path} has {size} bytes; no tokenizer file has more than {MAX_FILE_BYTES}. Fetch the file again."
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Fetch the tokenizer's files again, all of them.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Look at the file's rights.") from error


def read_text(path: Path) -> str:
    """Read a UTF-8 file of a tokenizer.

    Raises:
        CheckpointError: as `read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}. Fetch the file again."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: as `read_text`, or it is not one JSON object with distinct keys.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{path} has the key {twice!r} twice. Fetch the file again.")
        return table

    try:
        values = json.loads(read_text(path), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:  # ValueError also: a number of thousands of digits
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{path} cannot be read as JSON: {reason}. Fetch the file again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__} where an object was expected. Fetch it again.")
    return values


def check_ids(table: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Check that a table gives each token an id of its own.

    Raises:
        CheckpointError: an id is no whole number, negative, past any vocabulary, or given twice.
    """
    owner: dict[int, str] = {}
    for token, number in table.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= MAX_ID:
            raise CheckpointError(
                f"{path}: token {token!r} has the id {number!r}; wanted is a whole number from 0 to {MAX_ID}."
                " Fetch the file again."
            )
        if number in owner:
            raise CheckpointError(
                f"{path}: tokens {owner[number]!r} and {token!r} have the same id {number}. Fetch the file again."
            )
        if not token or _has_surrogate(token):
            raise CheckpointError(f"{path}: id {number} has the token {token!r}, which no text holds.")
        owner[number] = token
    return dict(table)


def _has_surrogate(text: str) -> bool:
    return not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text)


def read_added(folder: Path) -> dict[str, int]:
    """The added tokens of added_tokens.json and of tokenizer_config.json, where there are such files."""
    added: dict[str, int] = {}
    path = folder / "added_tokens.json"
    if path.exists():
        added = check_ids(read_json(path), path)
    path = folder / "tokenizer_config.json"
    entries = read_json(path).get("added_tokens_decoder", {}) if path.exists() else {}
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder is a {type(entries).__name__}; wanted is an object.")
    more: dict[str, Any] = {}
    for number, entry in entries.items():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not number.isdecimal() or len(number) > 9:
            raise CheckpointError(f"{path}: the entry {number!r} of added_tokens_decoder is not a token with its id.")
        more[content] = int(number)
    return join_ids(added, check_ids(more, path), path)


def join_ids(first: Mapping[str, int], second: Mapping[str, int], path: Path) -> dict[str, int]:
    """Put the tokens of `second`, read from `path`, beside those of `first`.

    Raises:
        CheckpointError: a token or an id means one thing here and another there.
    """
    owner = {number: token for token, number in first.items()}
    for token, number in second.items():
        if first.get(token, number) != number:
            raise CheckpointError(
                f"{path} gives {token!r} the id {number}, another file of the tokenizer {first[token]}."
            )
        if owner.get(number, token) != token:
            raise CheckpointError(
                f"{path} gives the id {number} to {token!r}; another file gives it to {owner[number]!r}."
            )
    return {**first, **second}


def read_specials(folder: Path) -> SpecialTokens:
    """Read which tokens are special; special_tokens_map.json has the last word.

    Raises:
        CheckpointError: a file is broken, or a special token is not text.
    """
    roles: dict[str, str | None] = {}
    names: set[str] = set()
    strips: dict[str, tuple[bool, bool]] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        values = read_json(path) if path.exists() else {}
        for role in _ROLES:
            if role in values:
                roles[role] = _take(values[role], path, role, strips)
        for key in _LISTS:
            listed = values.get(key) or []
            if not isinstance(listed, list | dict):
                raise CheckpointError(f"{path}: {key} is a {type(listed).__name__}; wanted is a list of tokens.")
            found = listed.values() if isinstance(listed, dict) else listed
            names.update(text for entry in found if (text := _take(entry, path, key, strips)))
        entries = values.get("added_tokens_decoder")
        for entry in entries.values() if isinstance(entries, dict) else ():
            if isinstance(entry, dict) and entry.get("special") is True:
                names.update(text for text in [_take(entry, path, "added_tokens_decoder", strips)] if text)
    names.update(text for text in roles.values() if text)
    return SpecialTokens(roles, frozenset(names), strips)


def _take(value: Any, path: Path, key: str, strips: dict[str, tuple[bool, bool]]) -> str | None:
    """The text of a special token given as a string, as an object or as null; notes an object's stripping."""
    if value is None:
        return None
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        text: str = value["content"]
        strips[text] = (value.get("lstrip") is True, value.get("rstrip") is True)
        return text
    if not isinstance(value, str):
        raise CheckpointError(f"{path}: {key} is {value!r:.80}; wanted is a token's text. Fetch the file again.")
    strips.pop(value, None)
    return value


def special_id(
    specials: SpecialTokens, role: str, ids: Mapping[str, int], folder: Path, default: int | None
) -> int | None:
    """The id of the token that plays `role`; `default` where the files do not speak of the role.

    Raises:
        CheckpointError: the token named is in no file.
    """
    if role not in specials.roles:
        return default
    name = specials.roles[role]
    if name is None:
        return None
    if name not in ids:
        raise CheckpointError(
            f"{folder}: {role} is {name!r}, which is in no vocabulary file of the folder. Is added_tokens.json missing?"
        )
    return ids[name]


def control_names(tokens: Iterable[str], specials: SpecialTokens) -> set[str]:
    """Of these tokens, the ones that steer a model rather than say something.

    They are the special ones, MOSS's end markers, and what looks like a marker: `<…>`, `[…]`, `{…}`.
    Runs of white space and plain words are not.
    """
    return {
        token
        for token in tokens
        if token in specials.names or token in MARKERS or (len(token) > 2 and _BRACKETS.get(token[0]) == token[-1])
    }
