"""The parser, the calculator, the solver and the wording against MOSS's own training data, where it is.

The data is not ours to ship: MOSS_SFT_DATA names its folder. What differs, and why, is told in docs/tools.md;
`-s` prints every difference with its place.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from real_turns import ORDER, RealTurn, literal, needs_data, real_turns

from moss_jt.errors import ToolError, ToolLimitError
from moss_jt.template import IMAGE_RESULT, TOOLS, Template, Turn, system_prompt
from moss_jt.tools.commands import Call, parse_commands
from moss_jt.tools.maths import calculator, solver
from moss_jt.tools.sandbox import Sandbox
from moss_jt.tools.tool import Answer, Hit, Picture, Tool
from moss_jt.tools.toolbox import ToolBox
from moss_jt.tools.wording import joined

FIELDS = Template("fields")
NOTHING = re.compile(r"'?No (?:result|calculation results)\.?'?")


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    box = Sandbox()
    yield box
    box.close()


def offered(turn: RealTurn) -> set[str]:
    """The APIs that a conversation's system prompt offers."""
    return set(re.findall(r"enabled\. API: (\w+)\(", turn.meta))


def in_order_of_results(calls: tuple[Call, ...]) -> list[str]:
    """Calls as the data writes their results: by tool, then as they came."""
    return [call.text for call in sorted(calls, key=lambda call: ORDER.index(call.name) if call.name in ORDER else 9)]


@needs_data
def test_every_turn_parses_to_the_calls_that_its_results_record() -> None:
    turns, with_calls, contradicted = 0, 0, []
    for turn in real_turns():
        turns += 1
        found = parse_commands(turn.commands)
        if turn.results.strip() == IMAGE_RESULT:
            assert [call.name for call in found.calls] == ["Text2Image"], turn.place
            with_calls += 1
            continue
        recorded = [call for call, _ in turn.blocks]
        known = tuple(call for call in found.calls if call.name in offered(turn))
        with_calls += bool(found.calls)
        if in_order_of_results(found.calls) == recorded or in_order_of_results(known) == recorded:
            continue
        if not recorded and turn.results.strip() == "None":  # the data ran nothing, whatever was written
            contradicted.append(turn.place)
            continue
        raise AssertionError(f"{turn.place}: {turn.commands!r} gives {found.describe()}, recorded are {recorded}")
    print(f"\n{turns} turns, {with_calls} with calls; the data ran nothing although there is a call: {contradicted}")
    assert turns > 0
    assert len(contradicted) <= 0.01 * with_calls


def number(text: str) -> complex | None:
    """A value as the data writes it: a quoted number, a fraction, roots, I."""
    import sympy

    text = text.strip("'")
    try:
        return complex(text)
    except ValueError:
        pass
    if not re.fullmatch(r"[\d\s.+*/()eE-]*(?:(?:sqrt|I|pi|exp|log|cbrt)[\d\s.+*/()eE-]*)*", text):
        return None
    return complex(sympy.N(sympy.sympify(text), 20))


def same_values(found: str, recorded: str) -> bool:
    """Whether two results are line by line the same unknowns and values, to 1e-9."""
    lines, wanted = found.split("\n"), recorded.split("\n")
    if len(lines) != len(wanted):
        return False
    for line, other in zip(sorted(lines), sorted(wanted), strict=True):
        name, _, value = line.rpartition(" = ")
        other_name, _, other_value = other.rpartition(" = ")
        a, b = number(value), number(other_value)
        if name != other_name or a is None or b is None or abs(a - b) > 1e-9 * max(1.0, abs(b)):
            return False
    return True


def compare(api: str, run: Callable[..., Answer], quoted: bool) -> None:
    """Run every recorded call of an API; tell what differs; assert the share that agrees."""
    counts: Counter[str] = Counter()
    for turn in real_turns():
        for text, body in turn.blocks:
            (call,) = parse_commands(text).calls
            if call.name != api:
                continue
            recorded = body.strip()
            try:
                found = str(run(*call.arguments))
            except ToolError as error:
                found = f"({error})"
            if NOTHING.fullmatch(recorded):
                counts["nothing recorded"] += 1
                counts["of these nothing here too"] += found.startswith("(")
                if not found.startswith("("):
                    print(f"{turn.place}: the data has no result, here it is {found!r}")
                continue
            counts["recorded"] += 1
            counts["same text"] += (repr(found) if quoted else found) == recorded
            if same_values(found, recorded):
                counts["same value"] += 1
                if (repr(found) if quoted else found) != recorded:
                    print(f"{turn.place}: the same value, as {found!r} instead of {recorded}")
            else:
                print(f"{turn.place}: {text} gives {found!r} instead of {recorded!r}")
    print(f"{api}: {dict(counts)}")
    assert counts["recorded"] > 0
    assert counts["same value"] >= 0.97 * counts["recorded"], counts


@needs_data
def test_calculate_gives_the_recorded_values(box: Sandbox) -> None:
    compare("Calculate", calculator(box).run, quoted=True)


@needs_data
def test_solve_gives_the_recorded_values(box: Sandbox) -> None:
    compare("Solve", solver(box).run, quoted=False)


def is_cut(line: str) -> bool:
    """Whether a text was cut: it has lost its closing quote."""
    return line[:1] in "'\"" and literal(line, cut=False) is None and literal(line) is not None


def limit_of(line: str) -> int:
    """After how many characters a text was cut: 400 in most of the data, 300 in a part of it."""
    return 300 if len(line) <= 300 else 400


def hit_of(line: str) -> Hit:
    """What a line of results was made of; what was cut off held the quotes that made Python choose those around."""
    whole = literal(line)
    if whole is not None:
        quotes = "'" if line[0] == '"' else "'\"" if "'" in whole else ""
        lost = " " * (limit_of(line) - len(line))  # white space at the very end of the Results
        return Hit(whole + lost + "x" * 400 + quotes if is_cut(line) else whole)
    title, _, text = line.partition(": ")
    found = literal(text)
    assert found is not None, line
    return Hit(found, title, direct=True)


def replaying(name: str, turn: RealTurn) -> Tool:
    """A tool that answers what the data records for its calls, in order."""
    line = TOOLS[name]
    assert line.api is not None
    function = line.api.partition("(")[0]
    waiting = [body.strip() for call, body in turn.blocks if call.startswith(function + "(")]

    def run(*_: str) -> Answer:
        if name == "draw":
            return Picture(Path("picture.png"))
        body = waiting.pop(0)
        if NOTHING.fullmatch(body):
            raise ToolLimitError("") if body == "No calculation results." else ToolError("")
        if name == "search":
            return [hit_of(line) for line in re.findall(r"(?m)^<\|\d+\|>: (.*)$", body)]
        return body.strip("'")

    return Tool(
        name, line.title, line.api, run, name == "calc", None, "No calculation results." if name == "calc" else None
    )


def longest_hit(turn: RealTurn) -> int:
    """Where a turn's texts were cut."""
    limits = {limit_of(line) for line in re.findall(r"(?m)^<\|\d+\|>: (.*)$", turn.results) if is_cut(line)}
    assert len(limits) < 2, turn.place
    return limits.pop() if limits else 400


@needs_data
def test_texts_of_whole_conversations_are_the_training_format_byte_for_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the recorded answers, what the ToolBox writes is what the data has, and so is the whole text."""
    names = {"Search": "search", "Calculate": "calc", "Solve": "solve", "Text2Image": "draw"}
    turns, others = 0, []
    for turn in real_turns():
        tools = [name for api, name in names.items() if api in offered(turn)]
        assert system_prompt(FIELDS, tools) == turn.meta
        results: str | None = None
        if tools:
            monkeypatch.setattr("moss_jt.tools.wording.LONGEST_HIT", longest_hit(turn))
            box = ToolBox([replaying(name, turn) for name in tools])
            results = joined(ran.block for ran in box.run(turn.commands))
        human, thoughts, commands, moss = (
            field.removeprefix(" ") for field in (turn.human, turn.thoughts, turn.commands, turn.moss)
        )
        turns += 1
        if FIELDS.turn_text(Turn(human, thoughts, commands, results, moss)) != turn.text:
            others.append((turn.place, results))
    print(f"\n{turns} turns; not as the ToolBox would write them: {len(others)}")
    for place, results in others:
        print(place, (results or "")[:60])
    assert len(others) <= 0.01 * turns, others
