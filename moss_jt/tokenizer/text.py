"""Tokenizer and TextStream: what happens around the encoder, the same for every kind of tokenizer.

Added tokens are cut out of a text here; what lies between them goes to the encoder of the files.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from moss_jt.errors import CheckpointError
from moss_jt.tokenizer.files import MARKERS, Vocabulary

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_REPLACEMENT = "\ufffd".encode()


class TextStream:
    """Ids one by one to text, in whole characters.

    What the pushes and the final `flush` give is together what `Tokenizer.decode` gives.
    """

    def __init__(self, vocabulary: Vocabulary, *, skip_special: bool = False) -> None:
        self._pieces = vocabulary.pieces
        self._control = vocabulary.control
        self._skipped = vocabulary.control if skip_special else frozenset()
        self._bos_id = vocabulary.bos_id
        self._drops_space = vocabulary.drops_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Take the next id; give the characters that are complete by now, often none."""
        if token_id in self._skipped:
            return ""
        piece = self._pieces.get(token_id, _REPLACEMENT)
        if self._drops_space and token_id != self._bos_id:
            self._drops_space = False
            piece = piece if token_id in self._control else piece.removeprefix(b" ")
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """End the text: a character cut in its middle becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


class Tokenizer:
    """A tokenizer as its files define it; made by `load_tokenizer`.

    Attributes:
        folder: where the files lie.
        markers: MOSS's end markers `<eoh>` `<eom>` `<eot>` `<eoc>` `<eor>` that the files know, by name.
        control_ids: the ids that text never becomes, unless allowed: specials, markers and their like.
        bos_id: the beginning of a text, None where the files name none.
        eos_id: the end of an answer, None where the files name none.
        vocab_size: the largest known id, plus 1. The model may have more rows.
    """

    def __init__(self, vocabulary: Vocabulary, *, strip_around_added: bool = False) -> None:
        self._vocabulary = vocabulary
        self._strips = strip_around_added
        self._every = dict(vocabulary.added)
        self._plain = {text: number for text, number in self._every.items() if number not in vocabulary.control}
        self._every_pattern = _pattern(self._every)
        self._plain_pattern = _pattern(self._plain)
        self.folder = vocabulary.folder
        self.markers: Mapping[str, int] = MappingProxyType(
            {name: self._every[name] for name in MARKERS if name in self._every}
        )
        self.control_ids = vocabulary.control
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.vocab_size = max(vocabulary.pieces) + 1

    def encode(self, text: str, allow_special: bool = False, *, inside: bool = False) -> list[int]:
        """Give the ids of a text; nothing is put before or after it.

        Args:
            text: any string.
            allow_special: read `<eom>` and its like as the tokens that they name. Never for text
                that comes from a user, a file or a tool.
            inside: the text continues earlier ids. It matters only to SentencePiece models that
                put a space before a text: in its middle they must not.
        """
        pattern, table = (self._every_pattern, self._every) if allow_special else (self._plain_pattern, self._plain)
        parts = [part for part in pattern.split(_whole_characters(text)) if part]
        if self._strips:
            _strip_around(parts, table, self._vocabulary.strips)
        ids: list[int] = []
        for part in parts:
            if part in table:
                ids.append(table[part])
                inside = inside or table[part] != self.bos_id  # a text begins after <s>
            elif part:
                ids += self._vocabulary.encode_text(part, inside)
                inside = True
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Give the text of ids; bytes that are no UTF-8 and ids without a token become U+FFFD.

        Args:
            ids: any whole numbers.
            skip_special: leave out the control tokens.
        """
        stream = self.stream(skip_special=skip_special)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, *, skip_special: bool = False) -> TextStream:
        """Begin to decode ids that come one at a time."""
        return TextStream(self._vocabulary, skip_special=skip_special)

    def marker(self, name: str) -> int:
        """The id of an end marker such as `<eom>`.

        Raises:
            CheckpointError: the tokenizer has no such token.
        """
        if name not in self.markers:
            known = " ".join(self.markers) or "none"
            raise CheckpointError(
                f"the tokenizer in {self.folder} has no token {name} (end markers that it has: {known}), and a"
                " conversation with MOSS needs it. Fetch added_tokens.json of a MOSS model again."
            )
        return self.markers[name]

    def piece(self, token_id: int) -> bytes:
        """The bytes that a token stands for, which need not be whole characters; those of U+FFFD for an unknown id."""
        return self._vocabulary.pieces.get(token_id, _REPLACEMENT)

    def is_known(self, token_id: int) -> bool:
        """Whether the id has a token."""
        return token_id in self._vocabulary.pieces

    def known_mask(self, size: int) -> npt.NDArray[np.bool_]:
        """Which of the ids 0 .. size-1 have a token, as a boolean array."""
        import numpy as np

        mask = np.zeros(size, dtype=bool)
        mask[[number for number in self._vocabulary.pieces if number < size]] = True
        return mask


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Split a text at tokens, keeping them; where several begin, the longest is meant."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _whole_characters(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates, if there are any."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _strip_around(parts: list[str], table: Mapping[str, int], strips: Mapping[str, tuple[bool, bool]]) -> None:
    """Remove white space beside tokens as the original tokenizer does; changes `parts`.

    A token keeps its neighbours whole only if the files register it as an object that says so. Going
    from left to right, a token of white space may itself vanish before its turn comes.
    """
    for at, part in enumerate(parts):
        if part not in table:
            continue
        left, right = strips.get(part, (True, True))
        if right and at + 1 < len(parts):
            parts[at + 1] = parts[at + 1].lstrip()
        if left and at:
            parts[at - 1] = parts[at - 1].rstrip()
