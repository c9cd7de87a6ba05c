"""The functions and constants of the calculator, by name.

Angles are radians, as in Python, unless they are written with °.
A function takes values and gives one. Exact arguments give exact results where that is possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import reduce
from typing import Any, cast

from moss_jt.errors import ToolError
from moss_jt.tools.arithmetic import (
    MAX_BITS,
    Value,
    add,
    context,
    divide,
    exact,
    is_nothing,
    make,
    plain,
    power,
    real,
    remainder,
    root,
)

MAX_FACTORIAL = 5000
KEEP_UNITS = frozenset(
    ["abs", "fabs", "max", "min", "sum", "mean", "average", "avg", "round"]
)  # others take plain numbers
ANGULAR = frozenset(["sin", "cos", "tan", "cot", "sec", "csc"])  # functions of an angle
Function = Callable[..., Value]


def constant(name: str) -> Value | None:
    """pi, e or tau, in any case of letters but for E; None for another name."""
    mp = context()
    found = {"pi": mp.pi, "e": mp.e, "tau": 2 * mp.pi}.get("" if name == "E" else name.lower())
    return None if found is None else make(+found)


def whole(value: Value, name: str) -> int:
    """The value as a whole number.

    Raises:
        ToolError: it is none.
    """
    number = exact(value)
    if number is None or number.denominator != 1:
        raise ToolError(f"{name} needs whole numbers.")
    return number.numerator


def factorial(value: Value) -> Value:
    """n!, for n up to `MAX_FACTORIAL`."""
    n = whole(plain(value), "a factorial")
    if n < 0:
        raise ToolError("the factorial of a negative number is not defined.")
    if n > MAX_FACTORIAL:
        raise ToolError(f"a factorial above {MAX_FACTORIAL}! is too large.")
    return make(math.factorial(n), whole=True)


def _through(name: str) -> Function:
    """A function of mpmath with one argument."""

    def apply(value: Value) -> Value:
        number = real(value) * context().pi / 180 if value.unit == "°" else real(value)
        if number and context().mag(number) > 200:  # sin(1e300) would need 300 digits of pi; exp(1e60) is no number
            raise ToolError(f"the argument of {name} is too large.")
        found = getattr(context(), name)(number)
        if name not in ANGULAR or not number:
            return make(found)
        least = min(abs(number), 1)  # sin(pi) is 0, not 1e-51, and tan(pi/2) no number; but sin(1e-60) is 1e-60
        if is_nothing(1 / least, beside=found):
            raise ToolError(f"{name} has no value there.")
        return make(0 if is_nothing(found, beside=least) else found)

    return apply


def _to_whole(rounding: Callable[[Fraction], int], inexact: str = "") -> Function:
    """A rounding; without a name for numbers that are not exact, these lose what is behind the point."""

    def apply(value: Value) -> Value:
        number = exact(value)
        if number is None:
            number = Fraction(int(getattr(context(), inexact)(value.number) if inexact else value.number))
        return make(rounding(number), whole=True)

    return apply


def _round(value: Value, places: Value | None = None) -> Value:
    count = 0 if places is None else whole(places, "the places of round")
    if abs(count) > 100:
        raise ToolError("round takes up to 100 places.")
    number = exact(value)
    if number is None and context().mag(value.number) < -MAX_BITS:
        number = Fraction(0)  # as a fraction it would fill the memory
    kept = number if number is not None else Fraction(str(context().nstr(value.number, 50)))
    return make(round(kept, count), whole=places is None or value.whole, unit=value.unit)


def _logarithm(value: Value, base: Value | None = None) -> Value:
    mp = context()
    if real(value) <= 0 or (base is not None and (real(base) <= 0 or real(base) == 1)):
        raise ToolError("the logarithm of such a number is not real.")
    return make(mp.log(real(value)) if base is None else mp.log(real(value)) / mp.log(real(base)))


def _log_of(base: int) -> Function:
    return lambda value: _logarithm(value, make(base))


def _best(choose: Callable[..., Any]) -> Function:
    def apply(first: Value, *more: Value) -> Value:
        values = (first, *more)
        if len({value.unit for value in values}) > 1:
            values = tuple(map(plain, values))
        if other := {value.unit for value in values} - {values[0].unit}:
            units = f"{values[0].unit or 'a plain number'} and {other.pop() or 'a plain number'}"
            raise ToolError(f"{units} cannot be compared.")
        return cast(Value, choose(values, key=real))

    return apply


def _sum(first: Value, *more: Value) -> Value:
    return reduce(add, more, first)


def _mean(first: Value, *more: Value) -> Value:
    return divide(_sum(first, *more), make(1 + len(more)))


def _of_whole(name: str, function: Callable[..., int]) -> Function:
    def apply(first: Value, *more: Value) -> Value:
        numbers = [whole(value, name) for value in (first, *more)]
        if name in ("comb", "perm") and (min(numbers) < 0 or max(numbers) > MAX_FACTORIAL):
            raise ToolError(f"the arguments of {name} must lie between 0 and {MAX_FACTORIAL}.")
        if name == "lcm" and sum(n.bit_length() for n in numbers) > MAX_BITS:
            raise ToolError("the result is too large.")
        return make(function(*numbers), whole=True)

    return apply


def _pow(a: Value, b: Value) -> Value:
    return make(power(a, b).number)  # math.pow gives a float


def _absolute(value: Value) -> Value:
    return make(abs(value.number), whole=value.whole, unit=value.unit)


def _sign(value: Value) -> Value:
    return make((real(value) > 0) - (real(value) < 0), whole=True)


def _hypotenuse(*legs: Value) -> Value:
    return root(_sum(*(power(leg, make(2)) for leg in legs)), 2)


def _degrees(value: Value) -> Value:
    return make(real(value) * 180 / context().pi)


def _radians(value: Value) -> Value:
    return make(real(value) * context().pi / 180)


FUNCTIONS: Mapping[str, Function] = {
    "sqrt": lambda value: root(value, 2),
    "cbrt": lambda value: root(value, 3),
    "cuberoot": lambda value: root(value, 3),
    "pow": _pow,
    "power": _pow,
    "exp": _through("exp"),
    "ln": _logarithm,
    "log": _logarithm,
    "log2": _log_of(2),
    "log10": _log_of(10),
    "lg": _log_of(10),
    **{name: _through(name) for name in ANGULAR},
    **{name: _through(name) for name in ("asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh")},
    "arcsin": _through("asin"),
    "arccos": _through("acos"),
    "arctan": _through("atan"),
    "atan2": lambda y, x: make(context().atan2(real(y), real(x))),
    "degrees": _degrees,
    "radians": _radians,
    "abs": _absolute,
    "fabs": _absolute,
    "sign": _sign,
    "ceil": _to_whole(math.ceil, "ceil"),
    "ceiling": _to_whole(math.ceil, "ceil"),
    "floor": _to_whole(math.floor, "floor"),
    "int": _to_whole(math.trunc),
    "trunc": _to_whole(math.trunc),
    "round": _round,
    "float": lambda value: make(value.number),
    "max": _best(max),
    "min": _best(min),
    "sum": _sum,
    "mean": _mean,
    "average": _mean,
    "avg": _mean,
    "hypot": _hypotenuse,
    "mod": remainder,
    "fmod": remainder,
    "factorial": factorial,
    "gcd": _of_whole("gcd", math.gcd),
    "lcm": _of_whole("lcm", math.lcm),
    "comb": _of_whole("comb", math.comb),
    "binomial": _of_whole("comb", math.comb),
    "perm": _of_whole("perm", math.perm),
}
