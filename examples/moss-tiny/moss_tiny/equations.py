"""Equations and systems of two: a question and the call of the equation solver."""

from __future__ import annotations

import random

from moss_tiny.numbers import draw, is_held_back
from moss_tiny.sums import Task, fill, story, task_in_words, wording
from moss_tiny.thoughts import thought
from moss_tiny.wordings import Language

STORIES = ("some-plus", "some-minus", "some-times", "some-both", "cage")
SHAPES = {  # written equations, with their weight
    "{a}{v}+{b}={c}": 6,
    "{a}{v}-{b}={c}": 5,
    "{a}{v}={c}": 3,
    "{v}+{b}={c}": 3,
    "{v}-{b}={c}": 2,
    "{b}+{a}{v}={c}": 2,
    "{b}-{v}={c}": 1,
    "{v}/{a}={c}": 1,
    "{a}({v}+{b})={c}": 2,
    "{a}({v}-{b})={c}": 1,
    "{a}{v}+{b}={d}{v}+{c}": 2,
    "{a}{v}-{b}={d}{v}+{c}": 1,
    "{v}^2={c}": 2,
    "{v}^2+{b}{v}+{c}=0": 2,
    "{v}^2-{b}{v}+{c}=0": 2,
    "{v}^2+{b}{v}-{c}=0": 1,
    "{a}{v}^2+{b}{v}-{c}=0": 1,
}
SYSTEMS = {
    "x+y={b};x-y={c}": 4,
    "{a}x+y={b};x+{d}y={c}": 2,
    "{a}x+{d}y={b};x-y={c}": 2,
    "x+y={b};{a}x+{d}y={c}": 2,
    "{a}x+{d}y={b};{d}x-{a}y={c}": 1,
    "y={a}x;x+y={c}": 1,
    "x={a}y;x+y={c}": 1,
}
_STORY_SHARE = 0.3  # of equations, those that a story leads to
_HELD_STORY_SHARE = 0.2  # the same in the evaluation
_SYSTEM_SHARE = 0.2  # of equations, systems of two
_JOINTS = {"en": (" and ", ", ", "; "), "zh": ("，", "；", "和", ", ")}


def draw_equation(rng: random.Random, language: Language, *, held: bool = False) -> Task:
    """An equation, a system, or a story that leads to one."""
    kind = rng.random()
    stories = _HELD_STORY_SHARE if held else _STORY_SHARE
    if kind < stories:
        return _story(rng, language, held=held)
    if kind < stories + _SYSTEM_SHARE:
        equation = _filled(rng, SYSTEMS, "x", held=held)
        written = rng.choice(_JOINTS[language]).join(spelled(rng, part) for part in equation.split(";"))
        return Task(
            _framed(rng, "systems", language, written, "x", held=held), _call(equation), thought("system", "", language)
        )
    unknown = rng.choice(("x", "x", "x", "x", "y", "t", "n", "a", "z"))
    equation = _filled(rng, SHAPES, unknown, held=held)
    return Task(
        _framed(rng, "frames", language, spelled(rng, equation), unknown, held=held),
        _call(equation),
        thought("equation", "", language),
    )


def spelled(rng: random.Random, equation: str) -> str:
    """An equation as people write it: often with spaces."""
    if rng.random() < 0.5:
        return equation
    signs = "=" if rng.random() < 0.3 else "+-="
    for sign in signs:
        equation = equation.replace(sign, f" {sign} ")
    return equation


def _call(equation: str) -> str:
    return f'Solve("{equation}")'


def _story(rng: random.Random, language: Language, *, held: bool) -> Task:
    """A question in words."""
    kind = rng.choice(STORIES)
    values = _values(rng, held=held)
    heads = draw(rng, held=held, least=5, most=99)
    values |= {"h": str(heads), "l": str(_legs(rng, heads, held=held))}
    question = story(rng, "equations.txt", kind, language, held=held)
    return task_in_words("equations.txt", kind, question, values, language)


def _legs(rng: random.Random, heads: int, *, held: bool) -> int:
    """An even number of legs that so many chickens and rabbits may have."""
    while True:
        legs = draw(rng, held=held, least=2 * heads, most=4 * heads)
        if legs % 2 == 0:
            return legs


def _framed(rng: random.Random, frames: str, language: Language, written: str, unknown: str, *, held: bool) -> str:
    """A sentence around a written equation."""
    pattern = wording(rng, "equations.txt", frames, language, held=held)
    return fill(pattern, {"q": written, "v": unknown})


def _filled(rng: random.Random, shapes: dict[str, int], unknown: str, *, held: bool) -> str:
    shape = rng.choices(list(shapes), weights=list(shapes.values()))[0]
    return fill(shape, {**_values(rng, held=held), "v": unknown})


def _values(rng: random.Random, *, held: bool) -> dict[str, str]:
    """Coefficients; where the equation is linear, the solution is whole more often than by chance."""
    a = draw(rng, held=held, least=2, most=99)
    b = draw(rng, held=held, most=999)
    return {"a": str(a), "b": str(b), "c": str(_right_side(rng, a, b, held=held)), "d": str(rng.randint(2, 9))}


def _right_side(rng: random.Random, a: int, b: int, *, held: bool) -> int:
    """Mostly a*x + b for a small x, where that is a number for this use."""
    for _ in range(20):
        value = a * rng.randint(1, 30) + b
        if is_held_back(str(value)) == held and rng.random() < 0.8:
            return value
    return draw(rng, held=held, most=9999)
