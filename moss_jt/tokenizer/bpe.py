"""Byte-level BPE: the tokenizer of the published MOSS models (GPT-2's kind, as CodeGen has it).

The files are read and checked here; the merging itself is done by Hugging Face's `tokenizers`,
which stays fast on a long run of Chinese without a space (one word to this kind of tokenizer).
Added tokens never reach it: moss_jt.tokenizer.text cuts them out first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moss_jt.errors import CheckpointError
from moss_jt.tokenizer.files import (
    END_OF_TEXT,
    MARKERS,
    SpecialTokens,
    Vocabulary,
    check_ids,
    control_names,
    join_ids,
    read_added,
    read_json,
    read_specials,
    read_text,
    special_id,
)

Merges = list[tuple[str, str]]


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in vocab.json.

    Bytes that print in Latin-1 stand for themselves, the other 68 for the characters from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(0x100 + hidden.index(byte)) for byte in range(256)]


def read_bpe(folder: Path) -> Vocabulary:
    """Read vocab.json, merges.txt and, where present, the files of added and special tokens.

    Raises:
        CheckpointError: a file is missing or broken, or they contradict each other.
    """
    path = folder / "vocab.json"
    vocab = check_ids(read_json(path), path)
    merges = _parse_merges(read_text(folder / "merges.txt"), folder / "merges.txt")
    _check_merges(merges, vocab, folder / "merges.txt")
    return _build(path, vocab, merges, added=read_added(folder), specials=read_specials(folder))


def read_tokenizer_json(folder: Path) -> Vocabulary:
    """Read tokenizer.json, the one file of the fast tokenizers, if it is byte-level BPE.

    Raises:
        CheckpointError: the file is broken or holds a tokenizer of another kind.
    """
    path = folder / "tokenizer.json"
    values = read_json(path)
    model, splitter = values.get("model"), values.get("pre_tokenizer")
    _check_kind(path, model, splitter, values.get("normalizer"))
    assert isinstance(model, dict), "checked above"
    vocab = check_ids(model["vocab"], path)
    merges = _parse_merge_list(model["merges"], path)
    _check_merges(merges, vocab, path)
    added: dict[str, Any] = {}
    special: set[str] = set()
    entries = values.get("added_tokens") or []
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or "id" not in entry:
            raise CheckpointError(f"{path}: {entry!r:.80} in added_tokens is not a token with its id.")
        if entry["content"] in added:
            raise CheckpointError(f"{path}: added_tokens holds {entry['content']!r} twice.")
        added[entry["content"]] = entry["id"]
        if entry.get("special") is True:
            special.add(entry["content"])
    added = join_ids(check_ids(added, path), read_added(folder), folder / "added_tokens.json")
    said = read_specials(folder)
    specials = SpecialTokens(said.roles, said.names | special, said.strips)
    return _build(path, vocab, merges, added=added, specials=specials)


def _check_kind(path: Path, model: Any, splitter: Any, normalizer: Any) -> None:
    """Raise unless tokenizer.json describes GPT-2's kind of tokenizer."""
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    parts_there = kind == "BPE" and isinstance(model.get("vocab"), dict) and isinstance(model.get("merges"), list)
    if not parts_there or model.get("byte_fallback") or model.get("continuing_subword_prefix"):
        raise CheckpointError(
            f"{path} holds a model of kind {kind!r}; only byte-level BPE with its merges is read here."
        )
    plain = (
        isinstance(splitter, dict) and splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True) is True
    )
    if not plain or normalizer is not None:
        raise CheckpointError(
            f"{path}: pre_tokenizer is {splitter!r:.80} and normalizer {normalizer!r:.40}; only GPT-2's ByteLevel without"
            " a normalizer is read here. Use the folder's vocab.json and merges.txt, or its tokenizer.model."
        )


def _parse_merges(text: str, path: Path) -> Merges:
    """Read merges.txt: a version line, then two tokens a line, the most frequent pair first."""
    merges: Merges = []
    for number, line in enumerate(text.split("\n"), 1):
        parts = line.split()
        if not parts or (number == 1 and line.startswith("#version")):
            continue
        if len(parts) != 2:
            raise CheckpointError(f"{path} line {number}: {line!r:.80} is not two tokens. Fetch the file again.")
        merges.append((parts[0], parts[1]))
    return merges


def _parse_merge_list(entries: list[Any], path: Path) -> Merges:
    """The merges of tokenizer.json, each "a b" or ["a", "b"]."""
    merges: Merges = []
    for entry in entries:
        parts = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise CheckpointError(f"{path}: the merge {entry!r:.80} is not two tokens. Fetch the file again.")
        merges.append((parts[0], parts[1]))
    return merges


def _check_merges(merges: Merges, vocab: Mapping[str, int], path: Path) -> None:
    """Raise unless both halves and the whole of every merge are in the vocabulary."""
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in vocab:
                raise CheckpointError(
                    f"{path}: the merge of {left!r} and {right!r} needs the token {token!r}, which the vocabulary lacks."
                    " Do the files belong together?"
                )


def _build(
    path: Path, vocab: dict[str, int], merges: Merges, *, added: Mapping[str, int], specials: SpecialTokens
) -> Vocabulary:
    """Join what was read; `path` is the file of the vocabulary."""
    folder = path.parent
    alphabet = byte_alphabet()
    missing = [byte for byte, character in enumerate(alphabet) if character not in vocab]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of the 256 byte tokens, the first for byte {missing[0]:#04x}; text with them"
            " could not be encoded. Is it the vocabulary of a byte-level tokenizer?"
        )
    beside = folder / "added_tokens.json"
    ids = join_ids(vocab, added, beside if beside.exists() else path)
    names = control_names(added, specials) | ((specials.names | {*MARKERS, END_OF_TEXT}) & vocab.keys())
    control = frozenset(ids[name] for name in names)
    values = dict.fromkeys(range(256), 0xFFFF) | {ord(character): byte for byte, character in enumerate(alphabet)}
    pieces = {number: _piece(token, values) for token, number in vocab.items()}
    pieces |= {number: token.encode("utf-8") for token, number in added.items()}
    byte_ids = [vocab[character] for character in alphabet]
    return Vocabulary(
        folder=folder,
        pieces=pieces,
        added={**added, **{name: ids[name] for name in names}},
        control=control,
        bos_id=special_id(specials, "bos_token", ids, folder, ids.get(END_OF_TEXT)),
        eos_id=special_id(specials, "eos_token", ids, folder, ids.get("<eom>", ids.get(END_OF_TEXT))),
        encode_text=_make_encoder(vocab, merges, _spellings(pieces, control, byte_ids)),
        drops_first_space=False,
        strips=specials.strips,
    )


def _piece(token: str, values: Mapping[int, int]) -> bytes:
    """The bytes that a token of the vocabulary stands for; with characters outside the alphabet it is plain text."""
    try:
        return token.translate(values).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode("utf-8")


def _spellings(pieces: Mapping[int, bytes], control: frozenset[int], byte_ids: list[int]) -> dict[int, list[int]]:
    """For each control id, the same text in byte tokens."""
    return {number: [byte_ids[byte] for byte in pieces[number]] for number in control}


def _make_encoder(
    vocab: dict[str, int], merges: Merges, spellings: dict[int, list[int]]
) -> Callable[[str, bool], list[int]]:
    """Give the function that encodes text in which added tokens have no meaning.

    Merging may arrive at a control token (where a vocabulary has its text among the merges): it
    is then spelled out in bytes.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

    def encode_text(text: str, inside: bool) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        if spellings.keys().isdisjoint(ids):
            return ids
        return [byte for number in ids for byte in spellings.get(number, [number])]

    return encode_text
