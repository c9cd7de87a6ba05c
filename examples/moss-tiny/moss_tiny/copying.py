"""Small tasks of copying: repeating a text, remembering a name, describing a picture to the painter.

They are there because a model that small must be taught to copy: the same skill carries numbers into commands.
"""

from __future__ import annotations

import random

from moss_tiny.numbers import draw
from moss_tiny.sums import Task
from moss_tiny.wordings import Language, choose, read_blocks, texts


def draw_repeat(rng: random.Random, language: Language) -> tuple[str, str]:
    """A request to repeat something, and what is to be said."""
    block = read_blocks("copying.txt")["repeat"]
    if rng.random() < 0.5:
        said = " ".join(str(draw(rng, held=False)) for _ in range(rng.randint(1, 2)))
    else:
        joint = " " if language == "en" else ""
        said = joint.join(rng.choice(texts(block, "words", language)) for _ in range(rng.randint(1, 3)))
    return choose(rng, texts(block, "ask", language)).replace("{}", said), said


def draw_name(rng: random.Random, language: Language) -> tuple[tuple[str, str], tuple[str, str]]:
    """Somebody says a name and, later, asks for it: two questions with their answers."""
    block = read_blocks("copying.txt")["name"]
    name = rng.choice(texts(block, "words", language))
    tell, ask = (choose(rng, texts(block, key, language)) for key in ("tell", "ask"))
    greet, recall = (texts(block, key, language)[0] for key in ("greet", "recall"))
    return (tell.replace("{}", name), greet.replace("{}", name)), (ask, recall.replace("{}", name))


def draw_picture(rng: random.Random, language: Language) -> Task:
    """A wish for a picture."""
    block = read_blocks("copying.txt")["picture"]
    thing = choose(rng, texts(block, "words", language))
    return Task(choose(rng, texts(block, "ask", language)).replace("{}", thing), f'Text2Image("{thing}")')
