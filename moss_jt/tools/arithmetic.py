"""Values and operators of the calculator: exact as long as it is possible, else 50 digits.

A value is a fraction, or a number of mpmath where a root or a function made it irrational. It remembers
whether Python would call it an int, because the training data writes 12*3 as '36' and 36/3 as '12.0'. Decimal
numbers are exact too: 0.1+0.2 is 0.3. Every operation checks the size of its result before it computes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from moss_jt.errors import ToolError

Inexact = Any  # an mpf; mpmath has no types
DIGITS = 50  # of a number that is not exact
MAX_BITS = 1 << 16  # of a numerator or denominator: 19,700 digits
MAX_POWER = 1 << 40  # of two, that a number that is not exact may reach
LONGEST = 500  # digits of a whole number that is written out
_MULTIPLES = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_MULTIPLE = re.compile("(?:(?!千[米克瓦卡赫帕伏焦]|[百千万]分)[十百千万亿])+")  # 千米 and 百分点 are units themselves
_SURE = 40  # of these digits those that rounding errors do not reach


@dataclass(frozen=True)
class Value:
    """A real number.

    Attributes:
        number: a Fraction, or an mpf of `DIGITS` digits.
        whole: made of whole numbers by operations that keep them whole.
        unit: in which it was given, "" for none; a multiple (万) stands only at its beginning.
    """

    number: Fraction | Inexact
    whole: bool = False
    unit: str = ""


def context() -> Any:
    """The arithmetic of `DIGITS` digits."""
    import mpmath

    mpmath.mp.dps = DIGITS
    return mpmath.mp


def exact(value: Value) -> Fraction | None:
    """The value as a fraction, None where it is irrational."""
    return value.number if isinstance(value.number, Fraction) else None


def real(value: Value) -> Inexact:
    """The value in `DIGITS` digits."""
    mp = context()
    if isinstance(value.number, Fraction):
        return mp.mpf(value.number.numerator) / value.number.denominator
    return value.number


def make(number: Any, *, whole: bool = False, unit: str = "") -> Value:
    """A value from what an operation gave, if it is a finite real number of bearable size.

    Raises:
        ToolError: it is not.
    """
    if isinstance(number, int):
        number = Fraction(number)
    if isinstance(number, Fraction):
        if max(number.numerator.bit_length(), number.denominator.bit_length()) > MAX_BITS:
            raise ToolError("the result is too large.")
        return Value(number, whole and number.denominator == 1, unit)
    mp = context()
    if isinstance(number, mp.mpc):
        raise ToolError("the result is not a real number.")
    if not mp.isfinite(number):
        raise ToolError("the result is not finite.")
    if number and abs(mp.mag(number)) > MAX_POWER:
        raise ToolError(f"the result is too {'large' if mp.mag(number) > 0 else 'close to zero'}.")
    if abs(number) < mp.mpf(10) ** DIGITS and is_nothing(number - mp.nint(number), beside=mp.nint(number)):
        return Value(Fraction(int(mp.nint(number))), unit=unit)  # sqrt(2)*sqrt(8) is 4
    return Value(number, unit=unit)


def is_nothing(number: Inexact, *, beside: Inexact) -> bool:
    """Whether a number is 0, or so small beside another that it may be a rounding error of it."""
    return bool(abs(number) <= abs(beside) * context().mpf(10) ** -_SURE)


def plain(value: Value) -> Value:
    """The value with the multiple in its unit counted: 30000 元 for 3 万元."""
    found = _MULTIPLE.match(value.unit)
    if found is None:
        return value
    times = math.prod(_MULTIPLES[sign] for sign in found[0])
    return make(value.number * times, whole=value.whole, unit=value.unit[found.end() :])


def _is_multiple(value: Value) -> bool:
    return _MULTIPLE.match(value.unit) is not None


def add(a: Value, b: Value, sign: int = 1) -> Value:
    """A sum, or a difference for sign -1; both must be in the same unit."""
    if a.unit != b.unit:
        raise ToolError(f"{a.unit or 'a plain number'} and {b.unit or 'a plain number'} cannot be added.")
    left, right = exact(a), exact(b)
    if left is not None and right is not None:
        return make(left + sign * right, whole=a.whole and b.whole, unit=a.unit)
    found = real(a) + sign * real(b)
    return make(0 if is_nothing(found, beside=real(a)) else found, unit=a.unit)  # sqrt(12) - 2*sqrt(3) is 0


def multiply(a: Value, b: Value) -> Value:
    """A product; units are written one behind the other, of 万 and 千 the multiples are counted."""
    if _is_multiple(a) and _is_multiple(b):
        a, b = plain(a), plain(b)
    left, right = exact(a), exact(b)
    unit = b.unit + a.unit if _is_multiple(b) else a.unit + b.unit
    if left is not None and right is not None:
        return make(left * right, whole=a.whole and b.whole, unit=unit)
    return make(real(a) * real(b), unit=unit)


def divide(a: Value, b: Value) -> Value:
    """A quotient, never whole; equal units cancel, and nothing is left "per 万"."""
    _not_zero(b)
    if a.unit != b.unit and _is_multiple(b):
        a, b = plain(a), plain(b)
    unit = "" if a.unit == b.unit else f"{a.unit}/{b.unit}" if b.unit else a.unit
    left, right = exact(a), exact(b)
    if left is not None and right is not None:
        return make(left / right, unit=unit)
    return make(real(a) / real(b), unit=unit)


def floor_divide(a: Value, b: Value) -> Value:
    """The largest whole number not above the quotient."""
    quotient = divide(a, b) if a.unit == b.unit else divide(plain(a), plain(b))
    known = exact(quotient)
    number = known.__floor__() if known is not None else int(context().floor(quotient.number))
    return make(number, whole=a.whole and b.whole, unit=quotient.unit)


def remainder(a: Value, b: Value) -> Value:
    """What is left by `floor_divide`; it has the sign of the divisor, as in Python."""
    if a.unit != b.unit:
        a, b = plain(a), plain(b)
    return add(a, multiply(floor_divide(Value(a.number, a.whole), Value(b.number, b.whole)), b), -1)


def power(a: Value, b: Value) -> Value:
    """A power, exact where the exponent is a whole number and the result not too large."""
    base, exponent = exact(a), exact(b)
    if b.unit or (a.unit and exponent != 1):
        raise ToolError("a power of a number with a unit is not computed.")
    if exponent is not None and exponent.denominator == 1 and base is not None:
        return _whole_power(a, base, int(exponent), b.whole)
    mp = context()
    x, y = real(a), real(b)
    is_whole = exponent is not None and exponent.denominator == 1
    if (x < 0 and not is_whole) or (x == 0 and y < 0):
        raise ToolError("the result is not a real number.")
    if exponent is not None and base is not None and exponent.denominator == 2:
        found = exact(root(a, 2))
        if found is not None:
            return _whole_power(a, found, exponent.numerator, False)
    if x and abs(mp.mag(x) * y) > MAX_POWER:
        raise ToolError("the result is too large.")
    found = abs(x) ** y
    return make(-found if x < 0 and exponent is not None and exponent % 2 else found, unit=a.unit)


def _whole_power(a: Value, base: Fraction, exponent: int, whole: bool) -> Value:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if base == 0 and exponent < 0:
        raise ToolError("a division by zero.")
    if abs(base) not in (0, 1) and (bits - 1) * abs(exponent) > MAX_BITS:
        raise ToolError("the result is too large.")
    if abs(base) in (0, 1):
        exponent = min(exponent, 2 + exponent % 2) if exponent > 0 else exponent % 2
    return make(base**exponent, whole=a.whole and whole and exponent >= 0, unit=a.unit)


def root(value: Value, degree: int) -> Value:
    """The real root of degree 2 or 3, exact where it is a fraction."""
    known = exact(value)
    if (known if known is not None else real(value)) < 0:
        if degree == 2:
            raise ToolError("the square root of a negative number is not real.")
        return make(-root(make(-value.number), degree).number)
    if known is not None:
        top, bottom = _whole_root(known.numerator, degree), _whole_root(known.denominator, degree)
        if top is not None and bottom is not None:
            return make(Fraction(top, bottom))
    return make(context().root(real(value), degree))


def _whole_root(number: int, degree: int) -> int | None:
    """The root of a whole number if it is whole."""
    low, high = 0, 1 << (number.bit_length() // degree + 1)
    while low < high:  # bisection: no float is exact enough for large numbers
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= number else (low, middle - 1)
    return low if low**degree == number else None


def _not_zero(value: Value) -> None:
    if value.number == 0:
        raise ToolError("a division by zero.")


def written(value: Value) -> str:
    """The value as the training data writes it: as Python prints an int or a float.

    The float is the one nearest to the exact value. A number that is too long, or too large for a float, is
    written with 15 digits and an exponent.
    """
    number = value.number
    if value.whole and isinstance(number, Fraction) and abs(number.numerator) < 10**LONGEST:
        return str(number.numerator)
    mp = context()
    inexact = real(value)
    if not inexact or -1000 < mp.mag(inexact) < 1000:
        return repr(float(number) if isinstance(number, Fraction) else float(inexact))
    return str(mp.nstr(inexact, 15))
