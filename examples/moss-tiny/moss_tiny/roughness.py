"""Questions as people type them: in other words, with words around, words too many, without capitals or marks.

Words that mean nothing to the task teach the model to look for those that do.
"""

from __future__ import annotations

import random
import re
from functools import cache

from moss_tiny.wordings import Language, read_blocks, texts

WRAPPED = 0.3  # of questions, those with something before or behind
REWORDED = 0.5  # of questions in words, those in which words may be replaced
NOISY = 0.15  # of questions in words, those with a word too many
_NOT_NAMES = r"(?<![-/])(?<!moss-jt )(?<!moss-convert )"  # before a word: else it is an option or a command
_KEEP_CAPITAL = ("I ", "I'", "MO")


def rough(rng: random.Random, question: str, language: Language) -> str:
    """A question in words as somebody might type it."""
    return wrapped(rng, noisy(rng, reworded(rng, question, language), language), language)


def wrapped(rng: random.Random, question: str, language: Language) -> str:
    """Perhaps something before a question, something behind it, no capital, no mark at its end."""
    if rng.random() < WRAPPED:
        question = _between(rng, question, language)
    if rng.random() < 0.2:
        question = question.rstrip("?.!？。！")
    elif rng.random() < 0.1:
        question = question.translate({ord("？"): "?", ord("，"): ",", ord("。"): "."})
    if rng.random() < 0.2:
        question = question[:1].lower() + question[1:]
    return question or "?"


def noisy(rng: random.Random, question: str, language: Language) -> str:
    """Perhaps a word too many somewhere in a question."""
    if rng.random() >= NOISY:
        return question
    word = rng.choice(texts(read_blocks("wraps.txt")["wraps"], "noise", language))
    if language == "zh":
        place = rng.randint(0, len(question))
        cut = place if question[max(0, place - 1) : place + 1].isascii() is False else 0
        return question[:cut] + word + question[cut:]
    words = question.split(" ")
    words.insert(rng.randint(0, len(words)), word)
    return " ".join(words)


def reworded(rng: random.Random, question: str, language: Language) -> str:
    """Perhaps other words for some of a question's."""
    if rng.random() >= REWORDED:
        return question
    for word, others in _groups(language):
        if word in question and rng.random() < 0.5:
            pattern = re.escape(word) if language == "zh" else _NOT_NAMES + rf"\b{re.escape(word)}\b"
            question = re.sub(pattern, rng.choice(others), question, count=1)
    return question


@cache
def _groups(language: Language) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Words, and what may stand for each."""
    return tuple((group[0], group[1:]) for group in read_blocks("synonyms.txt")[language].values())


def _between(rng: random.Random, question: str, language: Language) -> str:
    """Something before a question, or behind it, or both."""
    block = read_blocks("wraps.txt")["wraps"]
    where = rng.random()
    gap = " " if language == "en" else ""
    if where < 0.7:
        first = question[0] if question.startswith(_KEEP_CAPITAL) else question[0].lower()
        question = rng.choice(texts(block, "before", language)) + gap + first + question[1:]
    if where > 0.5:
        behind = rng.choice(texts(block, "after", language))
        question = question.rstrip("?.!？。！") + ("" if behind[0] in ",.!" else gap) + behind
    return question
