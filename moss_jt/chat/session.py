"""A conversation: turns kept as ids, a prompt made of them, an answer streamed as plain events.

The one idea: a turn keeps the exact ids that the engine saw and gave, never text that is encoded
again. So the prompt of the next turn begins with what the engine already holds, and only the new
tokens are computed. When the context is full, the oldest turns leave the prompt whole; the system
prompt stays, and a Notice says so.

A turn is a tuple of passes: ids that we gave, then ids that the model generated. Without tools it is one.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moss_jt.chat.events import ChatEvent, Finished, Notice, Prefill, Reason, ReplyStats, TextDelta
from moss_jt.chat.reader import AnswerReader
from moss_jt.chat.saved import SavedTurn, read_conversation, write_conversation
from moss_jt.chat.turns import ChatTurn, Pass, flat
from moss_jt.config import GenerationConfig
from moss_jt.errors import ConversationError
from moss_jt.language import pick
from moss_jt.messages import FinishedEvent, PrefillEvent, Request, TokenEvent
from moss_jt.template import system_prompt

if TYPE_CHECKING:
    from moss_jt.engine import Engine
    from moss_jt.template import Template
    from moss_jt.tokenizer import Tokenizer

MIN_ANSWER = 16  # a prompt that leaves fewer tokens than this for the answer is refused


@dataclass
class _Draft:
    """A turn being answered. `before` is put back if the new answer never shows anything."""

    human: str
    passes: tuple[Pass, ...]
    first: int
    attempt: int = 0
    before: ChatTurn | None = None
    dropped: int = 0
    answer: str = ""
    reason: Reason = "cancelled"
    stats: ReplyStats = field(default_factory=ReplyStats)


class ChatSession:
    """One conversation with one engine.

    Args:
        engine: answers requests; other conversations may share it as long as they take turns.
        tokenizer: the model's.
        template: how turns are written as ids.
        system: the system prompt; MOSS's own if None, none at all if "".
        config: how answers are sampled; stop ids of the template are added to its own. May be replaced at any time.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: Template,
        *,
        system: str | None = None,
        config: GenerationConfig | None = None,
    ) -> None:
        self.config = config or GenerationConfig()
        self._engine = engine
        self._tokenizer = tokenizer
        self._template = template
        self._name = f"chat-{uuid.uuid4().hex}"
        self._turns: list[ChatTurn] = []
        self._unanswered: str | None = None
        self._answering = False
        self._cancelled = False
        self.set_system(system)

    @property
    def turns(self) -> tuple[ChatTurn, ...]:
        """Every turn of the conversation, also those that no longer fit into the prompt."""
        return tuple(self._turns)

    @property
    def system(self) -> str:
        """The system prompt."""
        return self._system

    @property
    def template(self) -> Template:
        """How turns are written."""
        return self._template

    @property
    def unanswered(self) -> str | None:
        """The last message if its answer was broken off before anything was shown."""
        return self._unanswered

    def reply(self, text: str) -> Iterator[ChatEvent]:
        """Answer a message.

        KeyboardInterrupt while the engine works, `cancel()`, or closing the iterator end the answer: what was
        shown stays in the conversation as a closed turn, and if nothing was shown, the message is taken back
        and `unanswered` holds it.

        Raises:
            ConversationError: at once, before anything has changed, if the message does not fit.
        """
        self._check_idle()
        opening = tuple(self._template.open_turn(self._tokenizer, text))
        return self._run(self._fit(_Draft(text, (Pass(opening),), self._window_start())))

    def retry(self) -> Iterator[ChatEvent]:
        """Answer the last message anew, with another seed; the old answer stays if the new one shows nothing."""
        self._check_idle()
        if self._unanswered is not None:
            return self.reply(self._unanswered)
        turn = self._last_turn(pick("retry", "重新回答"))
        draft = _Draft(turn.human, (Pass(turn.passes[0].given),), turn.first, turn.attempt + 1, turn)
        return self._run(self._fit(draft))

    def continue_answer(self) -> Iterator[ChatEvent]:
        """Go on with an answer that was cut off; the deltas hold only what is new."""
        self._check_idle()
        turn = self._last_turn(pick("continue", "继续"))
        if turn.reason == "stop":
            raise ConversationError(
                pick(
                    "the last answer is complete: there is nothing to continue. Ask something, or use retry.",
                    "上一个回答已经完整，无需继续。请继续提问，或重新回答。",
                )
            )
        return self._run(self._fit(_Draft(turn.human, turn.passes, turn.first, turn.attempt, turn)))

    def cancel(self) -> None:
        """End the running answer at the next token; for a caller that holds the iterator, or another thread."""
        self._cancelled = True

    def undo(self) -> str:
        """Forget the last turn and give back what the user had written."""
        self._check_idle()
        turn = self._last_turn(pick("undo", "撤销"))
        self._turns.pop()
        self._unanswered = None
        return turn.human

    def clear(self) -> None:
        """Forget every turn; the system prompt and the settings stay."""
        self._check_idle()
        self._turns.clear()
        self._unanswered = None
        self._engine.forget(self._name)

    def set_system(self, system: str | None) -> None:
        """Replace the system prompt, as if it had been there from the start; None is MOSS's own, "" is none."""
        self._check_idle()
        text = system_prompt(self._template) if system is None else system
        ids = tuple(self._template.system_ids(self._tokenizer, text))
        room = self._engine.context_size - MIN_ANSWER
        if len(ids) >= room:
            raise ConversationError(
                pick(
                    f"the system prompt has {len(ids)} tokens; at most {room - 1} fit into this model. "
                    "Give a shorter one, or none.",
                    f"系统提示有 {len(ids)} 个词元，此模型最多容纳 {room - 1} 个。请缩短，或不用系统提示。",
                )
            )
        self._system, self._system_ids = text, ids

    def close(self) -> None:
        """Give back what the engine keeps for this conversation."""
        self._engine.forget(self._name)

    def context_tokens(self) -> int:
        """How many tokens the system prompt and the turns in the window take."""
        return len(self._system_ids) + sum(len(turn.ids) for turn in self._turns[self._window_start() :])

    def stats(self) -> dict[str, float | int | str]:
        """Figures of the conversation and, below them, those of the engine."""
        ours: dict[str, float | int | str] = {
            "turns": len(self._turns),
            "dropped_turns": self._window_start(),
            "context_tokens": self.context_tokens(),
            "context_size": self._engine.context_size,
        }
        return {**self._engine.stats(), **ours}

    def save(self, path: Path) -> None:
        """Write the conversation to a file that only the user can read."""
        turns = [SavedTurn(turn.human, turn.answer, turn.reason, turn.passes[-1].generated) for turn in self._turns]
        write_conversation(path, self._system, turns)

    def load(self, path: Path) -> None:
        """Take the conversation of a file in place of this one.

        Ids are used where this tokenizer reads them as the same text, else the text is encoded anew.

        Raises:
            ConversationError: the file is not a saved conversation; nothing has changed then.
        """
        self._check_idle()
        system, saved = read_conversation(path)
        turns = [self._restored(turn) for turn in saved]
        self.set_system(system)
        self.clear()
        self._turns = turns

    def _restored(self, saved: SavedTurn) -> ChatTurn:
        """A turn from its texts, and from its generated ids if they say what the text says."""
        opening = tuple(self._template.open_turn(self._tokenizer, saved.human))
        hidden = any(i in self._tokenizer.control_ids for i in saved.generated[:-1])  # would not show in the text
        known = all(self._tokenizer.is_known(i) for i in saved.generated)
        if known and not hidden and self._text_of(saved.generated) == saved.answer:
            generated = saved.generated
        else:
            generated = tuple(self._tokenizer.encode(" " + saved.answer, inside=True))
        closing = tuple(self._template.close_turn(self._tokenizer, list(generated)))
        return ChatTurn(saved.human, saved.answer, saved.reason, (Pass(opening, generated),), closing)

    def _text_of(self, generated: tuple[int, ...]) -> str:
        """What is shown of generated ids."""
        reader = AnswerReader(self._tokenizer, self._stop_ids(), self.config.stop_strings)
        return "".join(reader.push(i) for i in generated) + reader.flush()

    def _check_idle(self) -> None:
        if self._answering:
            raise ConversationError("an answer is still being given: read its events to the end, or close them, first.")

    def _last_turn(self, wish: str) -> ChatTurn:
        if not self._turns:
            raise ConversationError(
                pick(f"there is no answer yet: nothing to {wish}.", f"还没有任何回答，无法{wish}。")
            )
        return self._turns[-1]

    def _window_start(self) -> int:
        """Index of the oldest turn that is still in the prompt."""
        return self._turns[-1].first if self._turns else 0

    def _stop_ids(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((*self.config.stop_ids, *self._template.stop_ids(self._tokenizer))))

    def _fit(self, draft: _Draft) -> _Draft:
        """Let old turns go until the prompt and an answer fit.

        Where turns must go, an eighth of the context is freed beyond need: the prompt then keeps its
        beginning over the next turns, which thus need not be computed anew each time.
        """
        older = self._turns[:-1] if draft.before is not None else self._turns
        size = self._engine.context_size
        own = len(self._system_ids) + len(flat(draft.passes))
        room = min(self.config.max_new_tokens, size // 4)
        if own + min(room, MIN_ANSWER) > size:
            raise ConversationError(self._too_long(draft, own, size))
        lengths = [len(turn.ids) for turn in older]
        used = own + sum(lengths[draft.first :])
        limit = max(size - room, own)
        if used > limit:
            target = max(limit - size // 8, own)
            while used > target and (draft.first < len(older) - 1 or used > limit):
                used -= lengths[draft.first]
                draft.first += 1
                draft.dropped += 1
        return draft

    def _too_long(self, draft: _Draft, own: int, size: int) -> str:
        """The words for a turn that does not fit even alone."""
        system = len(self._system_ids)
        most = size - system - MIN_ANSWER
        if draft.passes[0].generated:
            return pick(
                f"the answer fills the context of {size} tokens: it cannot be continued.",
                f"回答已占满 {size} 个词元的上下文，无法继续。",
            )
        return pick(
            f"the message has {own - system} tokens; beside the system prompt at most {most} fit into this model. "
            "Shorten it, or send it in parts.",
            f"消息有 {own - system} 个词元；除系统提示外，此模型最多容纳 {most} 个。请缩短或分几次发送。",
        )

    def _run(self, draft: _Draft) -> Iterator[ChatEvent]:
        """Answer a draft and enter it into the conversation, however the answer ends."""
        self._check_idle()
        self._answering, self._cancelled = True, False
        self._unanswered = None
        kept = False
        try:
            if draft.dropped:
                yield _dropped_notice(draft.dropped)
            yield from self._answer(draft)
        finally:
            self._answering = False
            kept = self._settle(draft)
        if draft.reason == "length" and self.context_tokens() >= self._engine.context_size - 1:
            yield Notice("full", pick("The context is full; the answer ends here.", "上下文已满，回答到此为止。"))
        yield Finished(draft.reason, draft.stats, kept)

    def _answer(self, draft: _Draft) -> Iterator[ChatEvent]:
        """Drive the engine through one pass, moving what it gives into the draft."""
        ids = tuple(self._prompt(draft))
        reader = AnswerReader(self._tokenizer, self._stop_ids(), self.config.stop_strings)
        draft.answer = "".join(reader.push(i) for i in draft.passes[-1].generated)
        began = time.monotonic()
        request = self._engine.submit(Request(ids, self._request_config(draft), self._name))
        draft.stats = ReplyStats(prompt_tokens=len(ids))
        running = True
        try:
            yield Prefill(0, len(ids), 0)
            while running and not self._cancelled:
                for event in self._engine.step():
                    if event.request != request:
                        continue
                    if isinstance(event, PrefillEvent):
                        draft.stats = replace(draft.stats, reused_tokens=event.reused)
                        yield Prefill(event.done, event.total, event.reused)
                    elif isinstance(event, TokenEvent):
                        yield from self._take(draft, reader, event.id, began)
                    elif isinstance(event, FinishedEvent):
                        draft.reason, running = event.reason, False
        except KeyboardInterrupt:
            draft.reason = "cancelled"
        finally:
            if running:
                self._engine.cancel(request)
            # a broken-off beginning may be half a tag: that is no answer
            rest = reader.flush() if draft.answer or draft.reason != "cancelled" else ""
            draft.answer += rest
        if rest:
            yield TextDelta(rest)

    def _take(self, draft: _Draft, reader: AnswerReader, token: int, began: float) -> Iterator[ChatEvent]:
        """Enter one generated id and show its text."""
        last = draft.passes[-1]
        draft.passes = (*draft.passes[:-1], Pass(last.given, (*last.generated, token)))
        draft.stats = _with_token(draft.stats, time.monotonic() - began)
        text = reader.push(token)
        draft.answer += text
        if text:
            yield TextDelta(text)

    def _prompt(self, draft: _Draft) -> Iterator[int]:
        """The ids of the system prompt, the turns in the window and the turn being answered."""
        yield from self._system_ids
        older = self._turns[:-1] if draft.before is not None else self._turns
        for turn in older[draft.first :]:
            yield from turn.ids
        yield from flat(draft.passes)

    def _request_config(self, draft: _Draft) -> GenerationConfig:
        """The settings, with the template's stop ids and a seed of its own for each attempt."""
        seed = self.config.seed
        return replace(self.config, stop_ids=self._stop_ids(), seed=None if seed is None else seed + draft.attempt)

    def _settle(self, draft: _Draft) -> bool:
        """Enter the turn if it shows anything; else put things back as they were. Tells whether it was entered."""
        if not draft.answer and draft.reason != "stop":
            if draft.before is None:
                self._unanswered = draft.human
            return False
        closing = tuple(self._template.close_turn(self._tokenizer, list(draft.passes[-1].generated)))
        turn = ChatTurn(draft.human, draft.answer, draft.reason, draft.passes, closing, draft.first, draft.attempt)
        older = self._turns[:-1] if draft.before is not None else self._turns
        self._turns = [*older, turn]  # in one go: a second Ctrl-C finds the old turns or the new
        return True


def _with_token(stats: ReplyStats, elapsed_s: float) -> ReplyStats:
    """The figures after one more token, `elapsed_s` after the request was made."""
    if stats.new_tokens == 0:
        return replace(stats, new_tokens=1, prefill_s=elapsed_s)
    return replace(stats, new_tokens=stats.new_tokens + 1, decode_s=elapsed_s - stats.prefill_s)


def _dropped_notice(count: int) -> Notice:
    """The words for turns that left the prompt."""
    turns = "turn" if count == 1 else "turns"
    return Notice(
        "dropped",
        pick(
            f"The context is full: the oldest {count} {turns} will no longer be remembered.",
            f"上下文已满：最早的 {count} 轮对话将不再被记住。",
        ),
    )
