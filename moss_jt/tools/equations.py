"""Solve(equations): one or several, to the lines of the training data, through SymPy.

    read       split at ";" or ",", a bare name at the end says which unknown is meant
    translate  each tree to a SymPy expression, node by node; no text ever reaches SymPy
    solve      exactly, in rational numbers
    write      "x = 160/3", several roots "x_0 = -sqrt(15)"

As in the training data, results are written with 15 digits as soon as the text holds what Python computes as
a float: a decimal number, a quotient of two numbers, pi, a root of a number. Everything is computed exactly
nevertheless. Runs in the worker process, which limits time and memory.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import TYPE_CHECKING, Any

from moss_jt.errors import ToolError
from moss_jt.tools.arithmetic import Value, exact, plain
from moss_jt.tools.calculate import is_constant, value_of
from moss_jt.tools.functions import ANGULAR
from moss_jt.tools.grammar import MAX_CHARACTERS, THOUSANDS, Apply, Both, Name, Number, Sign, Statement, Tree, parse

if TYPE_CHECKING:
    from sympy import Expr, Symbol

MAX_EQUATIONS = 12
MAX_UNKNOWNS = 12
MAX_DEGREE = 60  # of a power with an unknown in it
MAX_SOLUTIONS = 40
LONGEST_EXACT = 40  # characters of an exact root; a longer one is written as a number
_DIGITS = 15
UNITS = {  # what they measure, and how large they are beside the others of it
    name: (kind, Fraction(size))
    for kind, sizes in {
        "length": {"毫米": "0.001", "厘米": "0.01", "分米": "0.1", "米": "1", "千米": "1000", "公里": "1000"},
        "mass": {"毫克": "0.001", "克": "1", "斤": "500", "千克": "1000", "公斤": "1000", "吨": "1000000"},
        "time": {"秒": "1", "分钟": "60", "小时": "3600", "天": "86400"},
        "money": {"分": "0.01", "角": "0.1", "元": "1", "块": "1"},
        "volume": {"毫升": "0.001", "升": "1"},
    }.items()
    for name, size in sizes.items()
}
_EQUALS = re.compile("[=＝]")
_REST = 1e-14  # of a complex number's larger part: a smaller one is a rounding error

_CALLED = {  # what may be applied to an unknown, and its name in SymPy
    "sqrt": "sqrt",
    "cbrt": "cbrt",
    "cuberoot": "cbrt",
    "exp": "exp",
    "ln": "log",
    "log": "log",
    "abs": "Abs",
    **{name: name for name in ("sin", "cos", "tan", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh")},
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
}


@dataclass(frozen=True)
class _System:
    """What is to be solved."""

    equations: tuple[Statement, ...]
    asked: tuple[str, ...]  # unknowns that were named


def solve(text: str) -> str:
    """The solution of one or several equations, one line for each unknown or root.

    Raises:
        ToolError: the text is no equation, or there is no solution that could be listed.
    """
    system = _read(text)
    names = _unknowns(system.equations)
    reader = _Translator({name for name in names if len(name) == 1}, only_real="|" in text or "abs" in text.lower())
    for equation in system.equations:
        _check_units(equation)
    expressions = [reader.difference(equation) for equation in system.equations]
    asked = [reader.symbol(name) for name in system.asked]
    solutions = _solutions([e for e in expressions if e != 0], asked, tuple(reader.symbols.values()))
    return "\n".join(_written(solutions, inexact=reader.inexact))


def _read(text: str) -> _System:
    """Split a text into equations and the unknowns that it names."""
    if len(text) > MAX_CHARACTERS:
        raise ToolError(f"the equations have {len(text)} characters; at most {MAX_CHARACTERS} are read.")
    pieces = [piece for part in re.split("[;；\n]", text) for piece in _split_at_commas(part)]
    pieces = [piece.strip() for piece in pieces if piece.strip()]
    statements = [parse(piece) for piece in pieces]
    if not statements or len(statements) > MAX_EQUATIONS:
        raise ToolError(f"there are {len(statements)} equations; from 1 to {MAX_EQUATIONS} are solved.")
    equations = tuple(one for one in statements if one.right is not None)
    loose = [one for one in statements if one.right is None]
    numbers = [piece[:40] for piece, one in zip(pieces, statements, strict=True) if _is_number(one)]
    if equations and numbers:
        raise ToolError(f"{numbers[0]} stands alone beside an equation. Write numbers without commas: x=1000;y=2")
    asked = tuple(one.left.name for one in loose if isinstance(one.left, Name))
    if not equations:  # an expression alone is meant to be zero; beside an equation it is passed over
        equations = tuple(one for one in loose if not isinstance(one.left, Name))
    if not equations:
        raise ToolError("there is no equation.")
    return _System(equations, asked)


def _is_number(statement: Statement) -> bool:
    tree = statement.left
    while isinstance(tree, Sign):
        tree = tree.of
    return statement.right is None and isinstance(tree, Number)


def _check_units(equation: Statement) -> None:
    """Refuse an equation in whose sums there are numbers in units of one kind and different sizes: 3米 and 5厘米."""
    units: dict[str, dict[Fraction, str]] = {}
    waiting: list[Tree | None] = [equation.left, equation.right]
    while waiting:
        tree = waiting.pop()
        if isinstance(tree, Both) and tree.sign in "+-":
            waiting += (tree.left, tree.right)
        elif isinstance(tree, Sign) and tree.sign in "+-":
            waiting.append(tree.of)
        elif isinstance(tree, Number):  # in a product units make others, which nobody writes out
            unit = plain(value_of(tree)).unit
            kind, size = UNITS.get(unit, (unit, Fraction(1)))
            units.setdefault(kind, {})[size] = unit
    for sizes in units.values():
        if len(sizes) > 1:
            raise ToolError(
                f"{' and '.join(sizes[size] for size in sorted(sizes))} stand in one sum. "
                "Write every number in the same unit."
            )


def _split_at_commas(text: str) -> list[str]:
    """Split at commas, those within brackets and within numbers (1,000) excepted; the latter are left out."""
    pieces, depth = [""], 0
    numbers = THOUSANDS.finditer(text.replace("，", ","))
    ends = {at: number.end() for number in numbers for at in range(*number.span())}
    for at, character in enumerate(text):
        depth += (character in "([{（") - (character in ")]}）")
        if character not in ",，" or depth > 0:
            pieces[-1] += character
        elif at not in ends or (_EQUALS.search(pieces[-1]) and _EQUALS.search(re.split("[,，]", text[ends[at] :])[0])):
            pieces.append("")  # also in x=1,200=y: one number there would leave an equation with two "="
    return pieces


def _unknowns(equations: Sequence[Statement]) -> set[str]:
    """Every name in the equations that is no constant."""
    found: set[str] = set()
    waiting: list[Tree] = [side for one in equations for side in (one.left, one.right) if side is not None]
    while waiting:
        tree = waiting.pop()
        if isinstance(tree, Name) and not is_constant(tree):
            found.add(tree.name)
        elif isinstance(tree, Both):
            waiting += (tree.left, tree.right)
        elif isinstance(tree, Sign):
            waiting.append(tree.of)
        elif isinstance(tree, Apply):
            waiting += tree.arguments
    return found


class _Translator:
    """Trees to SymPy expressions.

    Attributes:
        symbols: the unknowns met so far, by name.
        inexact: something was met that Python computes as a float.
    """

    def __init__(self, letters: set[str], *, only_real: bool) -> None:
        self._letters = letters  # unknowns of one letter: "xy" is x times y where both are among them
        self._real = True if only_real else None  # SymPy solves for what is in |x| only where x is real
        self._is_angle = False  # what is being read stands within a function of an angle: degrees count as such
        self.symbols: dict[str, Symbol] = {}
        self.inexact = False

    def symbol(self, name: str) -> Symbol:
        """The unknown of a name."""
        import sympy

        if name not in self.symbols:
            if len(self.symbols) >= MAX_UNKNOWNS:
                raise ToolError(f"there are more than {MAX_UNKNOWNS} unknowns.")
            self.symbols[name] = sympy.Symbol(name, real=self._real)
        return self.symbols[name]

    def difference(self, equation: Statement) -> Expr:
        """The left side minus the right."""
        left = self._of(equation.left)
        return left - self._of(equation.right) if equation.right is not None else left

    def _of(self, tree: Tree) -> Any:
        """The expression of a tree."""
        behind: list[tuple[str, Tree]] = []
        while not is_constant(tree) and isinstance(tree, Both):  # a long sum leans to the left: no recursion there
            behind.append((tree.sign, tree.right))
            tree = tree.left
        found = self._constant(tree) if isinstance(tree, Both) or is_constant(tree) else self._one(tree)
        while behind:
            sign, right = behind.pop()
            found = self._joined(sign, found, self._of(right))
        return found

    def _constant(self, tree: Tree) -> Any:
        """A part without unknowns, exact as long as it can be."""
        import sympy

        if isinstance(tree, Name):
            self.inexact = True
            return {"pi": sympy.pi, "e": sympy.E, "tau": 2 * sympy.pi}[tree.name.lower()]
        value = plain(value_of(tree))  # checks the size of everything first
        self.inexact |= not value.whole
        unit = sympy.pi / 180 if self._is_angle and value.unit == "°" else 1
        number = exact(value)
        if number is not None:
            return sympy.Rational(number.numerator, number.denominator) * unit
        if isinstance(tree, Both):
            return self._joined(tree.sign, self._constant(tree.left), self._constant(tree.right))
        if isinstance(tree, Sign) and tree.sign in "+-":
            return -self._constant(tree.of) if tree.sign == "-" else self._constant(tree.of)
        if isinstance(tree, Apply) and tree.name.lower() in _CALLED and len(tree.arguments) == 1:
            return self._called(tree)
        return self._number(value) * unit

    def _number(self, value: Value) -> Any:
        import sympy

        return sympy.Float(str(value.number), 40)

    def _one(self, tree: Number | Name | Apply | Sign) -> Any:
        """What is no operator and holds an unknown."""
        if isinstance(tree, Name):
            if len(tree.name) > 1 and set(tree.name) <= self._letters:
                return self._product_of_letters(tree.name)
            return self.symbol(tree.name)
        if isinstance(tree, Sign):
            if tree.sign == "!":
                raise ToolError("the factorial of an unknown is not solved for.")
            inside = self._of(tree.of)
            return -inside if tree.sign == "-" else inside / 100 if tree.sign == "percent" else inside
        assert isinstance(tree, Apply), "a number holds no unknown"
        if len(tree.arguments) != 1:
            raise ToolError(f"{tree.name[:40]} of {len(tree.arguments)} arguments is not solved for.")
        if tree.name.lower() in _CALLED:
            return self._called(tree)
        if tree.name in self._letters or len(tree.name) == 1:
            return self.symbol(tree.name) * self._of(tree.arguments[0])  # x(y+1)
        raise ToolError(f"there is no function {tree.name[:40]!r}.")

    def _product_of_letters(self, name: str) -> Any:
        import sympy

        return sympy.Mul(*(self.symbol(letter) for letter in name))

    def _called(self, tree: Apply) -> Any:
        """A function of one argument."""
        import sympy

        name = _CALLED[tree.name.lower()]
        around, self._is_angle = self._is_angle, name in ANGULAR
        inside = self._of(tree.arguments[0])
        self._is_angle = around
        if name == "cbrt" and inside.is_negative:
            return -sympy.cbrt(-inside)  # the real root, as Calculate takes it
        return getattr(sympy, name)(inside)

    @staticmethod
    def _joined(sign: str, left: Any, right: Any) -> Any:
        """An operator between two expressions."""
        if sign == "+":
            return left + right
        if sign == "-":
            return left - right
        if sign == "*":
            return left * right
        if sign == "/":
            if right == 0:
                raise ToolError("a division by zero.")
            return left / right
        if sign == "**":
            if right.is_number and abs(right) > MAX_DEGREE:
                raise ToolError(f"a power above {MAX_DEGREE} is not solved for.")
            return left**right
        raise ToolError(f"{sign} of an unknown is not solved for.")


Solution = dict[Any, Any]


def _solutions(expressions: list[Any], asked: list[Any], known: Sequence[Any]) -> list[Solution]:
    """Every solution, a value for each unknown.

    Raises:
        ToolError: there is none, or the equations leave something open.
    """
    unknowns = asked or sorted(known, key=lambda symbol: symbol.name)
    if not expressions or not unknowns:
        raise ToolError("nothing depends on an unknown.")
    if asked and len(expressions) > 1:
        with contextlib.suppress(ToolError):  # then in terms of the others: a*x=b; x
            return _asked_of_all(_found(expressions, sorted(known, key=lambda symbol: symbol.name)), asked)
    found = _found(expressions, unknowns)
    for solution in found:
        missing = [symbol for symbol in unknowns if symbol not in solution]
        loose = {symbol for value in solution.values() for symbol in value.free_symbols}
        if missing or (loose and not asked) or loose & set(unknowns):
            raise ToolError("there are more unknowns than equations.")
    return found


def _asked_of_all(solutions: list[Solution], asked: list[Any]) -> list[Solution]:
    """What was asked for, out of solutions for every unknown, each value once.

    Raises:
        ToolError: it is left open.
    """
    if any(symbol not in solution or solution[symbol].free_symbols for solution in solutions for symbol in asked):
        raise ToolError("there are more unknowns than equations.")
    every = [{symbol: solution[symbol] for symbol in asked} for solution in solutions]
    return [one for number, one in enumerate(every) if one not in every[:number]]


def _found(expressions: list[Any], unknowns: Sequence[Any]) -> list[Solution]:
    """What SymPy finds for some unknowns; it may leave others open.

    Raises:
        ToolError: nothing, or too much.
    """
    import sympy

    try:
        alone = len(expressions) == 1 == len(unknowns)  # only then are roots without a formula given
        found = sympy.solve(expressions[0] if alone else expressions, unknowns, dict=True)
    except (NotImplementedError, ValueError, TypeError, ArithmeticError, AttributeError, RecursionError) as error:
        raise ToolError(f"SymPy cannot solve this: {error}.") from error
    if not isinstance(found, list) or not found:
        raise ToolError("there is no solution.")
    if any(value.has(sympy.CRootOf) for solution in found for value in solution.values()):
        found = _numeric_roots(expressions, unknowns)
    if len(found) > MAX_SOLUTIONS:
        raise ToolError(f"there are more than {MAX_SOLUTIONS} solutions.")
    return list(found)


def _numeric_roots(expressions: list[Any], unknowns: Sequence[Any]) -> list[Solution]:
    """The roots of a polynomial that no formula gives, in 15 digits.

    Raises:
        ToolError: there is more than one equation or unknown.
    """
    import sympy

    if len(expressions) != 1 or len(unknowns) != 1:
        raise ToolError("the roots of this system have no formula.")
    roots = sympy.Poly(sympy.numer(sympy.together(expressions[0])), unknowns[0]).nroots(n=_DIGITS, maxsteps=100)
    return [{unknowns[0]: root} for root in dict.fromkeys(roots)]


def _written(solutions: list[Solution], *, inexact: bool) -> Iterator[str]:
    """A line for each unknown of each solution; roots are numbered where there are several."""
    names = sorted({symbol for solution in solutions for symbol in solution}, key=lambda symbol: symbol.name)
    for number, symbol in product(range(len(solutions)), names):
        suffix = f"_{number}" if len(solutions) > 1 else ""
        yield f"{symbol.name}{suffix} = {_number_text(solutions[number][symbol], inexact=inexact)}"


def _number_text(value: Any, *, inexact: bool) -> str:
    """A value, exact or with 15 digits."""
    import sympy

    text = str(value)
    if inexact or (not value.free_symbols and (len(text) > LONGEST_EXACT or value.atoms(sympy.Float))):
        return str(_numeric(value))
    return text


def _numeric(value: Any) -> Any:
    """A value in 15 digits; a real or imaginary part that is but a rounding error of the other is left out."""
    import sympy

    found = sympy.N(value, _DIGITS)
    if not (found.is_number and found.is_finite):
        return found
    parts = [sympy.S.Zero if part.is_Float and part._prec == 1 else part for part in found.as_real_imag()]  # 0.e-125
    largest = max(map(abs, parts))
    real, imaginary = (sympy.S.Zero if abs(part) <= largest * _REST else part for part in parts)
    return real + imaginary * sympy.I
