"""Calculate(expression): a tree of the grammar to a number, as text.

Runs in the worker process, which limits its time and memory; the limits here keep most of what is too large
from being begun at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moss_jt.errors import ToolError
from moss_jt.tools.arithmetic import (
    Value,
    add,
    divide,
    floor_divide,
    make,
    multiply,
    plain,
    power,
    remainder,
    written,
)
from moss_jt.tools.functions import FUNCTIONS, KEEP_UNITS, constant, factorial
from moss_jt.tools.grammar import Apply, Both, Name, Number, Sign, Tree, parse

OPERATORS: Mapping[str, Callable[[Value, Value], Value]] = {
    "+": add,
    "-": lambda a, b: add(a, b, -1),
    "*": multiply,
    "/": divide,
    "//": floor_divide,
    "%": remainder,
    "**": power,
}


def calculate(expression: str) -> str:
    """The value of an expression, as Python prints it.

    Raises:
        ToolError: the text is no expression, holds an unknown, or its value is not a real number of bearable size.
    """
    statement = parse(expression)
    if statement.right is not None:
        raise ToolError("this is an equation: Calculate takes an expression, Solve an equation.")
    try:
        return written(value_of(statement.left))
    except (ArithmeticError, ValueError) as error:  # of mpmath: no convergence, outside of a domain
        raise ToolError(f"this has no value: {error}.") from error


def value_of(tree: Tree) -> Value:
    """The value of a tree."""
    behind: list[tuple[str, Tree]] = []
    while isinstance(tree, Both):  # a long sum leans to the left: no recursion there
        behind.append((tree.sign, tree.right))
        tree = tree.left
    value = _value_of_one(tree)
    while behind:
        sign, right = behind.pop()
        value = OPERATORS[sign](value, value_of(right))
    return value


def _value_of_one(tree: Number | Name | Apply | Sign) -> Value:
    if isinstance(tree, Number):
        return make(tree.value, whole=tree.whole, unit=tree.unit)
    if isinstance(tree, Name):
        known = constant(tree.name)
        if known is None:
            raise ToolError(f"{tree.name[:40]!r} is not known.")
        return known
    if isinstance(tree, Sign):
        return _signed(tree.sign, value_of(tree.of))
    return _applied(tree)


def _signed(sign: str, value: Value) -> Value:
    if sign == "!":
        return factorial(value)
    if sign == "percent":
        return divide(value, make(100))
    return make(-value.number, whole=value.whole, unit=value.unit) if sign == "-" else value


def _applied(tree: Apply) -> Value:
    """A function of its arguments."""
    function = FUNCTIONS.get(tree.name.lower())
    if function is None:
        raise ToolError(f"there is no function {tree.name[:40]!r}.")
    values = [value_of(argument) for argument in tree.arguments]
    if tree.name.lower() not in KEEP_UNITS:
        values = [plain(value) for value in values]
    try:
        return function(*values)
    except TypeError as error:
        raise ToolError(f"{tree.name} does not take {len(values)} arguments.") from error


def is_constant(tree: Tree) -> bool:
    """Whether a tree holds no unknown."""
    waiting = [tree]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Name) and constant(one.name) is None:
            return False
        if isinstance(one, Both):
            waiting += (one.left, one.right)
        elif isinstance(one, Sign):
            waiting.append(one.of)
        elif isinstance(one, Apply):
            waiting += one.arguments
    return True
