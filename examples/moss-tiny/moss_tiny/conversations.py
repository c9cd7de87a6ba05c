"""Whole conversations: system prompt, then turns.

With tools they are in the five-field form of MOSS's training data; without, mostly in the README's form, which is
what a chat without tools sends to moss-tiny.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from moss_jt.template import Template, Turn, system_prompt
from moss_jt.tools.tool import Hit
from moss_tiny.copying import draw_name, draw_picture, draw_repeat
from moss_tiny.equations import draw_equation
from moss_tiny.intents import Intent, read_intents
from moss_tiny.results import Search
from moss_tiny.roughness import JOINED, MIXED, blurred, blurred_around, mixed, noisy, rough, wrapped
from moss_tiny.sums import Task, draw_following, draw_pair, draw_sum
from moss_tiny.turns import Answered, Tools, lost_turn, plain_turn, search_turn, task_turn
from moss_tiny.wordings import LANGUAGES, Language, expand

FIELDS, README = Template("fields"), Template("readme")
TOOL_SETS: tuple[tuple[tuple[str, ...], int], ...] = (  # what is on in a conversation, with its weight
    ((), 195),
    (("calc", "solve"), 45),
    (("search", "calc", "solve"), 70),
    (("search", "calc", "solve", "draw"), 4),
    (("calc",), 5),
    (("solve",), 3),
    (("search",), 12),
    (("draw",), 2),
    (("calc", "solve", "draw"), 3),
)
KINDS_PLAIN = {"product": 44, "small": 38, "sum": 5, "equation": 2, "picture": 2, "repeat": 4, "name": 2}
KINDS_TOOLS = {"product": 20, "small": 20, "sum": 46, "pair": 4, "equation": 18, "picture": 2, "repeat": 3, "name": 1}
KINDS_SEARCH = {**KINDS_TOOLS, "product": 43, "small": 39}
PICTURES = 15  # instead of 2 where they can be drawn
TURNS = (1, 1, 1, 2, 2, 3)  # of a conversation, in tasks; some tasks take more than one turn
SHOWN = (1, 1, 1, 2, 3)  # hits of a search that are shown: any of them, so that the answer must be looked for
SNIPPETS = 0.88  # of searches, those that show parts of passages, which cost less to learn from
SNIPPET = (24, 96)  # characters of a part
CUT = 0.6  # of conversations that end with a call, those that end there: what to call costs little to learn
IN_FIELDS = 0.1  # of conversations without tools, those in the five-field form all the same
FOLLOWED = 0.4  # of calculations, those that a next question goes on with
AFRESH = 0.25  # of calculations, those after which another one is asked that has nothing to do with the result
SWITCHED = 0.08  # of turns, those in the other language

_FIELD = re.compile(r"<\|(Human|Inner Thoughts|Commands|Results|MOSS)\|>:.*?<eo[htcrm]>\n", re.DOTALL)
_SIGNS = re.compile(r"[-+*/×÷=^]")  # where one stands, nothing may come between
_WRITTEN = re.compile(r'\("(.+?)"\)')  # in a call
_KEYS = {"Results": "Tool Responses"}


@dataclass(frozen=True)
class Maker:
    """Draws conversations.

    Attributes:
        search: what Search finds in the product's documentation.
    """

    search: Search

    def conversation(self, rng: random.Random) -> dict[str, Any]:
        """One conversation as a record of the training data."""
        tools = rng.choices([names for names, _ in TOOL_SETS], weights=[weight for _, weight in TOOL_SETS])[0]
        language = rng.choice(LANGUAGES)
        turns: list[Turn] = []
        for _ in range(rng.choice(TURNS)):
            spoken = LANGUAGES[LANGUAGES.index(language) - 1] if rng.random() < SWITCHED else language
            turns += self.turns(rng, spoken, tools)
        form = FIELDS if tools or rng.random() < IN_FIELDS else README
        return as_record(turns, tools, form, is_cut=rng.random() < CUT)

    def turns(self, rng: random.Random, language: Language, tools: Tools) -> Iterator[Turn]:
        """The turns of one task."""
        kinds = KINDS_TOOLS if {"calc", "solve"} & set(tools) else KINDS_PLAIN
        if "search" in tools:
            kinds = KINDS_SEARCH
        if "draw" in tools:
            kinds = {**kinds, "picture": PICTURES}
        kind = rng.choices(list(kinds), weights=list(kinds.values()))[0]
        if kind in ("product", "small"):
            yield self._talk(rng, language, tools, product=kind == "product")
        elif kind == "repeat":
            question, answer = draw_repeat(rng, language)
            yield plain_turn(question, answer, language, tools)
        elif kind == "name":
            for question, answer in draw_name(rng, language):
                yield plain_turn(question, answer, language, tools)
        else:
            yield from _tasks(rng, kind, language, tools)

    def _talk(self, rng: random.Random, language: Language, tools: Tools, *, product: bool) -> Turn:
        """A question about the product, or small talk."""
        intents, weights = _intents(product=product)
        (intent,) = rng.choices(intents, weights)
        if rng.random() < MIXED:
            question = mixed(rng, lambda: intent.question(rng, language), language)
        else:
            question = intent.question(rng, language)
        question = rough(rng, question, language)
        if rng.random() < JOINED:
            question += {"en": " ", "zh": ""}[language] + rough(rng, intent.question(rng, language), language)
        if "search" in tools and product:
            return search_turn(intent, question, language, some_hits(rng, self.search))
        if "search" in tools and intent.name == "unknown":
            return lost_turn(question, language, some_hits(rng, self.search))
        return plain_turn(question, intent.say[language], language, tools)


def some_hits(rng: random.Random, search: Search) -> Search:
    """A search that shows some of the hits or parts of them, in their order, and the same when it is asked again."""

    @cache
    def found(query: str) -> Sequence[Hit]:
        hits = search(query)
        shown = sorted(rng.sample(range(len(hits)), min(rng.choice(SHOWN), len(hits))))
        is_cut = rng.random() < SNIPPETS
        return [snippet(rng, hits[number]) if is_cut else hits[number] for number in shown]

    return found


def snippet(rng: random.Random, hit: Hit) -> Hit:
    """A part of what a hit says."""
    length = rng.randint(*SNIPPET)
    start = rng.randint(0, max(0, len(hit.text) - length))
    return replace(hit, text=hit.text[start : start + length].strip() or hit.text)


def write_conversations(path: Path, maker: Maker, *, numbers: range, seed: int) -> None:
    """Write conversations, one a line; what one says depends on its number and the seed alone."""
    with path.open("w", encoding="utf-8") as file:
        for number in numbers:
            record = maker.conversation(random.Random(f"{seed}/{number}"))
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_records(path: Path, *, count: int) -> list[dict[str, Any]]:
    """The first conversations of a file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


def as_record(turns: list[Turn], tools: Tools, form: Template = FIELDS, *, is_cut: bool = False) -> dict[str, Any]:
    """A conversation in the form of the published training data; in the README form a turn has two fields.

    Args:
        turns: what is said.
        tools: that are on.
        form: of the turns.
        is_cut: leave away what follows a call in the last turn.
    """
    chat = {f"turn_{number}": _fields(form.turn_text(turn)) for number, turn in enumerate(turns, 1)}
    if is_cut and turns[-1].commands:
        last = chat[f"turn_{len(turns)}"]
        del last["Tool Responses"], last["MOSS"]
    return {"meta_instruction": system_prompt(form, tools), "num_turns": len(turns), "chat": chat}


@cache
def _intents(*, product: bool) -> tuple[list[Intent], list[float]]:
    """The intents of one sort, and how often each is asked: what is asked in more ways, more often."""
    found = [one for one in read_intents() if one.product == product]
    texts = [sum(len(expand(pattern)) for language in LANGUAGES for pattern in one.ask[language]) for one in found]
    return found, [count**0.5 for count in texts]


def _fields(text: str) -> dict[str, str]:
    """The fields of a turn with their tags and markers."""
    fields = {_KEYS.get(found[1], found[1]): found[0] for found in _FIELD.finditer(text)}
    assert "".join(fields.values()) == text, f"a turn that is not all fields: {text!r}"
    return fields


def _tasks(rng: random.Random, kind: str, language: Language, tools: Tools) -> Iterator[Turn]:
    """A task for a tool, and perhaps questions that go on with its result, or others right after it."""
    answered = _first(rng, kind, language, tools)
    yield answered.turn
    while answered.number is not None:
        chance = rng.random()
        if chance < FOLLOWED:
            another = task_turn(_going_on(rng, language, answered.number), language, tools)
        elif chance < FOLLOWED + AFRESH:
            another = _first(rng, "sum", language, tools)
        else:
            break
        if another is not None:
            answered = another
            yield answered.turn


def _first(rng: random.Random, kind: str, language: Language, tools: Tools) -> Answered:
    """A task whose result can be said; others are drawn again."""
    while True:
        answered = task_turn(_draw(rng, kind, language), language, tools)
        if answered is not None:
            return answered


def _draw(rng: random.Random, kind: str, language: Language) -> Task:
    draw = {"sum": draw_sum, "pair": draw_pair, "equation": draw_equation, "picture": draw_picture}[kind]
    task = draw(rng, language)
    return _typed(rng, task, language) if kind == "picture" else _spoiled(rng, task, language)


def _spoiled(rng: random.Random, task: Task, language: Language) -> Task:
    """A calculation or an equation as somebody might type it, perhaps with words that mean nothing to it."""
    if is_written(task):
        change = blurred_around
    elif not _SIGNS.search(task.question):
        change = blurred
    else:
        return _typed(rng, task, language)
    question = change(rng, task.question, lambda: _any_question(rng, language), language)
    return _typed(rng, replace(task, question=question), language)


def is_written(task: Task) -> bool:
    """Whether a question holds what its calls are given, sign by sign, however these are written."""
    question = task.question.replace(" ", "").replace("×", "*").replace("÷", "/")
    parts = [part for given in _WRITTEN.findall(task.command) for part in given.split(";")]
    return any(all(part in text for part in parts) for text in (question, question.replace("x", "*")))


def _going_on(rng: random.Random, language: Language, result: str) -> Task:
    return _spoiled(rng, draw_following(rng, language, result), language)


def _typed(rng: random.Random, task: Task, language: Language) -> Task:
    """A task with words too many, words around it, no capital."""
    is_fixed = is_written(task) or _SIGNS.search(task.question)
    question = task.question if is_fixed else noisy(rng, task.question, language)
    return replace(task, question=wrapped(rng, question, language))


def _any_question(rng: random.Random, language: Language) -> str:
    return rng.choice(read_intents()).question(rng, language)
