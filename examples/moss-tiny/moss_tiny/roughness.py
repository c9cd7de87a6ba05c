"""Questions as people type them: in other words, with words around, too many or too few, without capitals or marks.

Words that mean nothing to the task teach the model to look for those that do. Words that are missing keep it from
learning whole sentences by heart: it must make do with what is there, as it must with a sentence that nobody wrote for it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import cache

from moss_tiny.wordings import Language, read_blocks, texts

WRAPPED = 0.3  # of questions, those with something before or behind
REWORDED = 0.5  # of questions in words, those in which words may be replaced
NOISY = 0.15  # of questions in words, those with a word too many
THINNED = 0.5  # of questions in words, those with words too few
MOST_LEFT_OUT = 0.4  # of the words of such a question; half as much on average
MIXED = 0.15  # of questions in words, those made of a few words each of several questions of one meaning
PARTS = (2, 5)  # of such a question
PART = {"en": 3, "zh": 4}  # words of a part at most; of Chinese, characters
BLURRED = 0.15  # of tasks in words, those with words left out or replaced by words that have nothing to do with them
MOST_BLURRED = 0.3  # of the words of such a task; half as much on average
REPLACED = 0.7  # of those words, those that others stand for
BLURRED_AROUND = 0.3  # of written tasks, those around which words are left out or replaced, or come first
MOST_BLURRED_AROUND = 0.8  # of the words around; half as much on average
MOST_BEFORE = 4  # words that mean nothing to such a task and come right before it
JOINED = 0.15  # of questions in words, those behind which the same is asked once more
_NOT_NAMES = r"(?<![-/])(?<!moss-jt )(?<!moss-jt models )(?<!moss-convert )"  # else it names an option or a command
_CHARACTERS = re.compile(r"[\x21-\x7e]+|\s+|.")  # of Chinese; a word in Latin letters is one
_DIGITS = re.compile(r"\d+")
_FEW = 4  # a question of fewer words keeps them all
_KEEP_CAPITAL = ("I ", "I'", "MO")


def rough(rng: random.Random, question: str, language: Language) -> str:
    """A question in words as somebody might type it."""
    changed = thinned(rng, reworded(rng, question, language), language)
    return wrapped(rng, noisy(rng, changed, language), language)


def thinned(rng: random.Random, question: str, language: Language) -> str:
    """Perhaps a question with some of its words left out, and some neighbours in each other's place."""
    words = _words(question, language)
    if len(words) < _FEW or rng.random() >= THINNED:
        return question
    share = rng.random() * MOST_LEFT_OUT
    kept = [word for word in words if rng.random() >= share] or words
    for place in range(len(kept) - 1):
        if rng.random() < share / 3:
            kept[place], kept[place + 1] = kept[place + 1], kept[place]
    return _joined(kept, language)


def mixed(rng: random.Random, draw: Callable[[], str], language: Language) -> str:
    """Words from here and there of several questions of one meaning.

    What they have in common is the meaning alone, so each word must be known for what it says of that. Counting words
    and pairs of them finds more meanings than a small model does that has learned whole sentences.

    Args:
        rng: draws.
        draw: gives a question.
        language: of the questions.
    """
    kept: list[str] = []
    for _ in range(rng.randint(*PARTS)):
        words = _words(draw(), language)
        length = rng.randint(1, PART[language])
        start = rng.randint(0, max(0, len(words) - length))
        kept += words[start : start + length]
    return _joined(kept, language)


def blurred(rng: random.Random, question: str, draw: Callable[[], str], language: Language) -> str:
    """Perhaps a task in which some words are missing and others mean nothing to it; what holds a digit stays.

    Which number comes first must be told without most of the words around, as it must in a sentence that nobody wrote.

    Args:
        rng: draws.
        question: a task in words, with its numbers.
        draw: gives a question, for words.
        language: of both.
    """
    if rng.random() >= BLURRED:
        return question
    share = rng.random() * MOST_BLURRED

    def another() -> list[str]:
        word = rng.choice(_words(draw(), language))
        return [] if _has_digit(word) else [word]

    kept = _replaced(rng, _words(question, language), lambda word: rng.random() >= share or _has_digit(word), another)
    left = _joined(kept, language)
    return left if len(_DIGITS.findall(left)) == len(_DIGITS.findall(question)) else question  # two became one


def blurred_around(rng: random.Random, question: str, draw: Callable[[], str], language: Language) -> str:
    """Perhaps a written task with other words around it: where it begins must be told by itself, and what to do by its signs.

    Args:
        rng: draws.
        question: a written task, with a number.
        draw: gives a question, for words.
        language: of both.
    """
    if rng.random() >= BLURRED_AROUND:
        return question
    share = rng.random() * MOST_BLURRED_AROUND

    def another() -> list[str]:
        word = rng.choice(_words(draw(), language))
        return [word] if _is_word(word, language) else []

    def stays(word: str) -> bool:
        return not _is_word(word, language) or rng.random() >= share

    kept = _replaced(rng, _words(question, language), stays, another)
    start = next(place for place, word in enumerate(kept) if _has_digit(word))
    while start and not _is_word(kept[start - 1], language):
        start -= 1
    before = [word for _ in range(rng.randint(0, MOST_BEFORE)) for word in another()]
    return _joined(kept[:start] + before + kept[start:], language)


def _replaced(
    rng: random.Random, words: list[str], stays: Callable[[str], bool], another: Callable[[], list[str]]
) -> list[str]:
    """Words of which some stay and the others are left out, or have others in their place."""
    kept: list[str] = []
    for word in words:
        if stays(word):
            kept.append(word)
        elif rng.random() < REPLACED:
            kept += another()
    return kept


def _is_word(word: str, language: Language) -> bool:
    """Whether something is a word and not part of a formula: two letters or more, or a Chinese character."""
    letters = word.rstrip("?.!,:;")
    return letters.isalpha() and (len(letters) > 1 if language == "en" else not letters.isascii())


def _has_digit(word: str) -> bool:
    return any(map(str.isdigit, word))


def _words(question: str, language: Language) -> list[str]:
    """The words of a question; of a Chinese one, its characters."""
    return question.split(" ") if language == "en" else _CHARACTERS.findall(question)


def _joined(words: list[str], language: Language) -> str:
    return (" " if language == "en" else "").join(words)


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
    """Perhaps other words for some of a question's, each at most once."""
    if rng.random() >= REWORDED:
        return question
    words, others = _groups(language)

    def other(found: re.Match[str]) -> str:
        word = found[0]
        if rng.random() < 0.5:
            return word
        chosen = rng.choice(others[word.lower()])
        return chosen[0].upper() + chosen[1:] if found.start() == 0 and word[0].isupper() else chosen

    return words.sub(other, question)


@cache
def _groups(language: Language) -> tuple[re.Pattern[str], dict[str, tuple[str, ...]]]:
    """What finds the words that others may stand for, the longest first, and those others, by the word in small letters."""
    others: dict[str, tuple[str, ...]] = {}
    for group in read_blocks("synonyms.txt")[language].values():
        word = group[0].lower()
        others[word] = others.get(word, ()) + group[1:]
    any_word = "|".join(map(re.escape, sorted(others, key=len, reverse=True)))
    return re.compile(any_word if language == "zh" else rf"{_NOT_NAMES}\b(?:{any_word})\b", re.IGNORECASE), others


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
