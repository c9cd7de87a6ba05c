"""SentencePiece: a `tokenizer.model` behind the same interface.

SentencePiece cuts its user-defined symbols out of every text, and would so let a user write a
control marker. The model file is a protocol buffer; before it is handed to the library, the
markers in it are turned into control pieces, which no text can become. moss_jt.tokenizer.text
then treats them like the added tokens of any tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_jt.errors import CheckpointError
from moss_jt.tokenizer.files import (
    Vocabulary,
    check_ids,
    control_names,
    join_ids,
    read_added,
    read_bytes,
    read_specials,
    special_id,
)

# Field numbers and piece types of sentencepiece_model.proto.
_PIECES, _NORMALIZER = 1, 3
_TEXT, _TYPE = 1, 3
_DUMMY_PREFIX, _EXTRA_SPACES, _ESCAPE_SPACES = 3, 4, 5
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_SPACE = "\u2581"  # written for a space in a piece
_BYTE_NAME = re.compile("<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd".encode()


@dataclass(frozen=True)
class _Piece:
    text: str
    kind: int
    start: int
    end: int


@dataclass(frozen=True)
class _ModelFile:
    """The parts of the file that matter here; `rest` is every top-level field but the pieces."""

    data: bytes
    pieces: list[_Piece]
    rest: bytes
    dummy_prefix: bool
    escapes_spaces: bool

    def rewritten(self, control: frozenset[int], *, inside: bool) -> bytes:
        """The file with these ids as control pieces; `inside`: without any care for leading spaces.

        A scalar field that comes twice has its last value, so the changes are appended.
        """
        parts: list[bytes] = []
        for number, piece in enumerate(self.pieces):
            body = self.data[piece.start : piece.end]
            if number in control and piece.kind != _CONTROL:
                body += bytes([_TYPE << 3, _CONTROL])
            parts += [b"\x0a", _varint(len(body)), body]
        parts.append(self.rest)
        if inside:
            parts.append(bytes([_NORMALIZER << 3 | 2, 4, _DUMMY_PREFIX << 3, 0, _EXTRA_SPACES << 3, 0]))
        return b"".join(parts)


def read_sentencepiece(folder: Path) -> Vocabulary:
    """Read tokenizer.model and, where present, the files of added and special tokens.

    Raises:
        CheckpointError: a file is broken, or they contradict each other.
    """
    path = folder / "tokenizer.model"
    model = _parse_model(read_bytes(path), path)
    ids = check_ids(_table(model, path), path)
    added, specials = read_added(folder), read_specials(folder)
    everything = join_ids(ids, added, folder / "added_tokens.json")
    symbols = [piece.text for piece in model.pieces if piece.kind in (_CONTROL, _USER_DEFINED)]
    names = control_names([*symbols, *added], specials) | (specials.names & ids.keys())
    names |= {piece.text for piece in model.pieces if piece.kind == _CONTROL}
    names -= {piece.text for piece in model.pieces if piece.kind in (_UNKNOWN, _BYTE)}
    control = frozenset(everything[name] for name in names)
    plain = _load(model.rewritten(control, inside=False), path)
    within = _load(model.rewritten(control, inside=True), path)
    pieces = {number: _bytes_of(piece, model.escapes_spaces) for number, piece in enumerate(model.pieces)}
    pieces |= {number: token.encode("utf-8") for token, number in added.items()}
    return Vocabulary(
        folder=folder,
        pieces=pieces,
        added={**added, **{name: everything[name] for name in names}},
        control=control,
        bos_id=special_id(specials, "bos_token", everything, folder, _or_none(plain.bos_id())),
        eos_id=special_id(specials, "eos_token", everything, folder, _or_none(plain.eos_id())),
        encode_text=_make_encoder(plain, within, _space_spelling(model)),
        drops_first_space=model.dummy_prefix,
        strips=specials.strips,
    )


def _make_encoder(plain: Any, within: Any, space: list[int]) -> Callable[[str, bool], list[int]]:
    """Give the function that encodes text; `space` spells U+2581, which else would come back as a space."""

    def encode_text(text: str, inside: bool) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(text.split(_SPACE) if space else [text]):
            if number:
                ids += space
            ids += (within if inside or number else plain).encode(part, out_type=int)
        return ids

    return encode_text


def _space_spelling(model: _ModelFile) -> list[int]:
    """The byte pieces of U+2581, empty where the model has none or does not use the character."""
    bytes_of = {piece.text: number for number, piece in enumerate(model.pieces) if piece.kind == _BYTE}
    wanted = [f"<0x{byte:02X}>" for byte in _SPACE.encode()]
    return [bytes_of[name] for name in wanted] if model.escapes_spaces and bytes_of.keys() >= set(wanted) else []


def _load(data: bytes, path: Path) -> Any:
    """Hand the model to the library."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=data)
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} is refused by sentencepiece: {error!s:.200}. Fetch the file again.") from error


def _or_none(number: int) -> int | None:
    return number if number >= 0 else None


def _table(model: _ModelFile, path: Path) -> dict[str, int]:
    """Text to id; every piece has its own text."""
    table = {piece.text: number for number, piece in enumerate(model.pieces)}
    if not table:
        raise CheckpointError(f"{path} holds no pieces. Is it a SentencePiece model?")
    if len(table) != len(model.pieces):
        twice = next(piece.text for number, piece in enumerate(model.pieces) if table[piece.text] != number)
        raise CheckpointError(f"{path} holds the piece {twice!r} twice. Fetch the file again.")
    return table


def _bytes_of(piece: _Piece, escapes_spaces: bool) -> bytes:
    """What a piece stands for in a text."""
    if piece.kind == _BYTE:
        return bytes([int(piece.text[3:5], 16)])
    if piece.kind == _UNKNOWN:
        return _REPLACEMENT
    if piece.kind in (_NORMAL, _USER_DEFINED) and escapes_spaces:
        return piece.text.replace(_SPACE, " ").encode("utf-8")
    return piece.text.encode("utf-8")


def _parse_model(data: bytes, path: Path) -> _ModelFile:
    """Walk the top level of the file."""
    pieces: list[_Piece] = []
    rest: list[bytes] = []
    switches = {_DUMMY_PREFIX: 1, _ESCAPE_SPACES: 1}
    try:
        for field, begin, start, end, value in _fields(data, 0, len(data)):
            if field == _PIECES and value is None:
                pieces.append(_parse_piece(data, start, end))
                continue
            if field == _NORMALIZER and value is None:
                switches |= {f: v for f, _, _, _, v in _fields(data, start, end) if f in switches and v is not None}
            rest.append(data[begin:end])
    except (ValueError, IndexError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{path} is not a SentencePiece model: {error}. Fetch the file again.") from error
    return _ModelFile(data, pieces, b"".join(rest), bool(switches[_DUMMY_PREFIX]), bool(switches[_ESCAPE_SPACES]))


def _parse_piece(data: bytes, start: int, end: int) -> _Piece:
    """One entry of the vocabulary."""
    text, kind = "", _NORMAL
    for field, _, first, last, value in _fields(data, start, end):
        if field == _TEXT and value is None:
            text = data[first:last].decode("utf-8")
        elif field == _TYPE and value is not None:
            kind = value
    if kind == _BYTE and not _BYTE_NAME.fullmatch(text):
        raise ValueError(f"the byte piece {text!r:.20} names no byte")
    return _Piece(text, kind, start, end)


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int, int | None]]:
    """The fields of a message: number, where its key begins, where its value lies, and the value of a varint."""
    at = start
    while at < end:
        begin = at
        key, at = _read_varint(data, at)
        value: int | None = None
        first = at
        if key & 7 == 0:
            value, at = _read_varint(data, at)
        elif key & 7 == 2:
            length, first = _read_varint(data, at)
            at = first + length
        elif key & 7 in (1, 5):
            at += 8 if key & 7 == 1 else 4
        else:
            raise ValueError(f"a field of unknown kind {key & 7} at offset {begin}")
        if at > end:
            raise ValueError(f"the field at offset {begin} ends at {at}, past its message's end {end}")
        yield key >> 3, begin, first, at, value


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A whole number of seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number at offset {at - 10} does not end")


def _varint(value: int) -> bytes:
    """The same, written."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
