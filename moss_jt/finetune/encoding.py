"""Conversations and texts to token ids, and which of them are learned.

The fields of a turn carry their tags and end markers in the text (`<|Human|>: …<eoh>\\n`). Each is encoded by itself
and they are put one after the other; nothing is put between.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.errors import ConfigError
from moss_jt.finetune.records import Record
from moss_jt.finetune.settings import DataSettings
from moss_jt.template import quality_text
from moss_jt.tokenizer import Tokenizer

Ids = npt.NDArray[np.int32]
Span = tuple[int, int]

NOT_LEARNED = -100
FIELDS = ("Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS")
_TAG_TOKENS, _END_TOKENS = 5, 2  # what the original takes `<|Results|>:` and `<eor>\n` for
_RESULTS_TAG = "<|Results|>:"
_END = re.compile(r"(<eo[hmtcr]>)(\s*)\Z")


@dataclass(frozen=True)
class Sample:
    """Token ids and the stretches of them that are not learned.

    Attributes:
        ids: (T,) int32.
        unlearned: [start, end) stretches.
    """

    ids: Ids
    unlearned: tuple[Span, ...]

    @property
    def labels(self) -> Ids:
        """The ids, -100 where they are not learned."""
        labels = self.ids.copy()
        for start, end in self.unlearned:
            labels[start:end] = NOT_LEARNED
        return labels


class Encoder:
    """Turns records into samples.

    Args:
        tokenizer: the model's; for the original's way, one that strips as the original does.
        settings: how.
    """

    def __init__(self, tokenizer: Tokenizer, settings: DataSettings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self._results_tag = len(tokenizer.encode(_RESULTS_TAG, inside=True))

    def samples(self, record: Record, place: str) -> Iterator[Sample]:
        """The samples of a record: one of a conversation, as many as it takes of a text.

        Raises:
            ConfigError: names the place and what is wrong with it.
        """
        if "chat" not in record:
            yield from self._text_samples(_text(record, "text", place))
            return
        sample = self._conversation(record, place)
        if sample is not None:
            yield sample

    def _text_samples(self, text: str) -> Iterator[Sample]:
        """Windows of a text that ends with the token for it; the whole is learned."""
        end = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
        ids = self.tokenizer.encode(text) + ([end] if end is not None else [])
        for start in range(0, len(ids) - 1, self.settings.max_length):
            window = ids[start : start + self.settings.max_length]
            if len(window) > 1:
                yield Sample(np.array(window, np.int32), ())

    def _conversation(self, record: Record, place: str) -> Sample | None:
        """Whole turns as far as they fit; None where not even the first does."""
        ids = self._encode(_text(record, "meta_instruction", place, default=""), inside=False)
        unlearned: list[Span] = [(0, len(ids))]
        begun = len(ids)
        for name, turn in _turns(record, place):
            turn_ids, spans = self._turn(turn, f"{place}: {name}", record.get("quality"))
            if len(ids) + len(turn_ids) > self.settings.max_length:
                break
            unlearned += [(len(ids) + start, len(ids) + end) for start, end in spans]
            ids += turn_ids
        if len(ids) == begun:
            return None
        return Sample(np.array(ids, np.int32), tuple(unlearned))

    def _turn(self, turn: Mapping[str, Any], place: str, overall: Any) -> tuple[list[int], list[Span]]:
        """The ids of a turn, and what of them is not learned."""
        ids: list[int] = []
        spans: list[Span] = []
        for field in turn:
            if field == "quality":
                continue
            if field not in FIELDS:
                raise ConfigError(f"{place} has the field {field!r}; a turn has {', '.join(FIELDS)}.")
            if field == "MOSS" and self.settings.quality:
                added = self._quality(turn.get("quality", overall), place)
                spans.append((len(ids), len(ids) + len(added)))
                ids += added
            new = self._encode(_text(turn, field, place), inside=True)
            spans += [(len(ids) + start, len(ids) + end) for start, end in self._unlearned(field, len(new))]
            ids += new
        return ids, spans

    def _quality(self, score: Any, place: str) -> list[int]:
        if score is None:
            return []
        if not isinstance(score, int | float) or isinstance(score, bool) or not 0 <= score <= 100:
            raise ConfigError(f"{place} has the quality {score!r}; it must be a number from 0 to 100.")
        return self.tokenizer.encode(quality_text(round(score)), inside=True)

    def _unlearned(self, field: str, count: int) -> list[Span]:
        """What of a field of `count` tokens is not learned."""
        if field == "Tool Responses":
            if self.settings.original:
                return [(_TAG_TOKENS, count - _END_TOKENS)]
            tag = min(self._results_tag, count)
            return [(tag, max(tag, count - _END_TOKENS))]
        if field == "Human" and not self.settings.original:
            return [(0, count)]
        return []

    def _encode(self, text: str, *, inside: bool) -> list[int]:
        """Text to ids: only the marker that ends a field is one, what somebody wrote stays text."""
        if self.settings.original:
            return self.tokenizer.encode(text, allow_special=True, inside=inside)
        found = _END.search(text)
        if found is None:
            return self.tokenizer.encode(text, inside=inside)
        body = self.tokenizer.encode(text[: found.start()], inside=inside)
        rest = self.tokenizer.encode(found.group(2), inside=True)
        return [*body, self.tokenizer.marker(found.group(1)), *rest]


def _turns(record: Record, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The turns in order, as many as num_turns says."""
    chat = record["chat"]
    if not isinstance(chat, dict) or not all(isinstance(turn, dict) for turn in chat.values()):
        raise ConfigError(f'{place}: "chat" must be an object of turns, {{"turn_1": {{…}}, …}}.')
    count = record.get("num_turns", len(chat))
    if isinstance(count, bool) or not isinstance(count, int | str) or not str(count).isdecimal():
        raise ConfigError(f'{place}: "num_turns" is {count!r}; it must be a whole number.')
    for name in (f"turn_{number}" for number in range(1, int(count) + 1)):
        if name not in chat:
            raise ConfigError(f"{place}: there is no {name}, and num_turns says that there is.")
        yield name, chat[name]


def _text(values: Mapping[str, Any], key: str, place: str, default: str | None = None) -> str:
    text = values.get(key, default)
    if not isinstance(text, str):
        raise ConfigError(f"{place}: {key!r} is {text!r:.60}; it must be text.")
    return text
