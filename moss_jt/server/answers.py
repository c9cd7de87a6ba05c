"""An answer as it comes: passes of the engine, told as text, thoughts, calls and results.

Plain values for both APIs. Closing a stream ends the work.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

from moss_jt.chat.reader import AnswerReader, StopCutter
from moss_jt.chat.window import MIN_ANSWER
from moss_jt.config import GenerationConfig
from moss_jt.messages import FinishedEvent, PrefillEvent, Request, TokenEvent
from moss_jt.server.calls import Call, Function, ToolResults, parse_calls
from moss_jt.server.dispatch import Again, Dispatcher
from moss_jt.server.prompts import Prompt
from moss_jt.server.tool_threads import ToolThreads
from moss_jt.template import Template
from moss_jt.tools.wording import NOTHING_RAN, fitting

if TYPE_CHECKING:
    from moss_jt.tokenizer import Tokenizer

Reason = Literal["stop", "length", "time", "cancelled", "calls"]


@dataclass(frozen=True)
class Started:
    """The engine has begun."""


@dataclass(frozen=True)
class Restarted:
    """The process of the model died, and this pass begins anew; only told before any Delta of it was passed on."""


@dataclass(frozen=True)
class Delta:
    """More text, and the tokens that it is made of; a token may have no text of its own."""

    text: str
    tokens: tuple[TokenEvent, ...]


@dataclass(frozen=True)
class Thoughts:
    """What the model thought, the calls that it wrote, and how they were read."""

    text: str
    commands: str
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Results:
    """What the tools of the server gave; None where nothing was called."""

    found: ToolResults | None


@dataclass(frozen=True)
class Usage:
    """What an answer cost."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Speed after the first token; 0 where there were fewer than two."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 and self.decode_s > 0 else 0.0


@dataclass
class Tally:
    """What an answer has cost so far, so that one that is broken off has its price, too."""

    prompt_tokens: int = 0
    new_tokens: int = 0

    @property
    def usage(self) -> Usage:
        """As far as it goes."""
        return Usage(prompt_tokens=self.prompt_tokens, new_tokens=self.new_tokens)


@dataclass(frozen=True)
class Done:
    """The answer is over; `passes` are the ids that were generated."""

    reason: Reason
    usage: Usage
    passes: tuple[tuple[int, ...], ...]


Part = Started | Restarted | Delta | Thoughts | Results | Done


@dataclass(frozen=True)
class Asker:
    """Who asks, for the queue.

    Attributes:
        user: whose turn it takes.
        most: of this user's answers at once; None for no limit.
        known: has a key; see Dispatcher.submit.
        streams: what comes is passed on at once, so that it cannot begin anew.
        continues: this is the second pass of an answer; see Dispatcher.submit.
    """

    user: str
    most: int | None = None
    known: bool = True
    streams: bool = False
    continues: bool = False


class Reader(Protocol):
    """Ids to text."""

    def push(self, token: int) -> str:
        """The text that is certain after this id."""
        ...

    def flush(self) -> str:
        """What was held back."""
        ...


class PlainReader:
    """Reads a continuation as it is: no tag is removed, only stop ids and what follows a stop string."""

    def __init__(self, tokenizer: Tokenizer, config: GenerationConfig) -> None:
        self._stop_ids = frozenset(config.stop_ids)
        self._text = tokenizer.stream()
        self._cutter = StopCutter(config.stop_strings)

    def push(self, token: int) -> str:
        """The text that is certain after this id."""
        return "" if token in self._stop_ids else self._cutter.push(self._text.push(token))

    def flush(self) -> str:
        """What was held back."""
        return self._cutter.push(self._text.flush()) + self._cutter.flush()


async def one_pass(
    dispatcher: Dispatcher, asker: Asker, request: Request, make_reader: Callable[[], Reader], tally: Tally
) -> AsyncGenerator[Started | Restarted | Delta | Done, None]:
    """Give one request to the engine, and enter in the tally what it costs.

    Raises:
        Refusal: it was not taken, or could not be done.
    """
    ticket = dispatcher.submit(asker.user, request, most=asker.most, known=asker.known, continues=asker.continues)
    reader, ids, pending = make_reader(), list[int](), list[TokenEvent]()
    begun = False
    try:
        async for event in ticket.events():
            if isinstance(event, Again):
                tally.new_tokens -= len(ids)
                reader, ids, pending = make_reader(), [], []
                yield Restarted()
            elif isinstance(event, PrefillEvent):
                if not begun:
                    begun = True
                    tally.prompt_tokens = tally.prompt_tokens or event.total
                    yield Started()
            elif isinstance(event, TokenEvent):
                tally.new_tokens += 1
                ids.append(event.id)
                pending.append(event)
                text = reader.push(event.id)
                if text:
                    ticket.passed_on = asker.streams
                    yield Delta(text, tuple(pending))
                    pending = []
            elif isinstance(event, FinishedEvent):
                rest = reader.flush()
                if rest or pending:
                    yield Delta(rest, tuple(pending))
                reason = "time" if ticket.ended and event.reason == "cancelled" else event.reason
                yield Done(reason, _usage(event), (tuple(ids),))
    finally:
        dispatcher.cancel(ticket)


def _usage(event: FinishedEvent) -> Usage:
    return Usage(event.prompt_tokens, event.reused_tokens, event.new_tokens, event.prefill_s, event.decode_s)


@dataclass(frozen=True)
class Question:
    """A prompt that is answered with a template.

    Attributes:
        context_size: tokens that prompt, thoughts, results and answer may have together.
        conversation: the name of its cache.
        functions: of the client; the model's calls of these end the answer.
        most_calls: of these functions that are given to the client; None for all.
        runner: runs calls here; None where nothing does.
        tally: what its answer costs; another question needs another.
    """

    prompt: Prompt
    config: GenerationConfig
    context_size: int
    conversation: str | None = None
    top_logprobs: int | None = None
    functions: tuple[Function, ...] = ()
    most_calls: int | None = None
    runner: ToolThreads | None = None
    tally: Tally = field(default_factory=Tally, compare=False)


async def answer(
    dispatcher: Dispatcher, asker: Asker, question: Question, tokenizer: Tokenizer, template: Template
) -> AsyncGenerator[Part, None]:
    """Answer a question, with thoughts and calls first where its prompt asks for them.

    The Done at the end has the reason "calls" where the client must answer calls.

    Raises:
        Refusal: it was not taken, or could not be done.
    """
    ids, passes, usage = question.prompt.ids, tuple[tuple[int, ...], ...](), Usage()
    config = question.config
    if question.prompt.thinking:
        thinking = Thinking(dispatcher, asker, question, tokenizer, template)
        async with aclosing(thinking.parts()) as parts:
            async for part in parts:
                yield part
        if thinking.over is not None:
            yield thinking.over
            return
        asker = replace(asker, continues=True)
        ids, passes, usage = thinking.ids, thinking.passes, thinking.usage
        config = replace(config, max_new_tokens=min(thinking.left, question.context_size - len(ids)))
    stop_ids = template.stop_ids(tokenizer)
    config = replace(config, stop_ids=stop_ids)
    request = Request(ids, config, question.conversation, question.top_logprobs, question.prompt.shared)
    source = one_pass(
        dispatcher,
        asker,
        request,
        lambda: AnswerReader(tokenizer, stop_ids, config.stop_strings),
        question.tally,
    )
    async with aclosing(source) as stream:
        async for event in stream:
            if isinstance(event, Done):
                yield Done(event.reason, _joined(usage, event.usage), (*passes, *event.passes))
            elif not (passes and isinstance(event, Started)):  # it was told before the thoughts
                yield event


class Thinking:
    """The first pass of an answer with tools: thoughts, commands, and what they give.

    Attributes:
        ids: the prompt of the second pass.
        passes: what the first generated.
        usage: what it cost.
        over: the end of the answer, where there is no second pass.
    """

    def __init__(
        self, dispatcher: Dispatcher, asker: Asker, question: Question, tokenizer: Tokenizer, template: Template
    ) -> None:
        self._dispatcher = dispatcher
        self._asker = replace(asker, streams=False)  # nothing of it is passed on before it is whole
        self._question = question
        self._tokenizer = tokenizer
        self._template = template
        self.ids: tuple[int, ...] = ()
        self.passes: tuple[tuple[int, ...], ...] = ()
        self.usage = Usage()
        self.over: Done | None = None

    async def parts(self) -> AsyncGenerator[Part, None]:
        """Think, and have the calls done."""
        question = self._question
        done = None
        async with aclosing(self._think()) as stream:
            async for event in stream:
                if isinstance(event, Done):
                    done = event
                elif not isinstance(event, Delta):
                    yield event
        assert done is not None, "a pass ends with Done"
        self.usage, self.passes = done.usage, done.passes
        text, commands = split_thoughts(self._tokenizer, done.passes[0])
        offered = {function.tool for function in question.functions}
        called = parse_calls(commands) if done.reason == "stop" else []  # of a pass that was cut the last is half
        calls = tuple(call for call in called if call.tool in offered)[: question.most_calls]
        yield Thoughts(text, commands, calls)
        if done.reason != "stop":
            self.over = done
            return
        if calls:
            self.over = Done("calls", done.usage, done.passes)
            return
        results = None
        if question.runner is not None and not question.functions:
            found = await question.runner.run(self._asker.user, commands)
            if found is not None:
                found = replace(found, text=fitting(found.text, lambda text: self._free(text) >= self._room()))
            yield Results(found)
            results = None if found is None else found.text
        if self._free(results) < min(self._room(), MIN_ANSWER):
            self.over = replace(done, reason="length")
            return
        self.ids = self._continued(results)

    @property
    def left(self) -> int:
        """Tokens that the answer may have after the thoughts."""
        return max(1, self._question.config.max_new_tokens - self.usage.new_tokens)

    def _room(self) -> int:
        """Tokens that the answer should have."""
        return min(self.left, self._question.context_size // 4)

    def _free(self, results: str | None) -> int:
        """Tokens that these results leave for the answer."""
        return self._question.context_size - len(self._continued(results))

    def _continued(self, results: str | None) -> tuple[int, ...]:
        """The prompt of the answer; that nothing ran is said as in the training data, where tools are on."""
        (thoughts,) = self.passes
        said = NOTHING_RAN if results is None else results
        closing = self._template.close_commands(self._tokenizer, thoughts, said)
        return (*self._question.prompt.ids, *thoughts, *closing)

    def _think(self) -> AsyncGenerator[Started | Restarted | Delta | Done, None]:
        stop_ids = self._template.command_stop_ids(self._tokenizer)
        prompt, config = self._question.prompt, self._question.config
        longest = max(MIN_ANSWER, self._question.context_size - len(prompt.ids) - self._room())
        length = min(longest, config.max_new_tokens)
        config = replace(config, stop_ids=stop_ids, stop_strings=(), max_new_tokens=length)
        request = Request(prompt.ids, config, self._question.conversation, shared=prompt.shared)
        tally = self._question.tally
        return one_pass(self._dispatcher, self._asker, request, lambda: PlainReader(self._tokenizer, config), tally)


def split_thoughts(tokenizer: Tokenizer, generated: Sequence[int]) -> tuple[str, str]:
    """The texts of thoughts and commands; where the end of the thoughts is missing, the tag divides them."""
    text = tokenizer.decode(generated, skip_special=True)
    thoughts, _, commands = text.partition("<|Commands|>:")
    return thoughts.strip(), commands.strip()


def _joined(first: Usage, second: Usage) -> Usage:
    """Two passes as one: tokens that the first gave and the second found in the cache are no prompt."""
    return Usage(
        second.prompt_tokens if first.prompt_tokens == 0 else first.prompt_tokens,
        second.reused_tokens if first.prompt_tokens == 0 else first.reused_tokens,
        first.new_tokens + second.new_tokens,
        first.prefill_s + second.prefill_s,
        first.decode_s + second.decode_s,
    )
