"""Calculations: a question and the expression that the calculator must be given.

Wordings come from text/sums.txt, numbers from `numbers`. Everything is drawn either for training or, with `held`,
for the evaluation, and the two share neither wordings nor numbers from 10 on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from moss_tiny.numbers import draw, draw_decimal
from moss_tiny.thoughts import thought
from moss_tiny.wordings import Language, choose, expand, read_blocks, read_plain_blocks, texts

KINDS = {  # what is asked for in words, with its weight
    "add": 5,
    "subtract": 6,
    "multiply": 6,
    "divide": 6,
    "percent": 4,
    "power": 2,
    "square": 2,
    "cube": 1,
    "root": 2,
    "factorial": 1,
}
FOLLOWING = {"and-add": 3, "and-subtract": 3, "and-multiply": 4, "and-divide": 3, "and-square": 1, "and-root": 1}
SHAPES = {  # of written expressions, with their weight
    "{a}+{b}": 5,
    "{a}-{b}": 5,
    "{a}*{b}": 6,
    "{a}/{b}": 5,
    "{a}+{b}+{c}": 1,
    "{a}*{b}+{c}": 1,
    "{a}+{b}*{c}": 1,
    "({a}+{b})*{c}": 1,
    "({a}-{b})*{c}": 1,
    "({a}+{b})/{c}": 1,
    "{a}*({b}-{c})": 1,
    "{a}*({b}+{c})": 1,
    "{a}-{b}-{c}": 1,
    "{a}^{n}": 1,
}
LARGEST = {"percent": 99, "power": 99, "square": 999, "cube": 99}  # of the first number, else results grow long
PLAIN_SHARE = 0.25  # of wordings, those in the plain words that the file begins with
PLAINEST_SHARE = 0.16  # of calculations, the four kinds in the plainest words: among so many others they become rare
_PLAINEST = ("add", "subtract", "multiply", "divide")
PIECED = 0.2  # of tasks in words, those whose wording is made of parts of several
PIECES = 4  # wordings that such a one may take parts of, besides its own; those with another order of numbers give none
SMALL_SHARE = 0.3  # of those calculations, the ones with numbers below 100: "What is 6 times 7?"
_WRITTEN_SHARE = 0.2  # of questions with a written expression rather than words
_HELD_WRITTEN_SHARE = 0.45  # the same in the evaluation, whose questions stay the same
_FRAMED_SHARE = 0.35  # of questions in words, those that are "What is …?"
_PLACE = re.compile(r"(\{[a-z]\})")
_TIMES = ("*", "*", "×", "x")
_OVER = ("/", "/", "÷")


@dataclass(frozen=True)
class Task:
    """A question for a tool.

    Attributes:
        question: what the user says.
        command: the call that answers it, `Calculate("37*489")`.
        thought: before the call of the calculator or the solver; "" for other tools.
    """

    question: str
    command: str
    thought: str = ""


def draw_sum(rng: random.Random, language: Language, *, held: bool = False) -> Task:
    """A calculation."""
    if not held and rng.random() < PLAINEST_SHARE:
        return _plainest(rng, language)
    if rng.random() < (_HELD_WRITTEN_SHARE if held else _WRITTEN_SHARE):
        expression = draw_expression(rng, held=held)
        question = fill(frame(rng, language, held=held), {"e": spelled(rng, expression)})
        return Task(question, call(expression), thought("written", "", language))
    kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
    values = _values(rng, held=held) | _limited(rng, kind, held=held)
    return task_in_words("sums.txt", kind, _in_words(rng, language, kind, held=held), values, language)


def _plainest(rng: random.Random, language: Language) -> Task:
    """What most people ask: "What is 37 times 489?"."""
    kind, blocks = rng.choice(_PLAINEST), read_plain_blocks("sums.txt")
    words = choose(rng, texts(blocks[kind], "words", language))
    sentence = choose(rng, texts(blocks["frames"], "ask", language)).replace("{e}", words)
    values = _values(rng, held=False)
    if rng.random() < SMALL_SHARE:
        values |= {name: str(draw(rng, held=False, most=99)) for name in "ab"}
    return task_in_words("sums.txt", kind, sentence, values, language)


def draw_pair(rng: random.Random, language: Language, *, held: bool = False) -> Task:
    """Two calculations in one question."""
    first, second = (draw_expression(rng, held=held) for _ in range(2))
    both = {"en": "{e} and {f}", "zh": rng.choice(("{e}和{f}", "{e}以及{f}"))}[language]
    question = fill(frame(rng, language, held=held).replace("{e}", both), {"e": first, "f": second})
    return Task(question, f"{call(first)}, {call(second)}", thought("pair", "", language))


def draw_following(rng: random.Random, language: Language, result: str, *, held: bool = False) -> Task:
    """A question that goes on with the last result, which is positive: "and times 3?"."""
    kind = rng.choices(list(FOLLOWING), weights=list(FOLLOWING.values()))[0]
    values = {"r": result, "b": str(draw(rng, held=held, least=2, most=999))}
    question = story(rng, "sums.txt", kind, language, held=held)
    return task_in_words("sums.txt", kind, question, values, language)


def task_in_words(file: str, kind: str, question: str, values: Mapping[str, str], language: Language) -> Task:
    """A task without a written expression; what may be swapped is called in the order of the question.

    Args:
        file: whose block of that kind has the call.
        kind: of task.
        question: with {a}, {b}, … where its numbers stand.
        values: of those.
        language: of the question.
    """
    block = read_blocks(file)[kind]
    command = texts(block, "command", language)[0]
    if "back" in block and question.index("{b}") < question.index("{a}"):
        command = block["back"][0]
    return Task(fill(question, values), fill(command, values), thought(kind, question, language))


def draw_expression(rng: random.Random, *, held: bool) -> str:
    """An expression as the calculator takes it, without spaces."""
    shape = rng.choices(list(SHAPES), weights=list(SHAPES.values()))[0]
    return fill(shape, _values(rng, held=held) | _limited(rng, "power" if "^" in shape else "", held=held))


def frame(rng: random.Random, language: Language, *, held: bool) -> str:
    """A sentence around an expression."""
    return wording(rng, "sums.txt", "frames", language, held=held)


def wording(rng: random.Random, file: str, name: str, language: Language, *, held: bool) -> str:
    """A text of a block for training, often one in plain words; or one of those that are held back."""
    if held:
        return choose(rng, texts(read_blocks(file)[name], "held", language))
    blocks = read_plain_blocks(file) if rng.random() < PLAIN_SHARE else read_blocks(file)
    return choose(rng, texts(blocks[name], "ask", language))


def story(rng: random.Random, file: str, name: str, language: Language, *, held: bool) -> str:
    """A wording of a task in words; for training, perhaps one made of parts of several that have their numbers in one order.

    What such parts have in common is the task alone, as in `roughness.mixed`.
    """
    pattern = wording(rng, file, name, language, held=held)
    if held or rng.random() >= PIECED:
        return pattern
    parts = _PLACE.split(pattern)
    for _ in range(PIECES):
        other = _PLACE.split(wording(rng, file, name, language, held=False))
        if parts[1::2] == other[1::2]:
            parts = [rng.choice(pair) for pair in zip(parts, other, strict=True)]
    pieced = "".join(parts)
    return pattern if _bare(pieced) in _held_back(file, name, language) else pieced


def _bare(wording: str) -> str:
    """Its words alone."""
    return "".join(char for char in wording.lower() if char.isalnum() or char in "{}")


@cache
def _held_back(file: str, name: str, language: Language) -> frozenset[str]:
    """The wordings of a block that must not be trained on, made bare."""
    held = texts(read_blocks(file)[name], "held", language)
    return frozenset(_bare(text) for pattern in held for text in expand(pattern))


def spelled(rng: random.Random, expression: str) -> str:
    """An expression as people write it: other signs, spaces."""
    text = expression.replace("*", rng.choice(_TIMES)).replace("/", rng.choice(_OVER))
    if rng.random() < 0.4:
        for sign in "+-*×x/÷":
            text = text.replace(sign, f" {sign} ")
    return text


def call(expression: str) -> str:
    """The call of the calculator."""
    return f'Calculate("{expression}")'


def fill(pattern: str, values: Mapping[str, str]) -> str:
    """Put values in the places {a}, {b}, …"""
    for name, value in values.items():
        pattern = pattern.replace("{" + name + "}", value)
    return pattern


def _in_words(rng: random.Random, language: Language, kind: str, *, held: bool) -> str:
    """A question without a written expression."""
    words = texts(read_blocks("sums.txt")[kind], "words", language)
    if held or rng.random() >= _FRAMED_SHARE:
        return story(rng, "sums.txt", kind, language, held=held)
    return frame(rng, language, held=False).replace("{e}", choose(rng, words))


def _values(rng: random.Random, *, held: bool) -> dict[str, str]:
    """Numbers for every place that a pattern may have; quotients often come out whole."""
    kind = rng.random()
    if kind < 0.12:
        a, b = draw_decimal(rng, held=held), draw_decimal(rng, held=held)
    elif kind < 0.2:
        a, b = draw_decimal(rng, held=held), str(draw(rng, held=held, most=999))
    else:
        a, b = str(draw(rng, held=held)), str(draw(rng, held=held, most=9999))
    return {
        "a": a,
        "b": b,
        "c": str(draw(rng, held=held, most=999)),
        "n": str(rng.randint(2, 9)),
        "f": str(rng.choice((10, 17)) if held else rng.choice((3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 18))),
    }


def _limited(rng: random.Random, kind: str, *, held: bool) -> dict[str, str]:
    """A first number in bounds, for kinds that have any."""
    return {"a": str(draw(rng, held=held, least=2, most=LARGEST[kind]))} if kind in LARGEST else {}
