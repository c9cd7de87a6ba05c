"""What moss-tiny can talk about: questions of one meaning, their answer, and the fact that it must contain."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from moss_tiny.wordings import LANGUAGES, Block, Language, choose, expand, read_blocks, texts

FRAME_SHARE = 0.2  # of the questions of an intent with phrases, those made of a phrase and a frame
PLAIN_SHARE = 0.15  # of whole questions, those in the plain words of product.txt and smalltalk.txt


@dataclass(frozen=True)
class Intent:
    """Questions of one meaning, in both languages.

    Attributes:
        name: of its block.
        product: it is about the program and its documentation rather than small talk.
        do: phrases that follow "How do I".
        what: phrases that follow "What is".
        ask: whole questions.
        plain: how many of them come first and are in plain words.
        held: whole questions for the evaluation; never trained on.
        say: the answer.
        fact: what an answer must contain to be right.
    """

    name: str
    product: bool
    do: Mapping[Language, tuple[str, ...]]
    what: Mapping[Language, tuple[str, ...]]
    ask: Mapping[Language, tuple[str, ...]]
    plain: Mapping[Language, int]
    held: Mapping[Language, tuple[str, ...]]
    say: Mapping[Language, str]
    fact: Mapping[Language, str]

    def question(self, rng: random.Random, language: Language) -> str:
        """A question to train on."""
        phrases, frames = self._phrases(rng, language)
        asks = self.ask[language]
        if phrases and (not asks or rng.random() < FRAME_SHARE):
            text = rng.choice(frames).replace("{}", choose(rng, phrases))
            return text[0].upper() + text[1:]
        plain = asks[: self.plain[language]]
        return choose(rng, plain if plain and rng.random() < PLAIN_SHARE else asks)

    def _phrases(self, rng: random.Random, language: Language) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The phrases of one kind, drawn by their numbers, with the frames that fit them."""
        kinds = {kind: getattr(self, kind)[language] for kind in ("do", "what")}
        if not any(kinds.values()):
            return (), ()
        kind = rng.choices(list(kinds), weights=[len(phrases) for phrases in kinds.values()])[0]
        return kinds[kind], frames_of(kind, language)

    def query(self, language: Language) -> str:
        """What to search the documentation for."""
        return expand((self.do[language] or self.what[language])[0])[0]


@cache
def frames_of(kind: str, language: Language, *, held: bool = False) -> tuple[str, ...]:
    """The sentences around phrases of a kind, "do" or "what"."""
    found: dict[str, tuple[str, ...]] = read_frames()
    return found[f"{'held.' if held else ''}{kind}.{language}"]


@cache
def read_frames() -> dict[str, tuple[str, ...]]:
    """Everything in frames.txt by its key."""
    return dict(read_blocks("frames.txt")["frames"])


@cache
def read_intents() -> tuple[Intent, ...]:
    """All intents, those of the product first."""
    return tuple(
        _make(name, block, product=product)
        for file, product in (("product.txt", True), ("smalltalk.txt", False))
        for name, block in read_blocks(file).items()
    )


def _make(name: str, block: Block, *, product: bool) -> Intent:
    more = read_blocks("paraphrases.txt").get(name, {})

    def of(key: str) -> dict[Language, tuple[str, ...]]:
        return {language: texts(block, key, language) + texts(more, key, language) for language in LANGUAGES}

    def one(key: str) -> dict[Language, str]:
        return {language: texts(block, key, language)[0] for language in LANGUAGES}

    plain: dict[Language, int] = {language: len(texts(block, "ask", language)) for language in LANGUAGES}
    return Intent(name, product, of("do"), of("what"), of("ask"), plain, of("held"), one("say"), one("fact"))
