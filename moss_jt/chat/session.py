"""A conversation: turns kept as ids, a prompt made of them, an answer streamed as plain events.

The one idea: a turn keeps the exact ids that the engine saw and gave, never text that is encoded
again. So the prompt of the next turn begins with what the engine already holds, and only the new
tokens are computed. When the context is full, the oldest turns leave the prompt whole; the system
prompt stays, and a Notice says so.

A turn is a tuple of passes: ids that we gave, then ids that the model generated. Without tools it is one. With
tools it is two: thoughts and commands, then, behind the results of the calls, the answer. The second pass begins with
all ids of the first, so the engine computes only the results. Where the context gets tight, results of old turns are
shortened before any turn leaves.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moss_jt.chat import window
from moss_jt.chat.events import (
    Calls,
    ChatEvent,
    Finished,
    Notice,
    Prefill,
    Reason,
    ReplyStats,
    Result,
    TextDelta,
    ThoughtDelta,
)
from moss_jt.chat.reader import AnswerReader
from moss_jt.chat.restoring import restored_turn, saved_turn
from moss_jt.chat.saved import read_conversation, write_conversation
from moss_jt.chat.thoughts import ThoughtReader, ToolTurn, read_thoughts
from moss_jt.chat.turns import ChatTurn, Pass, flat
from moss_jt.chat.window import MIN_ANSWER
from moss_jt.config import GenerationConfig
from moss_jt.errors import ConversationError
from moss_jt.language import pick
from moss_jt.messages import FinishedEvent, PrefillEvent, Request, TokenEvent
from moss_jt.template import is_own_prompt, system_prompt

if TYPE_CHECKING:
    from moss_jt.engine import Engine
    from moss_jt.template import Template
    from moss_jt.tokenizer import Tokenizer
    from moss_jt.tools.toolbox import ToolBox


@dataclass
class _Draft:
    """A turn being answered. `before` is put back if the new answer never shows anything.

    While `thinking`, the last pass is that of the thoughts; then `tools` holds what came of it.
    """

    human: str
    passes: tuple[Pass, ...]
    first: int
    attempt: int = 0
    before: ChatTurn | None = None
    dropped: int = 0
    answer: str = ""
    reason: Reason = "cancelled"
    stats: ReplyStats = field(default_factory=ReplyStats)
    thinking: bool = False
    tools: ToolTurn | None = None


class ChatSession:
    """One conversation with one engine.

    Args:
        engine: answers requests; other conversations may share it as long as they take turns.
        tokenizer: the model's.
        template: how turns are written as ids.
        system: the system prompt; MOSS's own if None, none at all if "".
        config: how answers are sampled; stop ids of the template are added to its own. May be replaced at any time.
        tools: that the model may call; the template must then be "fields". None for an answer without thoughts.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: Template,
        *,
        system: str | None = None,
        config: GenerationConfig | None = None,
        tools: ToolBox | None = None,
    ) -> None:
        self.config = config or GenerationConfig()
        self._engine = engine
        self._tokenizer = tokenizer
        self._template = template
        self._tools = tools
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
    def tools(self) -> ToolBox | None:
        """What the model may call."""
        return self._tools

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
        return self._run(self._fit(self._opened(text, self._window_start())))

    def retry(self) -> Iterator[ChatEvent]:
        """Answer the last message anew, with another seed; the old answer stays if the new one shows nothing."""
        self._check_idle()
        if self._unanswered is not None:
            return self.reply(self._unanswered)
        turn = self._last_turn(pick("retry", "重新回答"))
        draft = self._opened(turn.human, turn.first)
        draft.attempt, draft.before = turn.attempt + 1, turn
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
        draft = _Draft(turn.human, turn.passes, turn.first, turn.attempt, turn, tools=turn.tools)
        return self._run(self._fit(draft))

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
        lines = self._tools.lines if self._tools is not None else ()
        text = system_prompt(self._template, lines) if system is None else system
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
        write_conversation(path, self._system, [saved_turn(turn) for turn in self._turns])

    def load(self, path: Path) -> None:
        """Take the conversation of a file in place of this one.

        Ids are used where this tokenizer reads them as the same text, else the text is encoded anew. MOSS's own system
        prompt becomes that of this conversation, which names the tools that are on now.

        Raises:
            ConversationError: the file is not a saved conversation; nothing has changed then.
        """
        self._check_idle()
        system, saved = read_conversation(path)
        turns = [restored_turn(turn, self._template, self._tokenizer, self._text_of) for turn in saved]
        self.set_system(None if is_own_prompt(system) else system)
        self.clear()
        self._turns = turns

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

    def _opened(self, human: str, first: int) -> _Draft:
        """A turn as it stands before anything is generated."""
        thinking = self._tools is not None
        begin = self._template.open_thoughts if thinking else self._template.open_turn
        return _Draft(human, (Pass(tuple(begin(self._tokenizer, human))),), first, thinking=thinking)

    def _older(self, draft: _Draft) -> list[ChatTurn]:
        """The turns before the one being answered."""
        return self._turns[:-1] if draft.before is not None else self._turns

    def _fit(self, draft: _Draft) -> _Draft:
        """Shorten results of old turns, then let old turns go, until the prompt and what follows it fit."""
        size = self._engine.context_size
        own = len(self._system_ids) + len(flat(draft.passes))
        room = self._room()
        if own + min(room, MIN_ANSWER) > size:
            if draft.passes[0].generated:
                raise ConversationError(window.filled(size))
            raise ConversationError(window.too_long(own - len(self._system_ids), len(self._system_ids), size))
        if draft.thinking:
            room += window.thinking_room(size)
        lengths = [len(turn.ids) for turn in self._older(draft)]
        if window.is_tight(lengths, draft.first, own=own, size=size, room=room):
            self._shorten_results(draft)
            lengths = [len(turn.ids) for turn in self._older(draft)]
        first = window.first_turn(lengths, draft.first, own=own, size=size, room=room)
        draft.dropped += first - draft.first
        draft.first = first
        return draft

    def _room(self) -> int:
        """Tokens that an answer should have."""
        return min(self.config.max_new_tokens, self._engine.context_size // 4)

    def _shorten_results(self, draft: _Draft) -> None:
        """Cut the results of the turns before the one being answered; the numbers of their sources stay."""
        for at, turn in enumerate(self._older(draft)):
            if at >= draft.first and turn.tools is not None and not turn.tools.is_short:
                self._turns[at] = self._shortened(turn, turn.tools)

    def _shortened(self, turn: ChatTurn, tools: ToolTurn) -> ChatTurn:
        from moss_jt.tools.wording import SHORT_RESULT, shortened

        tools = replace(tools, results=shortened(tools.results, SHORT_RESULT), is_short=True)
        given = self._results_ids(turn.passes[0], tools.results)
        return replace(turn, passes=(turn.passes[0], Pass(given, turn.passes[1].generated)), tools=tools)

    def _results_ids(self, first: Pass, results: str) -> tuple[int, ...]:
        """The ids between thoughts and answer."""
        return tuple(self._template.close_commands(self._tokenizer, list(first.generated), results))

    def _run(self, draft: _Draft) -> Iterator[ChatEvent]:
        """Answer a draft and enter it into the conversation, however the answer ends."""
        self._check_idle()
        self._answering, self._cancelled = True, False
        self._unanswered = None
        kept = False
        try:
            if draft.dropped:
                yield Notice("dropped", window.dropped(draft.dropped))
            if draft.thinking:
                yield from self._think(draft)
            if not draft.thinking:
                yield from self._answer(draft)
        finally:
            self._answering = False
            kept = self._settle(draft)
        if draft.reason == "length" and self.context_tokens() >= self._engine.context_size - 1:
            yield Notice("full", pick("The context is full; the answer ends here.", "上下文已满，回答到此为止。"))
        yield Finished(draft.reason, draft.stats, kept)

    def _think(self, draft: _Draft) -> Iterator[ChatEvent]:
        """The first pass of a turn with tools, and the tools; `thinking` stays where that was broken off."""
        assert self._tools is not None, "only a turn with tools thinks"
        reader = ThoughtReader(self._tokenizer)
        room = self._engine.context_size - len(self._system_ids) - len(flat(draft.passes)) - self._room()
        stops = (*self.config.stop_ids, *self._template.command_stop_ids(self._tokenizer))
        limit = max(MIN_ANSWER, min(self.config.max_new_tokens, room))
        config = replace(self._request_config(draft), stop_ids=stops, stop_strings=(), max_new_tokens=limit)
        try:
            with closing(self._drive(draft, config)) as tokens:
                for token in tokens:
                    if not isinstance(token, int):
                        yield token
                    elif text := reader.push(token):
                        yield ThoughtDelta(text)
        except KeyboardInterrupt:
            draft.reason = "cancelled"
        if text := reader.flush():
            yield ThoughtDelta(text)
        if draft.reason != "cancelled":
            yield from self._run_tools(draft, self._tools)

    def _run_tools(self, draft: _Draft, tools: ToolBox) -> Iterator[ChatEvent]:
        """Run the calls and put their results where the answer begins."""
        from moss_jt.tools.commands import parse_commands
        from moss_jt.tools.wording import joined

        whole, draft.reason = draft.reason == "stop", "cancelled"  # until something is answered
        thought = read_thoughts(self._tokenizer, draft.passes[-1].generated, whole=whole)
        commands = parse_commands(thought.commands)
        yield Calls(tuple(call.text for call in commands.calls[: tools.limits.calls]))
        began = time.monotonic()
        blocks: list[str] = []
        turn = ToolTurn(thought.thoughts, thought.commands, "")
        try:
            for ran in tools.run(commands):
                blocks.append(ran.block)
                turn = replace(turn, sources=(*turn.sources, *ran.sources))
                yield Result(ran)
                if self._cancelled:
                    return
        except KeyboardInterrupt:
            return
        thoughts = draft.stats.new_tokens
        draft.stats = ReplyStats(thought_tokens=thoughts, tools_s=time.monotonic() - began)
        first = Pass(draft.passes[-1].given, thought.ids)
        yield from self._enter_results(draft, first, replace(turn, results=joined(blocks)))

    def _enter_results(self, draft: _Draft, first: Pass, tools: ToolTurn) -> Iterator[ChatEvent]:
        """Begin the second pass; results that leave no room for an answer are cut."""
        before, results = draft.dropped, self._fitting(first, tools.results)
        draft.passes = (first, Pass(self._results_ids(first, results)))
        draft.tools, draft.thinking = replace(tools, results=results), False
        try:
            self._fit(draft)
        except ConversationError as error:  # the thoughts alone fill the context
            draft.thinking, draft.reason = True, "length"
            yield Notice("full", str(error))
        if draft.dropped > before:
            yield Notice("dropped", window.dropped(draft.dropped - before))

    def _fitting(self, first: Pass, results: str) -> str:
        """Results as long as they may be if an answer is to have room behind them."""
        from moss_jt.tools.wording import fitting

        used = len(self._system_ids) + len(first.given) + len(first.generated) + self._room()
        return fitting(results, lambda text: used + len(self._results_ids(first, text)) <= self._engine.context_size)

    def _answer(self, draft: _Draft) -> Iterator[ChatEvent]:
        """The pass of the answer, shown as it comes."""
        reader = AnswerReader(self._tokenizer, self._stop_ids(), self.config.stop_strings)
        draft.answer = "".join(reader.push(i) for i in draft.passes[-1].generated)
        try:
            with closing(self._drive(draft, self._request_config(draft))) as tokens:
                for token in tokens:
                    if not isinstance(token, int):
                        yield token
                    elif text := reader.push(token):
                        draft.answer += text
                        yield TextDelta(text)
        except KeyboardInterrupt:
            draft.reason = "cancelled"
        finally:
            # a broken-off beginning may be half a tag: that is no answer
            rest = reader.flush() if draft.answer or draft.reason != "cancelled" else ""
            draft.answer += rest
        if rest:
            yield TextDelta(rest)

    def _drive(self, draft: _Draft, config: GenerationConfig) -> Generator[ChatEvent | int, None, None]:
        """Drive the engine through one pass: every generated id, already entered in the draft, and progress."""
        ids = tuple(self._prompt(draft))
        began = time.monotonic()
        request = self._engine.submit(Request(ids, config, self._name, shared=len(self._system_ids)))
        draft.stats = replace(draft.stats, prompt_tokens=len(ids))
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
                        last = draft.passes[-1]
                        draft.passes = (*draft.passes[:-1], Pass(last.given, (*last.generated, event.id)))
                        draft.stats = _with_token(draft.stats, time.monotonic() - began)
                        yield event.id
                    elif isinstance(event, FinishedEvent):
                        draft.reason, running = event.reason, False
        except KeyboardInterrupt:
            draft.reason = "cancelled"
        finally:
            if running:
                self._engine.cancel(request)

    def _prompt(self, draft: _Draft) -> Iterator[int]:
        """The ids of the system prompt, the turns in the window and the turn being answered."""
        yield from self._system_ids
        for turn in self._older(draft)[draft.first :]:
            yield from turn.ids
        yield from flat(draft.passes)

    def _request_config(self, draft: _Draft) -> GenerationConfig:
        """The settings, with the template's stop ids and a seed of its own for each attempt."""
        seed = self.config.seed
        return replace(self.config, stop_ids=self._stop_ids(), seed=None if seed is None else seed + draft.attempt)

    def _settle(self, draft: _Draft) -> bool:
        """Enter the turn if it shows anything; else put things back as they were. Tells whether it was entered."""
        if draft.thinking or (not draft.answer and draft.reason != "stop"):
            if draft.before is None:
                self._unanswered = draft.human
            return False
        end = tuple(self._template.close_turn(self._tokenizer, list(draft.passes[-1].generated)))
        turn = ChatTurn(
            draft.human, draft.answer, draft.reason, draft.passes, end, draft.first, draft.attempt, draft.tools
        )
        self._turns = [*self._older(draft), turn]  # in one go: a second Ctrl-C finds the old turns or the new
        return True


def _with_token(stats: ReplyStats, elapsed_s: float) -> ReplyStats:
    """The figures after one more token, `elapsed_s` after the request was made."""
    if stats.new_tokens == 0:
        return replace(stats, new_tokens=1, prefill_s=elapsed_s)
    return replace(stats, new_tokens=stats.new_tokens + 1, decode_s=elapsed_s - stats.prefill_s)
