"""`moss-jt chat --tools` with a scripted model: what is shown where, folding, links, pictures, both languages."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from scripted_model import TOKENIZER, install, make_engine

from moss_jt.cli.chat_pictures import picture_codes
from moss_jt.cli.chat_screen import Screen
from moss_jt.cli.main import make_group
from moss_jt.errors import MossError
from moss_jt.language import set_language
from moss_jt.tokenizer import load_tokenizer
from moss_jt.tools.index import LocalIndex

Chat = Callable[..., Result]


def scripts(*turns: tuple[str, str, str]) -> list[list[int]]:
    """Thoughts with commands, then the answer, for each turn."""
    tokenizer = load_tokenizer(TOKENIZER)
    made = []
    for thoughts, commands, answer in turns:
        made += [
            [
                *tokenizer.encode(f" {thoughts}"),
                tokenizer.marker("<eot>"),
                *tokenizer.encode(f"\n<|Commands|>: {commands}"),
                tokenizer.marker("<eoc>"),
            ],
            [*tokenizer.encode(f" {answer}"), tokenizer.marker("<eom>")],
        ]
    return made


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Chat:
    """Run `moss-jt chat` with some turns and some input."""

    def run(typed: str, turns: list[tuple[str, str, str]], *options: str) -> Result:
        engine = make_engine(scripts(*turns), context_size=4096)
        install(engine, monkeypatch.setattr)
        monkeypatch.chdir(tmp_path)
        arguments = ["chat", "--model", str(TOKENIZER), *options]
        result = CliRunner().invoke(make_group(), arguments, input=typed)
        assert isinstance(result.exception, (SystemExit, MossError, type(None))), result.exception
        return result

    return run


SUM = ("I should compute.", 'Calculate("12*3.5")', "It is 42.")
ANCHOR = ("Look it up.", 'Search("anchor")', "Heavy.<sup><|1|></sup> And 10<sup>6</sup>.")


def test_answers_on_stdout_thoughts_and_calls_on_stderr(chat: Chat) -> None:
    result = chat("12*3.5?\n", [SUM], "--tools", "calc,solve")
    assert (result.exit_code, result.stdout) == (0, "It is 42.\n")
    assert "MOSS thinks: I should compute.\nCalculate(\"12*3.5\") => '42.0'\n" in result.stderr
    assert "Tools: calc, solve. /thoughts hides" in result.stderr


def test_thoughts_fold_and_unfold(chat: Chat) -> None:
    result = chat("/thoughts\n12*3.5?\n/thoughts\n", [SUM], "--tools", "calc")
    hidden, _, shown = result.stderr.partition("Thoughts and calls are hidden.")[2].partition("are shown.")
    assert "compute" not in hidden and "=>" not in hidden
    assert "MOSS thinks: I should compute." in shown and "Calculate(\"12*3.5\") => '42.0'" in shown


def test_citations_and_sources(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# Anchors\n\nAn anchor is heavy.\n")
    LocalIndex().add(tmp_path / "docs")
    result = chat("How heavy?\n", [ANCHOR], "--tools", "search")
    assert result.stdout == "Heavy.[1] And 10<sup>6</sup>.\n"
    assert f"[1] Anchors  {(tmp_path / 'docs' / 'a.md').as_uri()}" in result.stderr


def test_a_failed_search_and_an_empty_index_are_told(chat: Chat) -> None:
    result = chat("How heavy?\n", [("Look.", 'Search("anchor")', "I do not know.")], "--tools", "search")
    assert "no documents are indexed yet" in result.stderr
    assert 'Search("anchor") =>\nNo result.\n(no documents have been indexed.' in result.stderr
    assert result.stdout == "I do not know.\n"


def test_a_picture_shows_its_path_even_folded(chat: Chat) -> None:
    turn = ("Draw.", 'Text2Image("a cat")', "Here.")
    result = chat("/thoughts\ndraw a cat\n", [turn], "--tools", "draw")
    assert ".png\n" in result.stderr
    assert "This is only a placeholder" in result.stderr
    assert "Image generated" not in result.stderr


def test_all_tools_and_stats(chat: Chat) -> None:
    result = chat("12*3.5?\n/stats\n", [SUM], "--tools", "all")
    assert "Tools: search, calc, solve, draw" in result.stderr
    assert "thoughts" in result.stderr.split("42.0")[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tools", "abacus"], "there is no tool 'abacus'; there are search, calc, solve, draw. See: moss-jt tools"),
        (["--tools", "calc", "--template", "readme"], 'tools need the template "fields"'),
        (["--tools", "search", "--search-with", "google"], "is no back end to search with"),
        (["--tools", "draw", "--draw-with", "a1111=nowhere"], "is no address of a server"),
    ],
)
def test_what_cannot_work_is_told(chat: Chat, options: list[str], words: str) -> None:
    result = chat("hi\n", [SUM], *options)
    assert result.exit_code == 1
    assert words in f"{result.exception}{result.stderr}"


def test_in_chinese(chat: Chat) -> None:
    set_language("zh")
    turn = ("需要计算。", 'Calculate("6*7")', "结果是42。")
    result = chat("6*7？\n/thoughts\n/thoughts\n", [turn], "--tools", "calc")
    assert result.stdout == "结果是42。\n"
    for words in ("工具：calc", "MOSS 的思考：需要计算。", "已隐藏思考与调用。", "已显示思考与调用。"):
        assert words in result.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_links_and_dim_text_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    out, err = Terminal(), Terminal()
    screen = Screen(interactive=True, out=out, err=err)
    screen.aside("hm\x1b[2J")
    screen.link("[1]", "https://a.example/\x1b\\evil")
    screen.link("[2]", "javascript:alert(1)")
    assert err.getvalue() == "\x1b[2mhm[2J\x1b[0m"
    assert out.getvalue() == "\x1b]8;;https://a.example/\\evil\x1b\\[1]\x1b]8;;\x1b\\[2]"


def test_pictures_in_terminals_that_can_show_them(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(9000))
    kitty = picture_codes(path, {"KITTY_WINDOW_ID": "1"})
    assert kitty is not None and kitty.count("\x1b_G") == 3 and kitty.startswith("\x1b_Ga=T,f=100,m=1;")
    assert kitty.rindex("m=0;") > kitty.rindex("m=1;")
    iterm = picture_codes(path, {"TERM_PROGRAM": "iTerm.app"})
    assert iterm is not None and iterm.startswith("\x1b]1337;File=inline=1;size=9008:") and iterm.endswith("\x07")
    assert picture_codes(path, {"TERM": "xterm"}) is None
    assert picture_codes(path, {"KITTY_WINDOW_ID": "1", "TMUX": "x"}) is None
    assert picture_codes(tmp_path / "missing.png", {"KITTY_WINDOW_ID": "1"}) is None
