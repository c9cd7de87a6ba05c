"""ToolBox: the tools that are on, and the running of what a model wrote, within limits.

    box = ToolBox([calculator(Sandbox())])
    for ran in box.run('Calculate("2^10")'):
        ran.block                            "Calculate("2^10") => '1024'"

Results stand in the order of the training data: grouped by tool, as the system prompt lists them, not in the
order of the calls. Sources are numbered on across the searches of a turn. What a tool raises, and what takes too
long, becomes the training data's words for it; nothing gets out of here but results.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moss_jt.errors import ConfigError, MossError, ToolError, ToolLimitError
from moss_jt.template import TOOLS
from moss_jt.tools.commands import Call, Commands, parse_commands
from moss_jt.tools.tool import Hit, Picture, Tool
from moss_jt.tools.wording import answered, failed, shortened

if TYPE_CHECKING:
    from moss_jt.template import ToolLine
    from moss_jt.tools.tool import Answer

_log = logging.getLogger(__name__)
_HITS_OF_ONE = {1: 3, 2: 2}  # searches in a turn -> hits of each; one where there are more


@dataclass(frozen=True)
class Limits:
    """What one turn may ask of its tools.

    Attributes:
        calls: that are run; the training data has ten at most.
        seconds: for all calls together.
        characters: of one call's results.
    """

    calls: int = 10
    seconds: float = 600.0
    characters: int = 3000


@dataclass(frozen=True)
class Source:
    """What a number in an answer points to.

    Attributes:
        number: as in `<|n|>`.
        title: of the page or document; "" if unknown.
        url: "" if it is nowhere.
        text: what the model saw of it.
    """

    number: int
    title: str
    url: str
    text: str


@dataclass(frozen=True)
class Ran:
    """A call and what came of it.

    Attributes:
        call: as it was understood.
        block: its part of the Results.
        sources: what it found, numbered.
        picture: what it drew.
        error: why there is no result; "" where there is one.
        seconds: it took.
    """

    call: Call
    block: str
    sources: tuple[Source, ...] = ()
    picture: Picture | None = None
    error: str = ""
    seconds: float = 0.0


@dataclass
class _Turn:
    """What the calls of one turn share."""

    searches: int
    until: float
    next_source: int = 1
    known: dict[tuple[str, tuple[str, ...]], Answer | ToolError] = field(default_factory=dict)


class ToolBox:
    """The tools of a conversation.

    Args:
        tools: those that are on; MOSS's own come first, in the order of its system prompt.
        limits: for each turn.

    Raises:
        ConfigError: two of them have one name or are called alike.
    """

    def __init__(self, tools: Sequence[Tool], limits: Limits | None = None) -> None:
        own = list(TOOLS)
        self.tools = tuple(sorted(tools, key=lambda tool: own.index(tool.name) if tool.name in own else len(own)))
        self.limits = limits or Limits()
        self._by_function: dict[str, Tool] = {}
        for tool in self.tools:
            other = self._by_function.setdefault(tool.function.lower(), tool)
            if other is not tool or sum(one.name == tool.name for one in self.tools) > 1:
                raise ConfigError(f"two tools are called {tool.function} or named {tool.name}. Leave one of them out.")

    @property
    def lines(self) -> list[str | ToolLine]:
        """What `moss_jt.template.system_prompt` takes: names of MOSS's tools, and lines of others."""
        return [tool.name if tool.name in TOOLS else tool.line for tool in self.tools]

    def run(self, commands: str | Commands) -> Iterator[Ran]:
        """Run the calls of a Commands field, one after the other.

        A call of a tool that is not here is refused. Calls beyond the limit are not run and have no block.
        KeyboardInterrupt passes through.
        """
        understood = parse_commands(commands) if isinstance(commands, str) else commands
        _log.debug("commands understood as: %s", understood.describe())
        calls = sorted(understood.calls[: self.limits.calls], key=self._place)
        turn = _Turn(sum(self._is_search(call) for call in calls), time.monotonic() + self.limits.seconds)
        for call in calls:
            yield self._run_one(call, turn)

    def close(self) -> None:
        """Give back what the tools hold; they start again when they are called."""
        for tool in self.tools:
            if tool.close is not None:
                tool.close()

    def find(self, name: str) -> Tool | None:
        """The tool that a call of this name means."""
        return self._by_function.get(name.lower())

    def _place(self, call: Call) -> int:
        tool = self.find(call.name)
        return self.tools.index(tool) if tool is not None else len(self.tools)

    def _is_search(self, call: Call) -> bool:
        tool = self.find(call.name)
        return tool is not None and tool.name == "search"

    def _run_one(self, call: Call, turn: _Turn) -> Ran:
        """Run one call; whatever happens, there is a block."""
        tool = self.find(call.name)
        if tool is None:
            return Ran(call, failed(call, None), error=f"there is no tool {call.name}, or it is not on.")
        began = time.monotonic()
        key = (tool.name, call.arguments)
        if key not in turn.known:
            turn.known[key] = _answer(tool, call, min(tool.seconds, turn.until - began))
        answer, seconds = turn.known[key], time.monotonic() - began
        if isinstance(answer, ToolError):
            block = failed(call, tool, broken=isinstance(answer, ToolLimitError))
            return Ran(call, block, error=str(answer), seconds=seconds)
        return self._finished(call, tool, answer, turn, seconds)

    def _finished(self, call: Call, tool: Tool, answer: Answer, turn: _Turn, seconds: float) -> Ran:
        """The block of an answer, with its sources or its picture."""
        if isinstance(answer, (str, Picture)):
            text = answer[: self.limits.characters] if isinstance(answer, str) else answer
            picture = answer if isinstance(answer, Picture) else None
            return Ran(call, answered(call, tool, text), picture=picture, seconds=seconds)
        hits = answer[: _HITS_OF_ONE.get(turn.searches, 1)] if tool.name == "search" else answer
        first, turn.next_source = turn.next_source, turn.next_source + len(hits)
        sources = tuple(Source(number, hit.title, hit.url, hit.text) for number, hit in enumerate(hits, first))
        block = answered(call, tool, hits, first)
        if len(block) > self.limits.characters:
            block = shortened(block, max(20, self.limits.characters // max(1, len(hits))))
        error = "" if hits else "nothing was found."
        return Ran(call, block, sources=sources, error=error, seconds=seconds)


def _answer(tool: Tool, call: Call, seconds: float) -> Answer | ToolError:
    """What a tool says to a call, or why it says nothing.

    It runs in a thread, so that one that hangs is left behind after its time; the thread ends with the program.
    """
    found: list[Answer | ToolError] = []

    def work() -> None:
        try:
            found.append(_checked(tool, tool.run(*call.arguments)))
        except ToolError as error:
            found.append(error)
        except MossError as error:
            found.append(ToolError(str(error)))
        except Exception as error:  # of anybody's tool: the model answers without it
            _log.debug("the tool %s failed", tool.name, exc_info=True)
            found.append(ToolLimitError(f"{tool.function} failed: {type(error).__name__}: {error}"))

    if seconds <= 0:
        return ToolLimitError("the time for the tools of this turn is used up.")
    thread = threading.Thread(target=work, name=f"tool-{tool.name}", daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else ToolLimitError(f"{tool.function} took longer than {seconds:.0f} s.")


def _checked(tool: Tool, answer: object) -> Answer:
    """An answer of one of the three kinds.

    Raises:
        ToolError: it is none of them, or empty.
    """
    if isinstance(answer, Picture):
        return answer
    if isinstance(answer, str):
        if answer.strip():
            return answer
        raise ToolError(f"{tool.function} gave an empty answer.")
    if isinstance(answer, Sequence) and all(isinstance(one, Hit) for one in answer):
        return answer
    raise ToolError(f"{tool.function} gave a {type(answer).__name__}; a tool gives a text, hits or a picture.")


def pick_tools(wanted: Sequence[str], available: Mapping[str, Tool]) -> list[Tool]:
    """The tools of these names.

    Raises:
        ConfigError: there is none of a name.
    """
    for name in wanted:
        if name not in available:
            raise ConfigError(f"there is no tool {name!r}; there are {', '.join(available)}. See: moss-jt tools")
    return [available[name] for name in dict.fromkeys(wanted)]
