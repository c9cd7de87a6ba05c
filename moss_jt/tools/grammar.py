"""Arithmetic as people and models write it, to a tree. Nothing is evaluated here.

    statement   side [("=" | "==") side]
    side        sums of products of powers, calls and names, with Python's precedence; "^" and "**" are powers
    product     "*", "/", "//", "%" between two operands, or nothing at all: 3x, 2(a+b), (a)(b)
    after       "!" (factorial), "%" with no operand behind it (percent)

Full-width digits and signs, "×", "÷", "·", "√", "π", "²" and their like are read as what they mean. A number may
carry a unit in Chinese (3.5亿美元); what it means is for the reader of the tree. Everything that does not fit
is refused by name (ToolError); length, depth and the size of numbers are limited, so the tree is always small.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from moss_jt.errors import ToolError

MAX_CHARACTERS = 4000
MAX_DEPTH = 60  # of brackets and signs within each other
MAX_NODES = 3000
MAX_BEHIND = 4  # "!" and "%" in a row
MAX_DIGITS = 3000  # of one number as written
MAX_EXPONENT = 5000  # of ten, in a number such as 1e9


@dataclass(frozen=True)
class Number:
    """A number as written; exact. `whole` is true for one without point and exponent."""

    value: Fraction
    whole: bool
    unit: str = ""


@dataclass(frozen=True)
class Name:
    """A constant or an unknown."""

    name: str


@dataclass(frozen=True)
class Apply:
    """A function of arguments: f(x, y)."""

    name: str
    arguments: tuple[Tree, ...]


@dataclass(frozen=True)
class Sign:
    """A sign, or what stands behind an operand: one of "+" "-" "!" "percent"."""

    sign: str
    of: Tree


@dataclass(frozen=True)
class Both:
    """An operator between two operands: one of + - * / // % **."""

    sign: str
    left: Tree
    right: Tree


Tree = Number | Name | Apply | Sign | Both


@dataclass(frozen=True)
class Statement:
    """An expression, or an equation with two sides."""

    left: Tree
    right: Tree | None = None


_SIGNS = str.maketrans(
    {"×": "*", "✕": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "∕": "/", "−": "-", "–": "-", "—": "-", "＾": "^"}
    | {"【": "(", "】": ")", "［": "(", "］": ")", "[": "(", "]": ")", "{": "(", "}": ")", "（": "(", "）": ")"}
    | {"＝": "=", "％": "%", "！": "!", "，": ",", "；": ";", "π": " pi ", "∞": " inf "}
)
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_CJK = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(
    rf"""\s*(?:
      (?P<based>0[xX][0-9a-fA-F]+|0[bB][01]+|0[oO][0-7]+)(?![\w.])
    | (?P<number>(?:\d+(?:_\d+)*\.?\d*|\.\d+)(?:[eE][+-]?\d+(?![\w.]))?)(?P<unit>[{_CJK}°]*)
    | (?P<name>[^\W\d][\w']*)
    | (?P<sign>\*\*|//|==|[-+*/%^!=(),√|])
    )""",
    re.VERBOSE,
)
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)")
_MODULE = re.compile(r"\b(?:math|np|numpy|sympy|sp)\.(?=[A-Za-z])")


@dataclass(frozen=True)
class _Token:
    kind: str  # "number", "name", "sign", "end"
    text: str
    number: Number | None = None
    spaced: bool = False


def parse(text: str) -> Statement:
    """Read one expression or equation.

    Raises:
        ToolError: it is none, or larger than the limits above.
    """
    return _Parser(tuple(_tokens(_plain(text)))).statement()


def _plain(text: str) -> str:
    """The text with one sign for each meaning."""
    if len(text) > MAX_CHARACTERS:
        raise ToolError(f"the expression has {len(text)} characters; at most {MAX_CHARACTERS} are read.")
    text = _RAISED.sub(lambda found: "^" + unicodedata.normalize("NFKC", found[0]), text)
    text = unicodedata.normalize("NFKC", text.translate(_SIGNS)).translate(_SIGNS)
    text = _MODULE.sub("", text)
    return text if re.search(r"\w\s*\(.*,", text) else THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)


def _tokens(text: str) -> Iterator[_Token]:
    """The words of an expression."""
    at, count = 0, 0
    text = text.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if not found:
            raise ToolError(f"{text[at : at + 10]!r} at place {at + 1} is not arithmetic.")
        count += 1
        if count > MAX_NODES:
            raise ToolError(f"the expression has more than {MAX_NODES} parts.")
        spaced = text[at : at + 1].isspace()
        if found["based"]:
            yield _Token("number", found["based"], Number(Fraction(int(found["based"], 0)), True), spaced)
        elif found["number"]:
            yield _Token("number", found["number"], _number(found["number"], found["unit"]), spaced)
        elif found["name"]:
            yield _Token("name", found["name"], None, spaced)
        else:
            sign = found["sign"]
            yield _Token("sign", "**" if sign == "^" else "=" if sign == "==" else sign, None, spaced)
        at = found.end()
    yield _Token("end", "end")


def _number(text: str, unit: str) -> Number:
    """A decimal number, exactly."""
    digits, _, exponent = text.lower().replace("_", "").partition("e")
    if len(digits) > MAX_DIGITS:
        raise ToolError(f"a number has {len(digits)} digits; at most {MAX_DIGITS} are read.")
    if len(exponent.lstrip("+-")) > 6 or abs(int(exponent or "0")) > MAX_EXPONENT:
        raise ToolError(f"{text[:40]} has an exponent above {MAX_EXPONENT}.")
    scale = Fraction(10) ** int(exponent or "0")
    return Number(Fraction(digits.rstrip(".")) * scale, digits.isdigit() and not exponent, unit)


class _Parser:
    """A parser by precedence: sums, products, signs, powers, what stands behind, atoms."""

    def __init__(self, tokens: tuple[_Token, ...]) -> None:
        self._tokens = tokens
        self._at = 0
        self._depth = 0

    def statement(self) -> Statement:
        """Everything."""
        left, right = self._sum(), None
        if self._take("="):
            right = None if self._here.kind == "end" else self._sum()  # "2+3=" asks for the result
        if self._here.kind != "end":
            raise ToolError(f"{self._here.text[:20]!r} is not expected there.")
        return Statement(left, right)

    @property
    def _here(self) -> _Token:
        return self._tokens[self._at]

    @property
    def _next(self) -> _Token:
        return self._tokens[min(self._at + 1, len(self._tokens) - 1)]

    def _take(self, *signs: str) -> str:
        """Go past one of the signs, if it is here."""
        if self._here.kind == "sign" and self._here.text in signs:
            self._at += 1
            return self._tokens[self._at - 1].text
        return ""

    def _sum(self) -> Tree:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ToolError(f"brackets within brackets go deeper than {MAX_DEPTH}.")
        tree = self._product()
        while sign := self._take("+", "-"):
            tree = Both(sign, tree, self._product())
        self._depth -= 1
        return tree

    def _product(self) -> Tree:
        tree = self._signed()
        while True:
            if sign := self._take("*", "/", "//", "%"):
                tree = Both(sign, tree, self._signed())
            elif self._starts_operand(self._here):
                if self._here.kind == "number" == self._tokens[self._at - 1].kind:
                    raise ToolError(f"an operator is missing before {self._here.text[:20]!r}.")
                tree = Both("*", tree, self._power())  # nothing between: a product
            else:
                return tree

    def _signed(self) -> Tree:
        signs = 0
        negative = False
        while sign := self._take("+", "-"):
            signs += 1
            negative ^= sign == "-"
        tree = self._power()
        return Sign("-", tree) if negative else Sign("+", tree) if signs else tree

    def _power(self) -> Tree:
        base = self._behind()
        if not self._take("**"):
            return base
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ToolError(f"powers of powers go deeper than {MAX_DEPTH}.")
        exponent = self._signed()
        self._depth -= 1
        return Both("**", base, exponent)

    def _behind(self) -> Tree:
        """An atom with what stands behind it."""
        tree = self._atom()
        for _ in range(MAX_BEHIND):
            if self._take("!"):
                tree = Sign("!", tree)
            elif self._here.text == "%" and self._here.kind == "sign" and not self._starts_operand(self._next):
                self._at += 1
                tree = Sign("percent", tree)
            else:
                return tree
        raise ToolError(f"more than {MAX_BEHIND} signs stand behind one operand.")

    def _atom(self) -> Tree:
        token = self._here
        self._at += 1
        if token.number is not None:
            return token.number
        if token.kind == "name":
            return self._named(token.text)
        if token.text == "√":
            return self._root()
        if token.text == "(":
            tree = self._sum()
            self._close()
            return tree
        if token.text == "|":
            tree = self._sum()
            if not self._take("|"):
                raise ToolError("a bar | is not closed.")
            return Apply("abs", (tree,))
        raise ToolError("the expression ends too early." if token.kind == "end" else f"{token.text!r} has no operand.")

    def _root(self) -> Tree:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ToolError(f"roots of roots go deeper than {MAX_DEPTH}.")
        tree = Apply("sqrt", (self._behind(),))
        self._depth -= 1
        return tree

    def _named(self, name: str) -> Tree:
        """A name, or a function with its arguments."""
        if self._here.text != "(" or self._here.spaced:
            return Name(name)
        self._at += 1
        if self._take(")"):
            return Apply(name, ())
        arguments = [self._sum()]
        while self._take(","):
            arguments.append(self._sum())
        self._close()
        return Apply(name, tuple(arguments))

    def _close(self) -> None:
        if not self._take(")"):
            raise ToolError(f"a bracket is not closed: {self._here.text[:20]!r} stands where ) should.")

    @staticmethod
    def _starts_operand(token: _Token) -> bool:
        return token.kind in ("number", "name") or (token.kind == "sign" and token.text in ("(", "√"))
