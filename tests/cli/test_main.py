"""The command group: help without heavy imports, languages, and errors as one line and an exit code."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from moss_jt import __version__
from moss_jt.cli import main as cli
from moss_jt.errors import CheckpointError
from moss_jt.language import current_language, set_language

ROOT = Path(__file__).parent.parent.parent


def moss_jt(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program as a user does."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **environment}
    line = [sys.executable, "-m", "moss_jt.cli", *arguments]
    return subprocess.run(
        line, capture_output=True, text=True, encoding="utf-8", env=variables, timeout=60, check=False
    )


def make_command(action: Callable[[], None]) -> click.Command:
    """A command that does something."""
    return click.Command("try", callback=action)


def code_of(action: Callable[[], None], *arguments: str) -> int:
    """The exit code of a command that does something."""
    return cli.exit_code_of(cli.with_common_options(make_command(action)), arguments)


def test_the_table_names_every_command_and_each_is_there() -> None:
    assert {"chat", "generate", "doctor", "warmup", "pull", "models", "convert"} <= set(cli.COMMANDS)
    group = cli.make_group()
    context = click.Context(group)
    for name in cli.COMMANDS:
        command = group.get_command(context, name)
        assert command is not None
        assert command.get_short_help_str(), f"{name} has no help"


@pytest.mark.parametrize("name", [None, *cli.COMMANDS])
def test_help_is_there_in_both_languages_and_loads_nothing_heavy(name: str | None) -> None:
    arguments = [name] if name else []
    script = (
        "import sys; from moss_jt.cli.main import main\n"
        "try: main()\n"
        "finally: print(sorted({'jittor', 'numpy', 'cupy', 'tokenizers', 'rich', 'prompt_toolkit'} & set(sys.modules)))"
    )
    for language, word in (("en", "Show a whole traceback"), ("zh", "显示完整的调用栈")):
        line = [sys.executable, "-c", script, *arguments, "--lang", language, "--help"]
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(line, capture_output=True, encoding="utf-8", env=variables, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert word in done.stdout
        assert done.stdout.splitlines()[-1] == "[]", "loaded without need"


def test_version() -> None:
    assert moss_jt("--version").stdout == f"moss-jt {__version__}\n"


def test_an_unknown_command_is_told_with_the_one_that_may_be_meant() -> None:
    done = moss_jt("gnerate")
    assert done.returncode == 2
    assert "There is no command 'gnerate'. Did you mean generate?" in done.stderr
    assert "没有命令 'xyz'。" in moss_jt("xyz", "--lang", "zh").stderr
    assert "Did you mean" not in moss_jt("xyz").stderr


def test_the_language_is_that_of_the_locale_unless_asked() -> None:
    assert "Talk to a model." in moss_jt("--help", LC_ALL="C.UTF-8").stdout
    assert "与模型对话。" in moss_jt("--help", LC_ALL="zh_CN.UTF-8").stdout
    assert "Talk to a model." in moss_jt("--help", "--lang=en", LC_ALL="zh_CN.UTF-8").stdout
    assert moss_jt("--lang", "fr", "--help").returncode == 0, "help comes first"
    wrong = moss_jt("--lang", "fr", "chat")
    assert wrong.returncode == 2
    assert "'fr' is not one of" in wrong.stderr


def test_lang_is_found_wherever_it_stands() -> None:
    assert cli.language_of(["chat", "--lang", "zh"]) == "zh"
    assert cli.language_of(["--lang=zh", "chat"]) == "zh"
    assert cli.language_of(["chat", "--lang"]) == ""
    assert cli.language_of(["chat"]) is None
    assert cli.language_of([]) is None


def test_lang_works_for_a_command_that_is_called_directly() -> None:
    seen: list[str] = []
    assert code_of(lambda: seen.append(current_language()), "--lang", "zh") == 0
    assert seen == ["zh"]


def test_a_moss_error_is_one_line_and_1(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise CheckpointError("file x\nis \x1b[31mbroken\x07. Fetch it\tagain.")

    assert code_of(fail) == 1
    shown = capsys.readouterr()
    assert shown.err == "moss-jt: file x is  [31mbroken . Fetch it again.\n"
    assert shown.out == ""


def test_debug_shows_the_traceback() -> None:
    def fail() -> None:
        raise CheckpointError("file x is broken")

    with pytest.raises(CheckpointError, match="file x is broken"):
        code_of(fail, "--debug")
    done = moss_jt("--debug", "chat", "--model", "./nowhere/at/all")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "Traceback" not in moss_jt("chat", "--model", "./nowhere/at/all").stderr


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert code_of(interrupt) == 130
    assert capsys.readouterr().err.endswith("Interrupted.\n")
    set_language("zh")
    assert code_of(interrupt) == 130
    assert capsys.readouterr().err.endswith("已中断。\n")


def test_exit_codes_of_commands_are_kept() -> None:
    def leave() -> None:
        sys.exit(7)

    def leave_by_click() -> None:
        click.get_current_context().exit(5)

    with pytest.raises(SystemExit) as caught:
        code_of(leave)
    assert caught.value.code == 7
    assert code_of(leave_by_click) == 5
    assert code_of(lambda: None) == 0


def test_wrong_options_are_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(lambda: None, "--no-such-thing") == 2
    assert "--no-such-thing" in capsys.readouterr().err


def test_a_closed_pipe_is_quiet() -> None:
    script = (
        "import click; from moss_jt.cli.main import run\n"
        "@click.command()\n"
        "def command():\n"
        "    for _ in range(20000): click.echo('line')\n"
        "run(command)"
    )
    pipe = subprocess.PIPE
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe, env=variables) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        shown = process.stderr.read()
        assert process.wait(60) == 1
    assert shown == b""


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    """It was a traceback."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "moss_jt.cli", "models", "list", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "moss-jt: standard output cannot be written: No space left on device. Make room, or send it elsewhere."
    ]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_no_error(closed: str) -> None:
    """Python puts None there, and each use of it was a traceback."""
    line = f'"{sys.executable}" -m moss_jt.cli models list --json {closed}'
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=variables, timeout=60, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout == ("" if " >&-" in f" {closed}" else "[]\n")


def test_other_errors_of_the_system_are_not_hidden() -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "the disk is on fire")

    with pytest.raises(OSError, match="the disk is on fire"):
        code_of(fail)


def test_a_character_that_the_terminal_does_not_know_becomes_a_question_mark() -> None:
    done = moss_jt("--help", "--lang", "zh", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0
    assert "??" in done.stdout


def test_common_options_are_added_once_and_to_commands_within() -> None:
    inner = click.Command("inner", callback=lambda: None)
    group = click.Group("outer", commands={"inner": inner})
    for _ in range(2):
        cli.with_common_options(group)
    assert [param.name for param in inner.params] == ["lang", "debug"]
    assert [param.name for param in group.params] == ["lang", "debug"]
