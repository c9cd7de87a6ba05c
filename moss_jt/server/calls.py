"""Tools, as the server sees them: the functions of a client, and the seam to tools that run here.

MOSS knows four tools, each with one text as its argument. A client's function that is named like one of
them stands for it: what the model calls comes back as `tool_calls`, and what the client answers becomes
Results in the wording of the training data. Running tools here is the part of whoever gives a ToolRunner.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from moss_jt.server.refusals import wrong
from moss_jt.template import IMAGE_RESULT, TOOLS, ToolLine
from moss_jt.tools.commands import parse_commands

MOST_CALLS = 16
PICTURE_TYPES = ("image/png", "image/jpeg", "image/webp")
FUNCTIONS = {  # what a client may call a function -> the tool that it stands for
    "search": "search",
    "Search": "search",
    "web_search": "search",
    "calc": "calc",
    "calculate": "calc",
    "Calculate": "calc",
    "calculator": "calc",
    "solve": "solve",
    "Solve": "solve",
    "equation_solver": "solve",
    "draw": "draw",
    "Text2Image": "draw",
    "text2image": "draw",
    "text_to_image": "draw",
}
_APIS = {key: line.api.partition("(")[0] for key, line in TOOLS.items() if line.api}
_TOOL_OF_API = {api.lower(): key for key, api in _APIS.items()}


@dataclass(frozen=True)
class FoundSource:
    """What a number in an answer points to; `url` is "" if it is nowhere."""

    number: int
    title: str
    url: str


@dataclass(frozen=True)
class DrawnPicture:
    """A picture that a tool drew.

    Attributes:
        name: that nobody can guess; it opens the picture to the conversation's owner.
        type: as "image/png".
        note: what is to be known about it, "" for nothing.
        content: the file; b"" where only what is told of it was read.
    """

    name: str
    type: str
    note: str
    content: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class ToolResults:
    """What the calls of a turn gave.

    Attributes:
        text: of the Results field.
    """

    text: str
    sources: tuple[FoundSource, ...] = ()
    pictures: tuple[DrawnPicture, ...] = ()


class ToolRunner(Protocol):
    """Tools that run on the server."""

    @property
    def enabled(self) -> Sequence[str | ToolLine]:
        """The tools that are offered, as moss_jt.template.system_prompt takes them."""
        ...

    def run(self, commands: str) -> ToolResults | None:
        """Do what a Commands field asks, within limits of its own.

        Called in a thread. It never raises: failures are told in the training data's wording. None where
        there was nothing to do.
        """
        ...


@dataclass(frozen=True)
class Call:
    """A call of a tool, by its key in TOOLS."""

    tool: str
    argument: str

    def __str__(self) -> str:
        return f'{_APIS[self.tool]}("{self.argument}")'


@dataclass(frozen=True)
class Function:
    """A function of a client that stands for a tool.

    Attributes:
        name: the client's.
        parameter: the client's name of its one argument.
    """

    name: str
    parameter: str

    @property
    def tool(self) -> str:
        """The tool that it stands for."""
        return FUNCTIONS[self.name]

    def arguments(self, call: Call) -> str:
        """The arguments of a call, as JSON."""
        return json.dumps({self.parameter: call.argument}, ensure_ascii=False)


def parse_calls(commands: str) -> list[Call]:
    """The calls of a Commands field; what is none is passed over."""
    found = parse_commands(commands).calls
    known = [call for call in found if call.name.lower() in _TOOL_OF_API and call.arguments]
    return [Call(_TOOL_OF_API[call.name.lower()], " ".join(call.arguments[0].split())) for call in known][:MOST_CALLS]


def write_calls(calls: Iterable[Call]) -> str | None:
    """The Commands field of these calls."""
    return ", ".join(map(str, calls)) or None


def read_call(name: str, arguments: str) -> Call:
    """A call that a client gives back.

    Raises:
        Refusal: 400, the arguments are not an object with one text.
    """
    try:
        values = json.loads(arguments)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or len(values) != 1 or not isinstance(next(iter(values.values())), str):
        raise wrong(
            f"the arguments of a call of {name} are not a JSON object with one text. Send them back as they came.",
            "messages",
        )
    return Call(FUNCTIONS[name], " ".join(next(iter(values.values())).split()))


def write_results(answers: Sequence[tuple[Call, str]]) -> str | None:
    """The Results field of calls and what a client's functions gave, in the training data's wording."""
    blocks = []
    number = 1
    for call, text in answers:
        if call.tool == "draw":
            blocks.append(IMAGE_RESULT if text.strip() else "No result.")
        elif text.lstrip().startswith(f"{_APIS[call.tool]}("):
            blocks.append(text.strip())
        elif call.tool == "calc":
            blocks.append(f"{call} => {_quoted(text.strip() or 'No result.')}")
        else:
            found, number = _numbered(text, number) if call.tool == "search" else (text.strip(), number)
            blocks.append(f"{call} =>\n{found or 'No result.'}")
    return "\n".join(blocks) or None


def _numbered(text: str, number: int) -> tuple[str, int]:
    """The result of a search with a number that the answer can cite; those that have numbers keep them."""
    text = text.strip()
    if not text:
        return "", number
    marks = len(re.findall(r"<\|\d+\|>", text))
    return (text, number + marks) if marks else (f"<|{number}|>: {_quoted(text)}", number + 1)


def _quoted(text: str) -> str:
    """A text in quotes on one line, as the data has it; one that is in quotes stays."""
    whole = len(text) > 1 and text[0] in "'\"" and text[-1] == text[0] and "\n" not in text
    return text if whole else repr(text)
