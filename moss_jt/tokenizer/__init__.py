"""Text to ids and back, one interface over byte-level BPE and SentencePiece.

Lossless: `decode(encode(text))` is `text`. The tokenizer of the original drops white space beside
runs of spaces, and puts spaces there when decoding; `strip_around_added=True` does the former, for
comparison.

Safe: text becomes a control token (`<eom>`, `<|endoftext|>`, …) only with `allow_special=True`.
Without it the same characters are encoded as the plain text that they are, and still come back.
Role tags (`<|Human|>:`) are ordinary text to MOSS and are not touched.

A lone surrogate, which UTF-8 has no bytes for, is read as U+FFFD; a surrogate pair as the character
that it means. An id without a token (the model has more rows than the tokenizer has tokens, and
callers make mistakes) decodes to U+FFFD, whatever its value.
"""

from __future__ import annotations

import os
from pathlib import Path

from moss_jt.errors import CheckpointError, ConfigError
from moss_jt.tokenizer.text import TextStream, Tokenizer

__all__ = ["TOKENIZER_FILES", "TextStream", "Tokenizer", "load_tokenizer"]

TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
)


def load_tokenizer(path: str | os.PathLike[str], *, strip_around_added: bool = False) -> Tokenizer:
    """Load the tokenizer of a model's folder, native or Hugging Face's.

    Looked for in this order: vocab.json with merges.txt, tokenizer.model, tokenizer.json.

    Args:
        path: the folder.
        strip_around_added: lose white space beside added tokens as the original does (it swallows
            line breaks next to an indentation). Only to compare with it.

    Raises:
        CheckpointError: there is no tokenizer, or one of its files is broken.
        ConfigError: `strip_around_added` for a SentencePiece tokenizer.
    """
    folder = Path(path)
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be read as the folder of a tokenizer: {error.strerror}. Is the path right?"
        ) from error
    if names & {"vocab.json", "merges.txt"}:
        from moss_jt.tokenizer.bpe import read_bpe

        return Tokenizer(read_bpe(folder), strip_around_added=strip_around_added)
    if "tokenizer.model" in names:
        from moss_jt.tokenizer.sentencepiece_model import read_sentencepiece

        if strip_around_added:
            raise ConfigError(
                f"strip_around_added=True is a habit of MOSS's byte-level tokenizer; {folder} has a SentencePiece"
                " tokenizer. Leave the option out."
            )
        return Tokenizer(read_sentencepiece(folder))
    if "tokenizer.json" in names:
        from moss_jt.tokenizer.bpe import read_tokenizer_json

        return Tokenizer(read_tokenizer_json(folder), strip_around_added=strip_around_added)
    raise CheckpointError(
        f"{folder} has no tokenizer: wanted are vocab.json with merges.txt, or tokenizer.model, or tokenizer.json;"
        f" found {', '.join(sorted(names)[:5]) or 'nothing'}. Copy them from the model's page."
    )
