"""A tokenizer without a single merge: 256 bytes, an end of text and MOSS's markers.

It lets a model of random weights be chatted with. The files have the form of the original's, so the
same reader takes both.
"""

from __future__ import annotations

import json
from typing import Any

END_OF_TEXT = "<|endoftext|>"
END_OF_MOSS = "<eom>"
CONTROL_TOKENS = ("<eoh>", END_OF_MOSS, "<eot>", "<eoc>", "<eor>")
BYTES = 256


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in the files of a byte-level BPE.

    Printable Latin-1 stands for itself; the other bytes take the characters from U+0100 on, in order.
    Source: Radford et al. 2019 (GPT-2), encoder.py, bytes_to_unicode.
    """
    own = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(BYTES) if byte not in own]
    return {byte: chr(byte) if byte in own else chr(BYTES + others.index(byte)) for byte in range(BYTES)}


def token_of_byte() -> dict[int, int]:
    """The id of each byte: printable bytes first, as in GPT-2's vocabulary."""
    characters = byte_characters()
    ordered = sorted(range(BYTES), key=lambda byte: (characters[byte] != chr(byte), byte))
    return {byte: token for token, byte in enumerate(ordered)}


def tokenizer_files(end_of_text: int, n_positions: int) -> dict[str, str]:
    """The files of the tokenizer: name -> contents.

    Args:
        end_of_text: its id; the markers follow from the next free id on, see `marker_ids`.
        n_positions: of the model.
    """
    characters = byte_characters()
    vocabulary = {characters[byte]: token for byte, token in token_of_byte().items()}
    vocabulary = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    vocabulary[END_OF_TEXT] = end_of_text
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_MOSS, "unk_token": END_OF_TEXT}
    others = [_added(name) for name in CONTROL_TOKENS if name != END_OF_MOSS]
    settings: dict[str, Any] = {
        "add_bos_token": False,
        "add_prefix_space": False,
        **{key: {"__type": "AddedToken", **_added(name)} for key, name in special.items()},
        "errors": "replace",
        "model_max_length": n_positions,
        "tokenizer_class": "MossTokenizer",
    }
    registered = {**{key: _added(name) for key, name in special.items()}, "additional_special_tokens": others}
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n",
        "added_tokens.json": json.dumps(marker_ids(end_of_text), indent=1) + "\n",
        "special_tokens_map.json": json.dumps(registered, indent=1) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=1) + "\n",
    }


def marker_ids(end_of_text: int) -> dict[str, int]:
    """The ids of MOSS's markers.

    The original has 38 runs of white space between the end of text (106028) and <eoh> (106067); a
    vocabulary as large as its own keeps its ids, a small one has no gap.
    """
    first = end_of_text + (39 if end_of_text > BYTES else 1)
    return {name: first + i for i, name in enumerate(CONTROL_TOKENS)}


def _added(name: str) -> dict[str, Any]:
    return {"content": name, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
