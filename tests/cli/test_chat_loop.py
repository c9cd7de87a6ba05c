"""The loop of a chat where Ctrl-C comes at a bad moment."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted_chat import make

from moss_jt.cli import chat_loop
from moss_jt.cli.chat_commands import Talk, last_chat
from moss_jt.cli.chat_input import as_typed
from moss_jt.cli.chat_screen import Screen
from moss_jt.tokenizer import Tokenizer, load_tokenizer


class Typed:
    """Messages that somebody types one after the other."""

    def __init__(self, *lines: str) -> None:
        self._lines: Iterator[str] = iter(lines)

    def read(self) -> str | None:
        return next(self._lines, None)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(Path(__file__).parents[1] / "golden" / "tokenizer" / "c-addedtoken-specials")


def kept() -> list[tuple[str, str]]:
    return [(turn["human"], turn["answer"]) for turn in json.loads(last_chat().read_text())["turns"]]


def test_ctrl_c_before_any_text_leaves_the_conversation_that_is_kept(tokenizer: Tokenizer) -> None:
    screen = Screen(interactive=True, out=io.StringIO(), err=io.StringIO())
    session, _ = make(tokenizer, "Hello.")
    assert chat_loop.converse(Talk(session, screen), Typed("yesterday"))
    other, engine = make(tokenizer, "never")
    engine.interrupts.add((0, 0))
    assert chat_loop.converse(Talk(other, screen), Typed("today"))
    assert kept() == [("yesterday", "Hello.")]


def test_ctrl_c_while_an_answer_is_written_down_loses_neither_it_nor_the_chat(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    session, _ = make(tokenizer, "One.", "Two.", "Three.")
    save, calls = session.save, iter([False, True])

    def interrupted(path: Path) -> None:
        if next(calls, False):
            raise KeyboardInterrupt
        save(path)

    monkeypatch.setattr(session, "save", interrupted)
    talk = Talk(session, Screen(interactive=True, out=shown, err=io.StringIO()))
    assert chat_loop.converse(talk, Typed("1", "2"))
    assert kept() == [("1", "One."), ("2", "Two.")]
    assert chat_loop.converse(talk, Typed("3"))
    assert kept()[2:] == [("3", "Three.")]


def test_text_of_a_terminal_that_sends_gbk_is_read() -> None:
    assert as_typed("hi 你好") == "hi 你好"
    assert as_typed("hi 你好".encode("gbk").decode("utf-8", "surrogateescape")) == "hi 你好"
    assert as_typed("\ud800") == "\ud800", "neither"
