"""Messages of OpenAI's API as the turns of MOSS, and those as ids.

A turn is what the user says, then perhaps one round of calls and their results, then the answer. Everything
that a client sends is encoded as plain text: no text becomes a control token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from moss_jt.server.calls import Call, Function, write_calls, write_results
from moss_jt.server.refusals import wrong
from moss_jt.template import META_INSTRUCTION, Template, ToolLine, Turn, system_prompt

if TYPE_CHECKING:
    from moss_jt.tokenizer import Tokenizer

MOST_CHARACTERS = 64  # for each token of the context: a text that has more cannot fit, and is not even encoded


@dataclass(frozen=True)
class Message:
    """A message of a client.

    Attributes:
        calls: of an assistant, by the id that the client knows each by.
        thoughts: of an assistant.
        call_id: of a tool.
    """

    role: Literal["system", "user", "assistant", "tool"]
    text: str
    calls: tuple[tuple[str, Call], ...] = ()
    thoughts: str | None = None
    call_id: str = ""


@dataclass(frozen=True)
class Prompt:
    """What the model is given.

    Attributes:
        thinking: the model goes on with thoughts and commands, not with the answer.
        shared: leading ids of MOSS's own system prompt, which all have; 0 where a client brought another.
    """

    ids: tuple[int, ...]
    thinking: bool = False
    shared: int = 0


@dataclass
class _Reading:
    """Where the reading of messages has come to."""

    system: list[str] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    human: list[str] = field(default_factory=list)
    calls: tuple[tuple[str, Call], ...] = ()
    thoughts: str | None = None
    results: dict[str, str] = field(default_factory=dict)


def read_messages(messages: Iterable[Message]) -> tuple[str | None, list[Turn]]:
    """The system prompt (None where there is none) and the turns; the last turn has no answer yet.

    Raises:
        Refusal: 400, the messages are not in an order that a conversation can have.
    """
    reading = _Reading()
    for number, message in enumerate(messages):
        _READ[message.role](reading, message, f"messages[{number}]")
    if not reading.human:
        raise wrong("the last message is not of the user or of a tool, so there is nothing to answer.", "messages")
    last = _turn(reading)
    if reading.calls and len(reading.results) < len(reading.calls):
        raise wrong(
            f"{len(reading.calls)} calls were made and {len(reading.results)} have an answer. Send a message of the role "
            "tool for each.",
            "messages",
        )
    return ("\n".join(reading.system) if reading.system else None), [*reading.turns, last]


def _read_system(reading: _Reading, message: Message, _: str) -> None:
    reading.system.append(message.text)  # also one that comes later: MOSS has its system prompt at the beginning only


def _read_user(reading: _Reading, message: Message, where: str) -> None:
    if reading.calls:
        raise wrong(f"{where} is of the user, but the calls before it have no answer of the assistant.", where)
    reading.human.append(message.text)


def _read_assistant(reading: _Reading, message: Message, where: str) -> None:
    if message.calls:
        if reading.calls:
            raise wrong(f"{where} calls a second time in one turn; MOSS has one round of calls a turn.", where)
        reading.calls = message.calls
        reading.thoughts = message.thoughts if message.thoughts is not None else message.text or None
        return
    if message.thoughts is not None and not reading.calls:
        reading.thoughts = message.thoughts
    reading.turns.append(replace(_turn(reading), moss=message.text))
    reading.human, reading.calls, reading.thoughts, reading.results = [], (), None, {}


def _read_tool(reading: _Reading, message: Message, where: str) -> None:
    known = [call_id for call_id, _ in reading.calls]
    if message.call_id not in known or message.call_id in reading.results:
        raise wrong(f"{where} answers no open call: tool_call_id must be of the message before it.", where)
    reading.results[message.call_id] = message.text


_READ = {"system": _read_system, "user": _read_user, "assistant": _read_assistant, "tool": _read_tool}


def _turn(reading: _Reading) -> Turn:
    """What was read since the last answer."""
    answers = [(call, reading.results[call_id]) for call_id, call in reading.calls if call_id in reading.results]
    return Turn(
        human="\n".join(reading.human),
        thoughts=reading.thoughts,
        commands=write_calls(call for _, call in reading.calls),
        results=write_results(answers),
    )


def chat_prompt(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Message],
    *,
    functions: Sequence[Function] = (),
    enabled: Sequence[str | ToolLine] = (),
    context_size: int,
) -> Prompt:
    """The ids of messages, up to where the model goes on.

    Args:
        functions: the client's; with any, the model thinks first.
        enabled: tools that run here, which are offered where the client has none.

    Raises:
        Refusal: 400, the order cannot be, or it is far too long.
    """
    check_length(sum(len(message.text) for message in messages), context_size)
    system, turns = read_messages(messages)
    offered: list[str | ToolLine] = [*dict.fromkeys(function.tool for function in functions)]
    tools = offered or list(enabled)
    thinking = bool(tools) and turns[-1].commands is None
    ids = template.system_ids(tokenizer, system_text(template, tools, system))
    shared = len(ids) if system is None else 0
    for turn in turns[:-1]:
        ids += template.whole_turn(tokenizer, turn)
    last = turns[-1]
    ids += template.open_thoughts(tokenizer, last.human) if thinking else template.whole_turn(tokenizer, last)
    return Prompt(tuple(ids), thinking, shared)


def system_text(template: Template, tools: Sequence[str | ToolLine], own: str | None) -> str:
    """The system prompt: MOSS's, or a client's; with tools, the lines that announce them come after either."""
    text = system_prompt(template, tools)
    if own is None:
        return text
    if not tools:
        return own
    lines = text.removeprefix(META_INSTRUCTION)
    return f"{own}\n{lines}" if own and not own.endswith("\n") else own + lines


def check_length(characters: int, context_size: int) -> None:
    """Refuse what is too long to be even looked at.

    Raises:
        Refusal: 400.
    """
    most = MOST_CHARACTERS * context_size
    if characters > most:
        raise wrong(
            f"the texts have {characters} characters; no prompt of this model has more than {most}. Shorten them.",
            "messages",
            "context_length_exceeded",
        )
