"""TerminalProgress: silent when quick, a bar on a terminal, a line at start and end elsewhere."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moss_jt.cli import progress as module
from moss_jt.cli.progress import TerminalProgress
from moss_jt.language import set_language


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for the drawing thread; fail after ten seconds."""
    give_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up, "nothing was drawn"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["pipe", "terminal"])
def test_a_quick_task_leaves_no_trace(stream: io.StringIO) -> None:
    progress = TerminalProgress(stream)
    progress.begin("Loading", 100, "B")
    progress.advance(100)
    progress.end()
    assert stream.getvalue() == ""


def test_a_long_task_has_a_bar_with_the_time_left_and_is_wiped() -> None:
    stream = Terminal()
    progress = TerminalProgress(stream, delay_s=0)
    progress.begin("Loading", 4 << 20, "B")
    progress.advance(1 << 20)
    wait_until(lambda: "25%" in stream.getvalue())
    progress.end()
    shown = stream.getvalue()
    assert "Loading" in shown
    assert "1.00M/4.00M" in shown
    assert "<00:" in shown, "the time left"
    assert shown.endswith("\r")
    assert shown.rstrip("\r").split("\r")[-1].strip() == ""


def test_compilation_is_shown_at_once() -> None:
    stream = Terminal()
    progress = TerminalProgress(stream)
    progress.begin("Compiling", 150, "files")
    assert "Compiling" in stream.getvalue()
    assert "0/150" in stream.getvalue()
    progress.end()


def test_work_that_is_silent_is_shown_by_the_drawing_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFRESH_S", 0.01)
    stream = Terminal()
    progress = TerminalProgress(stream, delay_s=0.05)
    progress.begin("Thinking", 10, "layers")
    assert stream.getvalue() == ""
    wait_until(lambda: "Thinking" in stream.getvalue())
    progress.end()


def test_without_a_terminal_a_long_task_has_a_line_at_start_and_end() -> None:
    stream = io.StringIO()
    progress = TerminalProgress(stream, delay_s=0)
    progress.begin("Converting", 2, "tensors")
    progress.advance(1)
    progress.advance(1)
    progress.end()
    first, second = stream.getvalue().splitlines()
    assert first == "Converting …"
    assert second.startswith("Converting: done in ")
    progress.begin("Converting", 2, "tensors")
    progress.advance(1)
    progress.end()
    assert stream.getvalue().splitlines()[-1].startswith("Converting: stopped after ")


def test_lines_in_chinese() -> None:
    set_language("zh")
    stream = io.StringIO()
    progress = TerminalProgress(stream, delay_s=0)
    progress.begin("转换", 1, "B")
    progress.advance(1)
    progress.end()
    assert stream.getvalue().startswith("转换……\n转换：完成，用时 ")


def test_tasks_nest() -> None:
    stream = io.StringIO()
    progress = TerminalProgress(stream, delay_s=0)
    progress.begin("Outer", 2, "steps")
    progress.begin("Inner", 1, "steps")
    progress.advance(1)
    progress.end()
    progress.advance(2)
    progress.end()
    names = [line.split(" ")[0].rstrip(":") for line in stream.getvalue().splitlines()]
    assert names == ["Outer", "Inner", "Inner", "Outer"]


def test_words_that_come_too_late_do_no_harm() -> None:
    stream = io.StringIO()
    progress = TerminalProgress(stream, delay_s=0)
    progress.end()
    progress.advance(1)
    assert stream.getvalue() == ""


def test_a_total_that_is_not_known() -> None:
    stream = Terminal()
    progress = TerminalProgress(stream, delay_s=0)
    progress.begin("Waiting", 0, "s")
    wait_until(lambda: "Waiting: 00:0" in stream.getvalue())
    progress.end()


def test_the_bar_lives_on_while_a_library_moves_stderr_away(tmp_path: Path) -> None:
    """Jittor's own chatter is kept off the screen by pointing descriptor 2 elsewhere."""
    with (tmp_path / "screen").open("w") as screen:
        progress = TerminalProgress(screen, delay_s=0)
        progress.begin("Compiling", 2, "kernels")
        saved, elsewhere = os.dup(screen.fileno()), os.open(os.devnull, os.O_WRONLY)
        os.dup2(elsewhere, screen.fileno())
        progress.begin("Inner", 2, "kernels")
        progress.end()
        os.dup2(saved, screen.fileno())
        progress.end()
        os.close(saved)
        os.close(elsewhere)
    assert "Inner" in (tmp_path / "screen").read_text()
