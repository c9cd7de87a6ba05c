"""The Commands field to calls: everything that models write, and 100,000 lines that nobody would."""

from __future__ import annotations

import random

import pytest

from moss_jt.tools.commands import MAX_CALLS, MAX_CHARACTERS, Commands, parse_commands
from moss_jt.tools.tool import Tool
from moss_jt.tools.toolbox import Limits, ToolBox

CASES: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    'Calculate("1/2*4*4")': [("Calculate", ("1/2*4*4",))],
    'Search("a"), Search("b")': [("Search", ("a",)), ("Search", ("b",))],
    'Search("a") , Solve("x=1")': [("Search", ("a",)), ("Solve", ("x=1",))],
    'Search("a"),\nSolve("x=1"),': [("Search", ("a",)), ("Solve", ("x=1",))],
    'Solve("a=1") \nCalculate("2")\nCalculate("3")': [
        ("Solve", ("a=1",)),
        ("Calculate", ("2",)),
        ("Calculate", ("3",)),
    ],
    '1. Calculate("20/2")  # the radius\n2. Calculate("3*4") # no, Search("this")': [
        ("Calculate", ("20/2",)),
        ("Calculate", ("3*4",)),
    ],
    '(1) Search("a")\n(2) Search("b")': [("Search", ("a",)), ("Search", ("b",))],
    '1、Search("一"); 2、Search("二")': [("Search", ("一",)), ("Search", ("二",))],
    '- Search("a")\n* Search("b")\n• Search("c")': [("Search", ("a",)), ("Search", ("b",)), ("Search", ("c",))],
    'Search("a, b (c), d")': [("Search", ("a, b (c), d",))],
    'Solve("x+y=15, 2x+4y=34")': [("Solve", ("x+y=15, 2x+4y=34",))],
    'Solve("a*x=b", "x")': [("Solve", ("a*x=b", "x"))],
    'Search("who said "to be" first")': [("Search", ('who said "to be" first',))],
    'Search("5" screens (cheap")': [("Search", ('5" screens (cheap',))],
    "Search(\"it's here\"), Search('single')": [("Search", ("it's here",)), ("Search", ("single",))],
    'Search("say \\"no\\" (loudly)")': [("Search", ('say "no" (loudly)',))],
    'Calculate("("+ str(2) + ")*3")': [("Calculate", ("(2)*3",))],
    'Calculate("{}*2".format(3)), Search("x")': [("Calculate", ('{}*2".format(3)',)), ("Search", ("x",))],
    'Calculate("2*(3+4")': [("Calculate", ("2*(3+4",))],
    'Calculate("2*3)+4")': [("Calculate", ("2*3)+4",))],
    "Search（“上海 人口”）": [("Search", ("上海 人口",))],
    'Search("北京天气")，Calculate("1+1")。': [("Search", ("北京天气",)), ("Calculate", ("1+1",))],
    "Solve(x+1=2, x)": [("Solve", ("x+1=2, x",))],
    "Calculate((1+2)*3)": [("Calculate", ("(1+2)*3",))],
    'search(query="tea")': [("search", ("tea",))],
    'Search ("a")': [("Search", ("a",))],
    'Search("a" )': [("Search", ("a",))],
    'Search("a"': [("Search", ("a",))],
    'Search("abc), Search("def")': [("Search", ("abc",)), ("Search", ("def",))],
    "Search(": [("Search", ())],
    "Search()": [("Search", ())],
    'Search("")': [("Search", ("",))],
    'Count("a")': [("Count", ("a",))],
    'Search("a"), None': [("Search", ("a",))],
    'None, Search("a")': [("Search", ("a",))],
    "None": [],
    " None.": [],
    "Non": [],
    "none": [],
    "无": [],
    "不需要搜索": [],
    "N/A": [],
    "": [],
    " \n ": [],
    'None (Search("x") is not needed)': [],
    "# nothing to do": [],
}


@pytest.mark.parametrize("text", CASES)
def test_what_models_write(text: str) -> None:
    found = parse_commands(text)
    assert [(call.name, call.arguments) for call in found.calls] == CASES[text]
    assert found.skipped == ()
    assert all(call.text in text for call in found.calls)


@pytest.mark.parametrize(
    ("text", "skipped"),
    [
        ("I know this by heart.", ("I know this by heart.",)),
        ('Use Search("x") for it', ('Use Search("x") for it',)),
        ('Search("a"), then think', ("then think",)),
        ("<|Results|>: x", ("<|Results|>: x",)),
        ("1.5", ("1.5",)),
    ],
)
def test_prose_is_passed_over_and_told(text: str, skipped: tuple[str, ...]) -> None:
    assert parse_commands(text).skipped == skipped


def test_it_says_what_it_understood() -> None:
    found = parse_commands('1. Calculate("2+3") # sum\nhm, Search("a\nb")')
    assert found.describe() == 'Calculate("2+3"); Search("a b"); passed over: \'hm\''
    assert Commands().describe() == "no call"


def test_size_is_limited() -> None:
    assert len(parse_commands('Search("a"), ' * 1000).calls) == MAX_CALLS
    assert parse_commands(" " * MAX_CHARACTERS + 'Search("a")').calls == ()
    for nasty in ("(" * 50_000, 'a("' * 20_000, "a(\n" * 20_000, '"' * 50_000, "a(" + ")" * 50_000, "\\" * 50_000):
        parse_commands(nasty)


PIECES = [
    *('Search("', 'Calculate("', 'Solve("', 'Text2Image("', 'Count("', "Draw(", 'search("', "None", "none."),
    *(
        '")',
        '"',
        "'",
        "(",
        ")",
        "（",
        "）",
        "“",
        "”",
        ",",
        "，",
        ";",
        "\n",
        "\\",
        '\\"',
        " ",
        "#",
        "//",
        "1. ",
        "2) ",
        "- ",
    ),
    *(
        "x+1=2",
        "2^10",
        "北京",
        "天气",
        "\x00",
        "\ud800",
        "é",
        "𝒳",
        "\u202e",
        "<|Results|>:",
        "<eoc>",
        "<eom>",
        "__import__",
    ),
    *("eval(", "exec(", ".format(", "str(", "+", "*" * 50, "9" * 40, "🙂", "\t", "\r", "|", "&", "=", "%", "{}", "[]"),
]


def noise(count: int, seed: int) -> list[str]:
    """Random command lines."""
    draw = random.Random(seed)
    return ["".join(draw.choices(PIECES, k=draw.randint(0, 14))) for _ in range(count)]


def run_noise(count: int, seed: int) -> int:
    """Parse and run random lines with two tools on and two off; gives the number of calls that ran."""
    ran: list[str] = []

    def tool(name: str, api: str) -> Tool:
        def run(*texts: str) -> str:
            ran.append(name)
            assert all(isinstance(text, str) for text in texts)
            return "ok"

        return Tool(name, name, api, run)

    box = ToolBox([tool("search", "Search(query)"), tool("calc", "Calculate(expression)")], Limits(calls=5))
    for line in noise(count, seed):
        for outcome in box.run(parse_commands(line)):
            on = outcome.call.name.lower() in ("search", "calculate")
            assert on or outcome.error, line
            assert "\n\n" not in outcome.block and outcome.block.startswith(outcome.call.name), line
    assert set(ran) == {"search", "calc"}
    return len(ran)


def test_ten_thousand_random_lines() -> None:
    assert run_noise(10_000, 1) > 500


@pytest.mark.slow
def test_hundred_thousand_random_lines() -> None:
    assert run_noise(100_000, 2) > 5000
