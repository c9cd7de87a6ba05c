"""MOSS's calculator and equation solver as tools, computing in one process that can be killed."""

from __future__ import annotations

from moss_jt.errors import ToolError
from moss_jt.language import pick
from moss_jt.tools.sandbox import START_SECONDS, Sandbox
from moss_jt.tools.tool import Status, Tool

_CALCULATOR = ("2^10 + 1/4", "1024.25")
_SECONDS = START_SECONDS + 10  # the sandbox has a limit of its own; this one is for a start on a busy machine
_SOLVER = ("x + y = 35; 2x + 4y = 94", "x = 23\ny = 12")


def calculator(box: Sandbox) -> Tool:
    """Calculate(expression)."""
    return Tool(
        name="calc",
        title="Calculator",
        api="Calculate(expression)",
        run=lambda *texts: box.ask("calculate", ", ".join(texts)),
        quoted=True,
        broken="No calculation results.",
        seconds=_SECONDS,
        check=lambda: _try(box, "calculate", *_CALCULATOR),
        close=box.close,
    )


def solver(box: Sandbox) -> Tool:
    """Solve(equation)."""
    return Tool(
        name="solve",
        title="Equation solver",
        api="Solve(equation)",
        run=lambda *texts: box.ask("solve", ";".join(texts)),
        seconds=_SECONDS,
        check=lambda: _try(box, "solve", *_SOLVER),
        close=box.close,
    )


def _try(box: Sandbox, task: str, text: str, wanted: str) -> Status:
    """Compute something that is known."""
    try:
        found = box.ask(task, text)
    except ToolError as error:
        return Status("fail", str(error))
    if found != wanted:
        return Status("fail", f"{text}: {wanted!r} was wanted, {found!r} found.")
    return Status("ok", pick("computes here", "在本机计算"))
