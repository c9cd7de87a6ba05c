"""The server's own end of tools: what a model writes as calls, what a client's function gives as Results."""

from __future__ import annotations

import json

import pytest

from moss_jt.server.calls import FUNCTIONS, Call, Function, parse_calls, read_call, write_calls, write_results
from moss_jt.server.refusals import Refusal
from moss_jt.server.schemas import FunctionName


@pytest.mark.parametrize(
    ("commands", "calls"),
    [
        ("None", []),
        ("", []),
        ('Search("a")', [Call("search", "a")]),
        ('Search("a, (b)"), Calculate("2*(3+4)")', [Call("search", "a, (b)"), Call("calc", "2*(3+4)")]),
        ('Search("say "hi" to them"), Solve("x=1"),', [Call("search", 'say "hi" to them'), Call("solve", "x=1")]),
        ('1. Calculate("1+1")  # first\n2. Calculate("2+2")', [Call("calc", "1+1"), Call("calc", "2+2")]),
        ('Count("x"), Text2Image("a cat")', [Call("draw", "a cat")]),
        ('Search("open', [Call("search", "open")]),
        ("Search(a)", [Call("search", "a")]),
        ("Search()", []),
        ('Search("' + "(" * 5000 + '")', [Call("search", "(" * 5000)]),
    ],
)
def test_calls_are_read(commands: str, calls: list[Call]) -> None:
    assert parse_calls(commands) == calls


def test_not_too_many_are_read() -> None:
    assert len(parse_calls('Search("a"), ' * 1000)) == 16


def test_what_is_written_is_read_again() -> None:
    calls = [Call("search", "a, b"), Call("calc", "(1+2)*3"), Call("solve", "x+1=2;y=3"), Call("draw", "a cat")]
    assert parse_calls(write_calls(calls) or "") == calls
    assert write_calls([]) is None


def test_results_have_the_wording_of_the_training_data() -> None:
    answers = [
        (Call("search", "a"), "first\nline"),
        (Call("search", "b"), "it's"),
        (Call("search", "c"), "<|7|>: 'numbered already'"),
        (Call("calc", "1+1"), "2"),
        (Call("calc", "1/0"), ""),
        (Call("solve", "x=1"), "x = 1"),
        (Call("draw", "a cat"), "https://example.org/cat.png"),
        (Call("calc", "2+2"), "Calculate(\"2+2\") => '4'"),
    ]
    assert write_results(answers) == "\n".join(
        [
            "Search(\"a\") =>\n<|1|>: 'first\\nline'",
            'Search("b") =>\n<|2|>: "it\'s"',
            "Search(\"c\") =>\n<|7|>: 'numbered already'",
            "Calculate(\"1+1\") => '2'",
            "Calculate(\"1/0\") => 'No result.'",
            'Solve("x=1") =>\nx = 1',
            "Image generated successfully.",
            "Calculate(\"2+2\") => '4'",
        ]
    )
    assert write_results([]) is None


def test_arguments_go_out_and_come_back() -> None:
    call = Call("search", 'say "hi" 你好')
    function = Function("web_search", "q")
    assert json.loads(function.arguments(call)) == {"q": call.argument}
    assert read_call("web_search", function.arguments(call)) == call


@pytest.mark.parametrize("arguments", ["", "x", "[]", "{}", '{"a": 1}', '{"a": "b", "c": "d"}', "[" * 100_000])
def test_arguments_that_are_none(arguments: str) -> None:
    with pytest.raises(Refusal, match="one text"):
        read_call("search", arguments)


def test_every_name_is_in_the_schema() -> None:
    assert set(FunctionName.__args__) == set(FUNCTIONS)  # type: ignore[attr-defined]
