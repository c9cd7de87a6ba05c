"""A conversation of MOSS's own API: its prompt from the store, its answer into the store.

What is kept are texts and generated ids. Where the ids still say what the text says, the prompt of the next
turn begins with exactly what the engine has in its cache, and only the new tokens are computed.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from moss_jt.chat.reader import AnswerReader
from moss_jt.chat.window import MIN_ANSWER, first_turn, thinking_room
from moss_jt.config import GenerationConfig
from moss_jt.server.answers import Delta, Done, Part, Question, Restarted, Results, Started, Thoughts, Usage, answer
from moss_jt.server.calls import ToolResults
from moss_jt.server.prompts import Prompt, check_length, system_text
from moss_jt.server.refusals import Refusal, wrong
from moss_jt.server.service import Service, Speaker
from moss_jt.server.store import StoredTurn, add_turn, check_last, check_number, new_uid, read_turns
from moss_jt.server.users import User
from moss_jt.template import Template, Turn
from moss_jt.tools.wording import NOTHING_RAN

if TYPE_CHECKING:
    from moss_jt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Wish:
    """What is asked.

    Attributes:
        uid: of a conversation to continue; None begins one.
        max_length: tokens of prompt and answer together, as MOSS counts.
        config: how to choose; its length is cut to what fits.
        streams: what comes is passed on at once.
        replaces: number of the last turn, whose place this one takes once it is kept; None adds one.
    """

    text: str
    uid: str | None
    max_length: int
    config: GenerationConfig
    streams: bool = False
    replaces: int | None = None


@dataclass(frozen=True)
class Begun:
    """The engine has begun.

    Attributes:
        uid: of the conversation, also where it is new: it opens once a turn of it is in the store.
    """

    uid: str


@dataclass(frozen=True)
class Answered:
    """The turn is over, and in the store.

    Attributes:
        history: every turn, as (human, answer).
        asked_at: local time of the question.
    """

    uid: str
    turn: StoredTurn
    history: tuple[tuple[str, str], ...]
    asked_at: str
    usage: Usage


class _Place(NamedTuple):
    """Where a turn goes: its number, and whether another gives it its place."""

    number: int
    replaces: bool


@dataclass
class _Draft:
    """A turn being answered."""

    human: str
    first: int
    answer: str = ""
    ids: list[int] = field(default_factory=list)
    thoughts: str | None = None
    commands: str | None = None
    found: ToolResults | None = None
    done: Done | None = None

    def take(self, part: Part) -> None:
        """Enter what came."""
        if isinstance(part, Restarted):
            self.answer, self.ids = "", []  # the pass begins anew; thoughts are of one that is over
        elif isinstance(part, Delta):
            self.answer += part.text
            self.ids += [token.id for token in part.tokens]
        elif isinstance(part, Thoughts):
            self.thoughts, self.commands = part.text, part.commands
        elif isinstance(part, Results):
            self.found = part.found
        elif isinstance(part, Done):
            self.done = part

    def turn(self) -> StoredTurn:
        """What is kept of it."""
        done = self.done
        reason = "cancelled" if done is None or done.reason == "calls" else done.reason
        passes = (tuple(self.ids),) if done is None else done.passes
        found = self.found or ToolResults("")
        return StoredTurn(
            self.human,
            self.answer,
            reason,
            passes,
            self.first,
            self.thoughts,
            self.commands,
            None if self.found is None else found.text,
            sources=found.sources,
            pictures=found.pictures,
        )


async def converse(service: Service, user: User, wish: Wish) -> AsyncGenerator[Part | Begun | Answered, None]:
    """Answer in a conversation, which Begun names; the turn is in the store before the last value comes.

    Where the stream ends before the answer does, what was passed on is kept as a turn. Of an answer that is ended
    before its first word nothing is: it would take the place of one that has some.

    Raises:
        Refusal: the uid is unknown, there are too many conversations to begin one, the text does not fit, the turn to
            replace is not the last, the request was not taken, or its time was over before the answer's first word.
    """
    speaker, asked_at = service.speaker, datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    check_length(len(wish.text), speaker.context_size)
    uid = wish.uid or new_uid()
    async with service.turnstiles.hold(f"{user.owner}\0{uid}"):
        turns = await _turns(service, user, wish.uid)
        if wish.replaces is not None:
            check_last(turns, wish.replaces)
            turns = turns[:-1]
        place = _Place(len(turns), wish.replaces is not None)
        question, first = await service.encode(_question, service, speaker, wish, turns)
        question = replace(question, conversation=conversation_name(user.owner, uid))
        draft = _Draft(wish.text, first)
        keeping: asyncio.Future[StoredTurn] | None = None
        try:
            template = speaker.template(tools=question.runner is not None)
            asker = user.asker(streams=wish.streams)
            source = answer(service.dispatcher, asker, question, speaker.tokenizer, template)
            async with aclosing(source) as parts:
                async for part in parts:
                    draft.take(part)
                    if isinstance(part, Started):
                        yield Begun(uid)
                    elif not isinstance(part, Done):
                        yield part
            assert draft.done is not None, "an answer ends with Done"
            if not draft.answer and draft.done.reason in ("time", "cancelled"):
                raise _unsaid(service, replaces=place.replaces)
            keeping = asyncio.ensure_future(_keep(service, user, uid, draft, place))
            turn = await asyncio.shield(keeping)
        except (GeneratorExit, asyncio.CancelledError, Refusal):
            if keeping is None and wish.streams and draft.answer:
                keeping = asyncio.ensure_future(_keep(service, user, uid, draft, place))
            if keeping is not None:
                with suppress(Refusal):  # what is told is why the answer ended
                    await asyncio.shield(keeping)
            raise
        finally:
            tally = question.tally
            await asyncio.shield(service.users.charge(user, tally.prompt_tokens + tally.new_tokens))
        history = tuple((one.human, one.answer) for one in (*turns, turn))
        yield Answered(uid, turn, history, asked_at, draft.done.usage)


def _unsaid(service: Service, *, replaces: bool) -> Refusal:
    """An answer was ended before its first word: by its time, or with the server."""
    kept = "The turn that it should replace is kept." if replaces else "Nothing of it is kept."
    return Refusal(
        503,
        f"the answer was ended before its first word; it may take {service.settings.answer_s:g} s (--answer-time), and "
        f"ends with the server. {kept} Ask again, or ask something shorter.",
        "no_answer",
        retry_after_s=service.dispatcher.wait_estimate_s(),
    )


def conversation_name(owner: str, uid: str) -> str:
    """The name of its cache in the engine."""
    return f"chat {owner} {uid}"


async def _turns(service: Service, user: User, uid: str | None) -> list[StoredTurn]:
    """What was said; where nothing was, it is seen before the answer whether it may be kept."""
    if uid is not None:
        return await service.database.run(read_turns, user.owner, uid)
    if user.key is not None:
        await service.database.run(check_number, user.owner, service.settings.conversations)
    return []


async def _keep(service: Service, user: User, uid: str, draft: _Draft, place: _Place) -> StoredTurn:
    """Put a turn into the store."""
    turn, most = draft.turn(), service.settings.conversations
    number, replaces = place
    await service.database.run(
        add_turn, user.owner, uid, turn, number=number, most=most, replaces=replaces, key=user.key
    )
    return turn


def _question(service: Service, speaker: Speaker, wish: Wish, turns: Sequence[StoredTurn]) -> tuple[Question, int]:
    """The prompt of a turn, and the oldest turn in it; called in the tokenizer's thread."""
    enabled = list(service.tools.enabled) if service.tools is not None else []
    runner = service.tools if enabled else None
    template, tokenizer = speaker.template(tools=bool(enabled)), speaker.tokenizer
    system = template.system_ids(tokenizer, system_text(template, enabled, None))
    opening = template.open_thoughts(tokenizer, wish.text) if enabled else template.open_turn(tokenizer, wish.text)
    size = min(wish.max_length, speaker.context_size)
    own, wanted = len(system) + len(opening), wish.config.max_new_tokens
    room = min(wanted, size // 4)
    if own + min(room, MIN_ANSWER) > size:
        raise wrong(
            f"the prompt has {len(opening)} tokens and the system prompt {len(system)}; max_length and the model allow "
            f"{size} with the answer. Shorten it, or raise max_length.",
            "prompt",
            "context_length_exceeded",
        )
    if enabled:
        room += thinking_room(size)
    before = turns[-1].first if turns else 0
    written = [turn_ids(tokenizer, template, turn) for turn in turns[before:]]
    start = first_turn([len(ids) for ids in written], 0, own=own, size=size, room=room)
    ids = [*system, *(i for one in written[start:] for i in one), *opening]
    longest = min(wanted, service.settings.max_new_tokens, size - len(ids))
    config = replace(wish.config, max_new_tokens=longest, max_time=service.settings.answer_s)
    return Question(Prompt(tuple(ids), bool(enabled), len(system)), config, size, runner=runner), before + start


def turn_ids(tokenizer: Tokenizer, template: Template, turn: StoredTurn) -> list[int]:
    """A turn as it stands in a prompt: its generated ids where they say what its text says, else the text anew."""
    *before, last = turn.passes
    results = NOTHING_RAN if turn.thoughts is not None and turn.results is None else turn.results
    if all(_are_plain(tokenizer, ids) for ids in turn.passes) and _text_of(tokenizer, template, last) == turn.answer:
        closing = template.close_turn(tokenizer, last)
        if turn.thoughts is None and not before:
            return [*template.open_turn(tokenizer, turn.human), *last, *closing]
        if len(before) == 1 and template.name == "fields":
            thinking = [*template.open_thoughts(tokenizer, turn.human), *before[0]]
            return [*thinking, *template.close_commands(tokenizer, before[0], results), *last, *closing]
    whole = Turn(turn.human, turn.thoughts, turn.commands, results, turn.answer)
    return template.whole_turn(tokenizer, whole)


def _are_plain(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether this tokenizer knows them, and no control token hides among them but those of a field's end."""
    ends = {tokenizer.markers[name] for name in ("<eot>", "<eoc>") if name in tokenizer.markers}
    hidden = tokenizer.control_ids - ends
    return all(tokenizer.is_known(i) for i in ids) and not any(i in hidden for i in ids[:-1])


def _text_of(tokenizer: Tokenizer, template: Template, ids: Sequence[int]) -> str:
    reader = AnswerReader(tokenizer, template.stop_ids(tokenizer))
    return "".join(map(reader.push, ids)) + reader.flush()
