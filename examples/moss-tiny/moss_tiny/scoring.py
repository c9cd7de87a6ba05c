"""Asking a model the questions of the evaluation, and telling right answers from wrong ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moss_jt.config import GenerationConfig
from moss_jt.errors import ToolError
from moss_jt.generation import generate
from moss_jt.template import answer_text, system_prompt
from moss_jt.tools.commands import Call
from moss_jt.tools.wording import NOTHING_RAN
from moss_tiny.conversations import FIELDS, README
from moss_tiny.questions import Question
from moss_tiny.results import Search, calls_of, results_of, value_of

if TYPE_CHECKING:
    from moss_jt.runner import Model

MOST_TOKENS = 120  # of an answer
GREEDY = GenerationConfig(do_sample=False, repetition_penalty=1.0, max_new_tokens=MOST_TOKENS)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_GROUPS = {"tool calls": ("sum", "pair", "following", "equation"), "small talk and documentation": ("small", "product")}


@dataclass(frozen=True)
class Given:
    """What a model gave.

    Attributes:
        question: that was asked.
        commands: it wrote; "" where no tool was on.
        answer: it gave; "" for a task, of which only the call counts.
        right: whether that is right.
    """

    question: Question
    commands: str
    answer: str
    right: bool


class Examiner:
    """Asks a model.

    Args:
        model: loaded.
        search: what Search finds.
        config: how it chooses words.
    """

    def __init__(self, model: Model, search: Search, config: GenerationConfig = GREEDY) -> None:
        self._model, self._search, self._config = model, search, config

    def ask(self, question: Question) -> Given:
        """Ask one question, with the tools that it wants on."""
        tokenizer = self._model.tokenizer
        form = FIELDS if question.tools else README
        ids = form.system_ids(tokenizer, system_prompt(form, question.tools))
        for turn in question.before:
            ids += form.whole_turn(tokenizer, turn)
        if not question.tools:
            return _judged(question, "", self._said(ids + form.open_turn(tokenizer, question.text)))
        ids += form.open_thoughts(tokenizer, question.text)
        thought = self._generated(ids, form.command_stop_ids(tokenizer))
        commands = tokenizer.decode(thought, skip_special=True).partition("<|Commands|>:")[2].strip()
        if question.is_task:
            return _judged(question, commands, "")
        ids += [*thought, *form.close_commands(tokenizer, thought, self._results(commands))]
        return _judged(question, commands, self._said(ids))

    def _results(self, commands: str) -> str:
        try:
            return results_of(commands, self._search) if calls_of(commands) else NOTHING_RAN
        except (ToolError, KeyError, ValueError):  # a call that cannot be run
            return NOTHING_RAN

    def _said(self, ids: Sequence[int]) -> str:
        """An answer."""
        generated = self._generated(ids, README.stop_ids(self._model.tokenizer))
        return answer_text(self._model.tokenizer.decode(generated, skip_special=True))

    def _generated(self, ids: Sequence[int], stop_ids: tuple[int, ...]) -> list[int]:
        config = replace(self._config, stop_ids=stop_ids)
        return [token.id for token in generate(self._model, list(ids), config)]


def _judged(question: Question, commands: str, answer: str) -> Given:
    if question.is_task:
        return Given(question, commands, answer, is_same_call(commands, question.wanted))
    return Given(question, commands, answer, question.wanted.lower() in answer.lower())


def is_same_call(commands: str, wanted: str) -> bool:
    """Whether commands call the same tools for the same thing.

    The text of an argument counts without its spaces. A calculation may also be another expression of the same
    numbers with the same value (6*7 for 7*6), a system may have its equations in another order.
    """
    found, right = calls_of(commands), calls_of(wanted)
    return len(found) == len(right) and all(map(_is_same, found, right))


def _is_same(found: Call, wanted: Call) -> bool:
    if found.name != wanted.name or len(found.arguments) != 1:
        return False
    a, b = ("".join(call.arguments[0].split()) for call in (found, wanted))
    if a == b:
        return True
    if found.name == "Solve":
        return sorted(re.split("[;,]", a)) == sorted(re.split("[;,]", b))
    return Counter(_NUMBER.findall(a)) == Counter(_NUMBER.findall(b)) and _value(a) == _value(b) != ""


def _value(expression: str) -> str:
    try:
        return value_of("Calculate", expression)
    except ToolError:
        return ""


def shares(given: Iterable[Given]) -> Mapping[str, tuple[int, int]]:
    """Right answers and questions, by kind and by group."""
    counts: dict[str, tuple[int, int]] = {}
    for one in given:
        groups = [name for name, kinds in _GROUPS.items() if one.question.kind in kinds]
        for key in (one.question.kind, *groups):
            right, asked = counts.get(key, (0, 0))
            counts[key] = (right + one.right, asked + 1)
    return counts
