"""moss-tiny's tokenizer: SentencePiece, trained on the generated conversations.

What a small model must copy or compare is cut into pieces that never merge: each digit, each sign of a formula, each
Chinese character. What is always the same is one piece: the tags, the lines of the system prompt, the beginning of a
call, each clause of what it says, and each whole call of Search for something it knows of. So an answer is a few
tokens, what to say is decided at one of them, and most of what is computed in training goes to questions. Everything
else is learned pieces of words, and bytes for what was never seen.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from moss_jt.template import META_INSTRUCTION, TOOLS, Template, system_prompt
from moss_jt.tokenizer.files import MARKERS
from moss_tiny.intents import read_intents
from moss_tiny.thoughts import thoughts
from moss_tiny.turns import DISABLED, NOTHING_FOUND, PICTURE, RESULT, THOUGHTS, UNABLE, search_call
from moss_tiny.wordings import LANGUAGES

VOCABULARY = 7104
_SPACE = "\u2581"
_TAGS = ("<|Human|>:", "<|Inner Thoughts|>:", "<|Commands|>:", "<|Results|>:", "<|MOSS|>:")
_CALLS = ('Calculate("', 'Solve("', 'Search("', 'Text2Image("', '")', " =>", "<sup><|", "|></sup>", "<|", "|>")
_NAMES = (" None", "moss-jt", "moss-tiny", "moss-convert", "moss-moon", "--", "MOSS")
_SIGNS = (*"+-*/=^()!%,.;:'\"<>|×÷…", "\n")
_CLAUSE = re.compile(  # up to a mark that ends it, with that; what is left at the end
    r".*?[,.:;](?= |$)|.*?[，。：；！]|.+"
)
_SHORTEST_CLAUSE = 4  # characters; shorter ones are ordinary text
_FIRST_CHINESE, _LAST_CHINESE = "\u2e80", "\uffef"  # with full-width punctuation


def train_tokenizer(folder: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write tokenizer.model and the files that name its special tokens into a folder.

    Args:
        folder: it exists.
        records: conversations; what they say many times counts once.
    """
    texts = sorted({line for record in records for line in _lines(record)})
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=out,
        model_type="bpe",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=[symbol.replace(" ", _SPACE) for symbol in own_pieces(texts)],
        bos_id=1,
        eos_id=-1,
        unk_id=0,
        pad_id=-1,
        bos_piece="<|endoftext|>",
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    special = {"bos_token": "<|endoftext|>", "eos_token": "<eom>", "additional_special_tokens": list(MARKERS)}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n", "utf-8")


def own_pieces(texts: Iterable[str]) -> Sequence[str]:
    """The pieces that are given rather than learned, in a fixed order, none twice."""
    chinese = sorted({char for text in texts for char in text if _FIRST_CHINESE <= char <= _LAST_CHINESE})
    fixed = (*MARKERS, *_TAGS, *_prompt_lines(), *clauses(), *searches(), *_CALLS, *_NAMES, *_SIGNS)
    return tuple(dict.fromkeys((*fixed, *map(str, range(10)), *chinese)))


def clauses() -> list[str]:
    """The thoughts, and the clauses of everything that is said in fixed words; one within a sentence begins with its space."""
    fixed = (NOTHING_FOUND, PICTURE, RESULT, *THOUGHTS.values(), *DISABLED.values(), *UNABLE.values())
    said = [text for texts in fixed for text in texts.values()]
    said += [text for intent in read_intents() for text in intent.say.values()]
    found = [clause for text in said for clause in _CLAUSE.findall(text)]
    return [*thoughts(), *(clause for clause in found if len(clause) >= _SHORTEST_CLAUSE)]


def searches() -> list[str]:
    """The calls that look up what the product's pages say."""
    return [
        search_call(intent.query(language)) for intent in read_intents() if intent.product for language in LANGUAGES
    ]


def _prompt_lines() -> list[str]:
    """Every line that MOSS's system prompt may have."""
    form = Template("fields")
    whole = [system_prompt(form), *(system_prompt(form, [tool]) for tool in TOOLS)]
    lines = [*META_INSTRUCTION.splitlines(), *(line for text in whole for line in text.splitlines())]
    return [f"{line}\n" for line in lines]


def _lines(record: dict[str, Any]) -> Iterable[str]:
    """The texts of a conversation, line by line, without tags and markers."""
    for turn in record["chat"].values():
        for field in turn.values():
            body = field.partition("|>:")[2].rpartition("<eo")[0]
            yield from (line for line in body.split("\n") if line.strip())
