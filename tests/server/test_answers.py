"""Answers as they come: thoughts, calls, passes, and what begins anew."""

from __future__ import annotations

import pytest
from toy_engine import TOKENIZER

from moss_jt.messages import TokenEvent
from moss_jt.server.answers import Delta, Done, Restarted, Thoughts, Usage, split_thoughts
from moss_jt.server.openai_form import Choice
from moss_jt.tokenizer import load_tokenizer


def test_what_begins_anew_forgets_its_text_but_not_the_thoughts_before_it() -> None:
    choice, token = Choice(), TokenEvent(0, 5, -1.0)
    thoughts = Thoughts("hm", "None", ())
    for part in (thoughts, Delta("half", (token,)), Restarted(), Delta("whole", (token, token))):
        choice.take(part)
    choice.take(Done("length", Usage(new_tokens=2), ((5, 5),)))
    assert (choice.text, len(choice.tokens), choice.thoughts) == ("whole", 2, thoughts)
    assert (choice.reason, choice.usage.new_tokens) == ("length", 2)


@pytest.mark.parametrize(
    ("written", "thoughts", "commands"),
    [
        (' I see<eot>\n<|Commands|>: Search("x")<eoc>', "I see", 'Search("x")'),
        (" I see\n<|Commands|>: None<eoc>", "I see", "None"),
        (" I see<eot>", "I see", ""),
        ("", "", ""),
    ],
)
def test_thoughts_and_commands_are_told_apart(written: str, thoughts: str, commands: str) -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    ids = tokenizer.encode(written, allow_special=True)
    assert split_thoughts(tokenizer, ids) == (thoughts, commands)


def test_speed_needs_two_tokens() -> None:
    assert Usage(new_tokens=11, decode_s=2.0).tokens_per_s == 5.0
    assert Usage(new_tokens=1, decode_s=2.0).tokens_per_s == Usage(new_tokens=5).tokens_per_s == 0.0
