"""Results as the training data writes them.

    Search("q") =>              Calculate("e") => '270.0'       Solve("a;b") =>
    <|1|>: 'text'               Calculate("f") => 'No result.'  x = 30
    <|2|>: 'text'                                               y = 2

The call is repeated as the model wrote it. Texts of a search are written as Python writes a string, and cut after 400
characters of that, so a long one has no closing quote; what answers the question by itself has its title before it.
Text from outside cannot look like a tag or a source's number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from moss_jt.template import IMAGE_RESULT
from moss_jt.tools.tool import Hit, Picture

if TYPE_CHECKING:
    from moss_jt.tools.commands import Call
    from moss_jt.tools.tool import Answer, Tool

NO_RESULT = "No result."
NOTHING_RAN = "None"  # the Results of a turn with tools in which none was called
LONGEST_HIT = 400  # characters of a text found by a search, quotes and all
LONGEST_CALL = 1000  # characters of a call that are repeated
SHORT_RESULT = 60  # and of a line of results, where room is needed
_TAG_LIKE = re.compile(r"<(?=\||/?eo[htcrm]>)")


def harmless(text: str) -> str:
    """Text in which nothing looks like a tag of the conversation, a marker or a source's number."""
    return _TAG_LIKE.sub("< ", text)


def answered(call: Call, tool: Tool, answer: Answer, first: int = 1) -> str:
    """The block of a call that has an answer.

    Args:
        call: as it was written.
        tool: that answered.
        answer: what it said.
        first: number of the first source.
    """
    if isinstance(answer, Picture):
        return IMAGE_RESULT
    if isinstance(answer, str):
        text = harmless(answer.strip())
        return f"{_repeated(call)} => {text!r}" if tool.quoted else f"{_repeated(call)} =>\n{text}"
    if not answer:
        return failed(call, tool)
    lines = [f"<|{number}|>: {_hit(hit)}" for number, hit in enumerate(answer, first)]
    return "\n".join([f"{_repeated(call)} =>", *lines])


def failed(call: Call, tool: Tool | None, *, broken: bool = False) -> str:
    """The block of a call without a result; without a tool, where it may not be called or does not exist."""
    if tool is None:
        return f"{_repeated(call)} => {NO_RESULT}"
    words = tool.broken if broken and tool.broken is not None else tool.failure
    if words is not None:
        return f"{_repeated(call)} => {words}"
    return f"{_repeated(call)} => {NO_RESULT!r}" if tool.quoted else f"{_repeated(call)} =>\n{NO_RESULT}"


def joined(blocks: Iterable[str]) -> str:
    """The Results of a turn."""
    return "\n".join(blocks).strip() or NOTHING_RAN


def shortened(results: str, longest: int) -> str:
    """Results with every line cut to `longest` characters; calls and the numbers of sources stay."""
    return "\n".join(_cut(line, longest) for line in results.split("\n"))


def fitting(results: str, fits: Callable[[str], bool]) -> str:
    """Results as long as they may be: whole, with shorter lines, in the end as if nothing had run."""
    shorter = (results, shortened(results, 200), shortened(results, SHORT_RESULT))
    return next(filter(fits, shorter), NOTHING_RAN)


def _cut(line: str, longest: int) -> str:
    if len(line) <= longest or line.endswith(" =>"):
        return line
    quote = line[-1] if line[-1] in "'\"" else ""
    return f"{line[:longest].rstrip()} ...{quote}"


def _repeated(call: Call) -> str:
    return harmless(" ".join(call.text.split("\n"))[:LONGEST_CALL])


def _hit(hit: Hit) -> str:
    title = f"{harmless(' '.join(hit.title.split()))}: " if hit.direct and hit.title else ""
    return title + repr(harmless(hit.text))[:LONGEST_HIT]
