"""moss-tiny's tokenizer: what must be copied is in single pieces, what is always the same is one, all text comes back."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from moss_tiny.conversations import FIELDS, README, Maker
from moss_tiny.pieces import VOCABULARY, clauses, searches, train_tokenizer

from moss_jt.template import TOOLS, Turn, system_prompt
from moss_jt.tokenizer import Tokenizer, load_tokenizer
from moss_jt.tokenizer.files import MARKERS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One that is trained on few conversations."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    maker = Maker(lambda _query: ())
    train_tokenizer(folder, [maker.conversation(random.Random(f"pieces/{number}")) for number in range(150)])
    return load_tokenizer(folder)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([number]) for number in tokenizer.encode(text)]


@pytest.mark.parametrize(
    "text",
    [
        "37*489",
        "3x+5=20",
        "  two  spaces\n\ttab",
        "加上 12.5 呢？",
        "ein Straßenname, 😀 und \u2581",
        "<eom> <|MOSS|>: <s>",
        "",
    ],
)
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.control_ids.isdisjoint(ids)


def test_digits_signs_and_chinese_characters_stand_alone(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "(1234+56.78)*9=x") == list("(1234+56.78)*9=x")
    assert pieces(tokenizer, "计算结果是多少？") == list("计算结果是多少？")
    call = pieces(tokenizer, 'Calculate("1024/16")')
    assert call == ['Calculate("', *"1024/16", '")']


def test_the_system_prompt_is_short(tokenizer: Tokenizer) -> None:
    for form, tools in ((README, ()), (FIELDS, ()), (FIELDS, tuple(TOOLS))):
        text = system_prompt(form, tools)
        assert pieces(tokenizer, text) == text.splitlines(keepends=True)


def test_what_is_always_said_is_one_piece(tokenizer: Tokenizer) -> None:
    assert len(set(clauses())) > 250
    assert len(searches()) == len(set(searches())) > 80
    for text in (*clauses(), *searches()):
        assert pieces(tokenizer, text) == [text]
    assert len(pieces(tokenizer, "How do I install moss-jt on this machine?")) > 4


def test_markers_and_tags_are_single_pieces(tokenizer: Tokenizer) -> None:
    assert set(tokenizer.markers) == set(MARKERS)
    assert tokenizer.eos_id == tokenizer.marker("<eom>")
    assert tokenizer.bos_id is not None
    assert tokenizer.vocab_size <= VOCABULARY
    ids = FIELDS.whole_turn(tokenizer, Turn("1", moss="2"))
    assert tokenizer.decode(ids) == FIELDS.turn_text(Turn("1", moss="2"))
    assert len(ids) == 5 * 3 + 2 + 3 + 2, "tag, marker and newline five times; texts of two pieces; three times None"
