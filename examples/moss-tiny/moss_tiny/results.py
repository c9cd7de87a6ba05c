"""What the product's own tools answer: the Results field of a turn, in their wording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from moss_jt.template import IMAGE_RESULT
from moss_jt.tools.calculate import calculate
from moss_jt.tools.commands import Call, parse_commands
from moss_jt.tools.equations import solve
from moss_jt.tools.tool import Answer, Hit, Tool
from moss_jt.tools.wording import answered, joined

Search = Callable[[str], Sequence[Hit]]


@cache
def value_of(function: str, argument: str) -> str:
    """What Calculate or Solve answers.

    Raises:
        ToolError: there is no result.
    """
    return calculate(argument) if function == "Calculate" else solve(argument)


def calls_of(commands: str) -> tuple[Call, ...]:
    """The calls of a Commands field."""
    return parse_commands(commands).calls


def results_of(commands: str, search: Search | None = None) -> str:
    """The Results field that the tools give for a Commands field.

    Args:
        commands: calls of MOSS's tools.
        search: what Search finds; needed where there is such a call.

    Raises:
        ToolError: Calculate or Solve has no result.
    """
    blocks: list[str] = []
    first = 1
    for call in calls_of(commands):
        if call.name == "Text2Image":
            return IMAGE_RESULT
        answer = _answer(call, search)
        blocks.append(answered(call, _TOOLS[call.name], answer, first))
        first += 0 if isinstance(answer, str) else len(list(answer))
    return joined(blocks)


def _answer(call: Call, search: Search | None) -> str | Sequence[Hit]:
    (argument,) = call.arguments
    if call.name != "Search":
        return value_of(call.name, argument)
    assert search is not None, "a call of Search, and nothing to search in"
    return search(argument)


def _not_run(*_texts: str) -> Answer:
    raise AssertionError("the tools are run by value_of and the search; here only their wording is used")


_TOOLS = {
    "Calculate": Tool("calc", "Calculator", "Calculate(expression)", _not_run, quoted=True),
    "Solve": Tool("solve", "Equation solver", "Solve(equation)", _not_run),
    "Search": Tool("search", "Web search", "Search(query)", _not_run),
}
