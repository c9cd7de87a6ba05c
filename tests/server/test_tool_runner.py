"""Tools of this machine in the server's answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moss_jt.server.calls import parse_calls
from moss_jt.server.tool_runner import BoxRunner
from moss_jt.tools import Sandbox, ToolBox, moss_tools


@pytest.fixture(scope="module")
def runner() -> Iterator[BoxRunner]:
    box = ToolBox([moss_tools(box=Sandbox())[name] for name in ("calc", "solve")])
    yield BoxRunner(box)
    box.close()


def test_calls_are_run_and_told_as_the_data_tells_them(runner: BoxRunner) -> None:
    assert runner.enabled == ["calc", "solve"]
    assert runner.run('Calculate("2^10"), Solve("x+1=3")') == 'Calculate("2^10") => \'1024\'\nSolve("x+1=3") =>\nx = 2'


@pytest.mark.parametrize("commands", ["None", "", "I do not know"])
def test_nothing_to_do(runner: BoxRunner, commands: str) -> None:
    assert runner.run(commands) is None


def test_a_tool_that_is_off_is_refused_in_words(runner: BoxRunner) -> None:
    told = runner.run('Search("weather")')
    assert told is not None and told.startswith('Search("weather")')


def test_the_calls_of_clients_are_read_as_those_of_the_tools() -> None:
    """One parser for both: quotes inside, numbering, Chinese marks."""
    calls = parse_calls("1. Search('the \"old\" one')，2. Calculate（“3*4”）")
    assert [(call.tool, call.argument) for call in calls] == [("search", 'the "old" one'), ("calc", "3*4")]
