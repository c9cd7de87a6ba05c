"""The 200 questions of the evaluation: wordings and numbers that training never sees.

Half of the held-back questions of the intents are asked; the others are for trying things out, so that nothing need be
tuned on what is reported.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from moss_jt.template import Turn
from moss_tiny.equations import draw_equation
from moss_tiny.intents import Intent, read_intents
from moss_tiny.sums import Task, draw_following, draw_pair, draw_sum
from moss_tiny.turns import Answered, task_turn
from moss_tiny.wordings import LANGUAGES, Language, expand

Kind = Literal["sum", "pair", "following", "equation", "small", "product"]
Part = Literal["report", "trial"]

SEED = 2048
COUNTS: dict[Kind, int] = {"sum": 40, "pair": 4, "following": 12, "equation": 24, "small": 60, "product": 60}
TASKS: tuple[Kind, ...] = ("sum", "pair", "following", "equation")
_TOOLS = ("search", "calc", "solve")


@dataclass(frozen=True)
class Question:
    """A question and what makes its answer right.

    Attributes:
        kind: of what it asks.
        language: in which it is asked.
        text: the question.
        tools: that are on.
        wanted: the call, for a task; the fact that the answer must contain, for the rest.
        before: turns that came before it.
    """

    kind: Kind
    language: Language
    text: str
    tools: tuple[str, ...]
    wanted: str
    before: tuple[Turn, ...] = field(default=())

    @property
    def is_task(self) -> bool:
        """Whether a tool must be called."""
        return self.kind in TASKS

    def as_dict(self) -> dict[str, Any]:
        """For a line of JSON."""
        return asdict(self)


def make_questions(part: Part = "report") -> list[Question]:
    """The questions, always the same; those of the other part share none of their wordings with them."""
    rng = random.Random(f"{SEED}/{part}")
    found: list[Question] = []
    for kind, count in COUNTS.items():
        if kind in TASKS:
            found += [_task(rng, kind, LANGUAGES[number % 2]) for number in range(count)]
        else:
            found += _talk(rng, kind, count, part)
    return found


def held_back(intent: Intent, language: Language, part: Part) -> list[str]:
    """The held-back questions of an intent for one part: every second one."""
    every = [text for pattern in intent.held[language] for text in expand(pattern)]
    return every[0 if part == "report" else 1 :: 2]


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """Write them, one a line."""
    lines = [json.dumps(question.as_dict(), ensure_ascii=False) + "\n" for question in questions]
    path.write_text("".join(lines), "utf-8")


def _talk(rng: random.Random, kind: Kind, count: int, part: Part) -> list[Question]:
    """Questions about intents: as many different ones as there are, in both languages."""
    pool: list[tuple[Intent, Language, str]] = [
        (intent, language, text)
        for intent in read_intents()
        if intent.product == (kind == "product")
        for language in LANGUAGES
        for text in held_back(intent, language, part)
    ]
    chosen = sorted(rng.sample(range(len(pool)), min(count, len(pool))))
    return [
        Question(kind, language, text, _TOOLS if number % 3 == 2 else (), intent.fact[language])
        for number, (intent, language, text) in enumerate(pool[place] for place in chosen)
    ]


def _task(rng: random.Random, kind: Kind, language: Language) -> Question:
    """A question for a tool whose result exists."""
    while True:
        before: tuple[Turn, ...] = ()
        task = _draw(rng, kind, language)
        answered = task_turn(task, language, _TOOLS)
        if answered is None or not _fits(kind, answered):
            continue
        if kind == "following":
            assert answered.number is not None
            before, task = (answered.turn,), draw_following(rng, language, answered.number, held=True)
        return Question(kind, language, task.question, _TOOLS, task.command, before)


def _fits(kind: Kind, answered: Answered) -> bool:
    return kind != "following" or answered.number is not None


def _draw(rng: random.Random, kind: Kind, language: Language) -> Task:
    if kind == "equation":
        return draw_equation(rng, language, held=True)
    return draw_pair(rng, language, held=True) if kind == "pair" else draw_sum(rng, language, held=True)
