"""Tools of this machine in the server's answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moss_jt.server.calls import FoundSource, ToolResults, parse_calls
from moss_jt.server.tool_runner import BoxRunner
from moss_jt.tools import Hit, Picture, Sandbox, Tool, ToolBox, moss_tools, png


@pytest.fixture(scope="module")
def runner() -> Iterator[BoxRunner]:
    box = ToolBox([moss_tools(box=Sandbox())[name] for name in ("calc", "solve")])
    yield BoxRunner(box)
    box.close()


def test_calls_are_run_and_told_as_the_data_tells_them(runner: BoxRunner) -> None:
    assert runner.enabled == ["calc", "solve"]
    told = runner.run('Calculate("2^10"), Solve("x+1=3")')
    assert told == ToolResults('Calculate("2^10") => \'1024\'\nSolve("x+1=3") =>\nx = 2')


@pytest.mark.parametrize("commands", ["None", "", "I do not know"])
def test_nothing_to_do(runner: BoxRunner, commands: str) -> None:
    assert runner.run(commands) is None


def test_a_tool_that_is_off_is_refused_in_words(runner: BoxRunner) -> None:
    told = runner.run('Search("weather")')
    assert told is not None and told.text.startswith('Search("weather")')


def test_what_was_found_is_told_with_its_numbers() -> None:
    hits = [Hit("It rains.", "Rain", "https://example.org/rain"), Hit("It pours.", "Not on the web")]
    box = ToolBox([Tool("search", "Web search", "Search(query)", lambda _: hits)])
    told = BoxRunner(box).run('Search("rain")')
    assert told is not None
    assert told.sources == (
        FoundSource(1, "Rain", "https://example.org/rain"),
        FoundSource(2, "Not on the web", ""),
    )


def drawing(folder: Path, content: bytes) -> ToolBox:
    """A box with a tool that has drawn a file."""

    def draw(_: str) -> Picture:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "drawn.png"
        path.write_bytes(content)
        return Picture(path, "only a sketch")

    return ToolBox([Tool("draw", "Text-to-image", "Text2Image(description)", draw)])


@pytest.mark.parametrize("own", [True, False])
def test_a_picture_is_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    """One in our own folder leaves no file behind, so that it ends with its conversation; another's file stays."""
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path))
    folder = tmp_path / ("images" if own else "elsewhere")
    content = png.lettered(("A CAT",), width=64, height=32, dot=1, text="a cat")
    told = BoxRunner(drawing(folder, content)).run('Text2Image("a cat"), Text2Image("a cat")')
    assert told is not None
    (picture,) = told.pictures
    assert (picture.type, picture.note, picture.content) == ("image/png", "only a sketch", content)
    assert len(picture.name) == 32
    assert (folder / "drawn.png").exists() is not own


@pytest.mark.parametrize("content", [b"<svg onload=alert(1)>", b"", b"GIF89a"])
def test_what_is_no_picture_is_not_shown(tmp_path: Path, content: bytes) -> None:
    told = BoxRunner(drawing(tmp_path, content)).run('Text2Image("a cat")')
    assert told is not None
    assert told.pictures == ()


def test_the_calls_of_clients_are_read_as_those_of_the_tools() -> None:
    """One parser for both: quotes inside, numbering, Chinese marks."""
    calls = parse_calls("1. Search('the \"old\" one')，2. Calculate（“3*4”）")
    assert [(call.tool, call.argument) for call in calls] == [("search", 'the "old" one'), ("calc", "3*4")]
