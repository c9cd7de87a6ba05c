"""`moss-jt chat` through a pseudo-terminal: streaming, Ctrl-C, editing, history, leaving."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import termios
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pexpect
import pytest
import scripted_model
from terminal import CTRL_C, CTRL_D, ESC, PASTE, UP, Terminal

from moss_jt import paths

Start = Callable[..., Terminal]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Begin a chat and wait for its first prompt; it is ended with the test."""
    begun: list[Terminal] = []

    def begin(
        *options: str,
        answers: list[str],
        blocks: Sequence[tuple[int, int]] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Terminal:
        script = tmp_path / "script.json"
        script.write_text(json.dumps({"answers": answers, "blocks": blocks}))
        program = [scripted_model.__file__, str(script), "chat", "--model", str(scripted_model.TOKENIZER)]
        begun.append(Terminal(tmp_path, [*program, "--system", "Be brief.", *options], environment))
        return begun[-1]

    yield begin
    for terminal in begun:
        terminal.child.close(force=True)


def history_file() -> Path:
    """Where typed lines are kept."""
    return paths.state_dir() / "chat-history"


def kept_turns() -> list[tuple[str, str]]:
    """Messages and answers of the conversation that is kept after each answer."""
    saved = json.loads((paths.state_dir() / "last-chat.json").read_text())
    return [(turn["human"], turn["answer"]) for turn in saved["turns"]]


def test_a_chat_from_welcome_to_stop(start: Start) -> None:
    chat = start(answers=["Hello there.", "Fine."])
    welcome = chat.await_prompt()
    assert "on cpu; loaded in" in welcome
    assert "clear forgets everything, stop leaves, /help lists more." in welcome
    assert "MOSS: Hello there.\n" in chat.say("hi")
    assert "MOSS: Fine.\n" in chat.say("how are you?")
    chat.type("stop\r")
    assert chat.end().endswith("Good-bye.\n")
    assert kept_turns() == [("hi", "Hello there."), ("how are you?", "Fine.")]


def test_text_is_shown_while_the_answer_is_being_made(start: Start) -> None:
    chat = start(answers=["one two three"], blocks=[(0, 2)])
    chat.await_prompt()
    chat.type("hi\r")
    chat.see("MOSS: ")
    chat.see("o")  # the engine waits for ever before the third token
    chat.type(CTRL_C)
    assert "(stopped; /continue goes on, /retry answers anew)" in chat.await_prompt()
    (turn,) = kept_turns()
    assert "one two three".startswith(turn[1])


def test_ctrl_c_stops_the_answer_only_and_a_second_one_leaves(start: Start) -> None:
    chat = start(answers=["one two three four", "Next."], blocks=[(0, 3)])
    chat.await_prompt()
    chat.type("hi\r")
    chat.see("MOSS: ")
    chat.see("on")
    chat.type(CTRL_C)
    assert "(stopped;" in chat.await_prompt()
    assert "MOSS: Next." in chat.say("go on"), "the chat is still there"
    chat.type(CTRL_C)
    assert "(Ctrl-C again leaves)" in chat.await_prompt(), "no answer was stopped since: it asks once"
    chat.type(CTRL_C)
    assert chat.end().endswith("Good-bye.\n")


def test_ctrl_c_right_after_a_stopped_answer_leaves(start: Start) -> None:
    chat = start(answers=["one two three four"], blocks=[(0, 3)])
    chat.await_prompt()
    chat.type("hi\r")
    chat.see("MOSS: ")
    chat.see("on")
    chat.type(CTRL_C)
    chat.await_prompt()
    chat.type(CTRL_C)
    assert chat.end().endswith("Good-bye.\n")
    assert len(kept_turns()) == 1, "the conversation is kept"


def test_ctrl_c_wipes_what_is_typed_and_stays(start: Start) -> None:
    chat = start(answers=["Hello."])
    chat.await_prompt()
    chat.type("nonsense" + CTRL_C)
    assert "MOSS: Hello." in chat.say("hi")
    assert kept_turns() == [("hi", "Hello.")]


def test_ctrl_c_before_the_first_token_takes_the_message_back(start: Start) -> None:
    chat = start(answers=["one", "two"], blocks=[(0, 0)])
    chat.await_prompt()
    chat.type("long question\r")
    chat.see(scripted_model.WAITS)
    chat.type(CTRL_C)
    assert "your message is taken back: press Up" in chat.await_prompt()
    assert "MOSS: two" in chat.say(UP), "the message is the last of the history"
    assert kept_turns() == [("long question", "two")]


def test_end_of_input_leaves_politely(start: Start) -> None:
    chat = start(answers=["Hello."])
    chat.await_prompt()
    chat.type(CTRL_D)
    assert chat.end().endswith("Good-bye.\n")


def test_retry_undo_and_clear(start: Start) -> None:
    chat = start(answers=["First.", "Second.", "Third."])
    chat.await_prompt()
    assert "MOSS: First." in chat.say("hi")
    assert "MOSS: Second." in chat.say("/retry")
    assert kept_turns() == [("hi", "Second.")]
    assert "Taken back: hi" in chat.say("/undo")
    assert "MOSS: Third." in chat.say("hello")
    assert kept_turns() == [("hello", "Third.")]
    chat.type("clear\r")
    chat.see("\x1b[2J")  # the screen is wiped
    assert "Everything said is forgotten." in chat.await_prompt()
    assert re.search(r"turns +0\n", chat.say("/stats"))


def test_several_lines_by_backslash_by_escape_enter_and_by_paste(start: Start) -> None:
    chat = start(answers=["A.", "B.", "C."])
    chat.await_prompt()
    chat.type("one\\\r")
    chat.say("two")
    chat.type("three" + ESC + "\r")
    chat.say("four")
    chat.say(PASTE[0] + "def f():\r\n    return 1\r\nstop\r\n" + PASTE[1])
    assert [human for human, _ in kept_turns()] == ["one\ntwo", "three\nfour", "def f():\n    return 1\nstop\n"]


def test_history_is_private_and_comes_back_in_the_next_chat(start: Start) -> None:
    chat = start(answers=["A."])
    chat.await_prompt()
    chat.say("remember me")
    chat.type(CTRL_D)
    chat.end()
    assert stat.S_IMODE(history_file().stat().st_mode) == 0o600
    assert stat.S_IMODE(paths.state_dir().stat().st_mode) == 0o700
    assert stat.S_IMODE((paths.state_dir() / "last-chat.json").stat().st_mode) == 0o600
    chat = start(answers=["B."])
    chat.await_prompt()
    assert "MOSS: B." in chat.say(UP)
    assert kept_turns() == [("remember me", "B.")]


def test_a_history_that_others_could_read_is_closed_to_them(start: Start) -> None:
    history_file().parent.mkdir(parents=True)
    history_file().touch(mode=0o644)
    history_file().chmod(0o644)
    start(answers=[]).await_prompt()
    assert stat.S_IMODE(history_file().stat().st_mode) == 0o600


def test_the_last_conversation_is_taken_up_again(start: Start) -> None:
    chat = start(answers=["A blue one."])
    chat.await_prompt()
    chat.say("which car?")
    chat.type(CTRL_D)
    chat.end()
    chat = start(answers=["Blue."])
    chat.await_prompt()
    shown = chat.say("/load")
    assert "Taken up again: 1 turn" in shown
    assert "> which car?\nA blue one." in shown
    chat.say("its colour?")
    assert kept_turns() == [("which car?", "A blue one."), ("its colour?", "Blue.")]


def test_a_state_folder_that_cannot_be_written_is_no_hindrance(start: Start) -> None:
    paths.state_dir().parent.mkdir(parents=True, exist_ok=True)
    paths.state_dir().write_text("a file where the folder should be")
    chat = start(answers=["A.", "B."])
    chat.await_prompt()
    assert "The conversation is not being kept: " in chat.say("hi")
    assert "not being kept" not in chat.say("hi"), "it is said once"


def test_errors_are_shown_and_the_chat_goes_on_and_leaves_with_0(start: Start) -> None:
    chat = start(answers=["A."])
    chat.await_prompt()
    assert "there is no command /retyr. Did you mean /retry?" in chat.say("/retyr")
    assert "MOSS: A." in chat.say("hi")
    chat.type(CTRL_D)
    chat.end()


def test_tab_completes_commands(start: Start) -> None:
    chat = start(answers=["A."])
    chat.await_prompt()
    chat.say("hi")
    chat.type("/sta\t")
    chat.see("ts")
    assert "tokens/s" in chat.say("")


def test_chinese(start: Start) -> None:
    chat = start("--lang", "zh", answers=["你好。", "再见吗？"], blocks=[(1, 2)])
    assert "输入消息后按回车" in chat.await_prompt()
    chat.type("你")
    chat.see("你：")
    assert "MOSS: 你好。" in chat.say("好")
    assert "显示本列表" in chat.say("/help")
    chat.type("走？\r")
    chat.see("MOSS: ")
    chat.type(CTRL_C)
    assert "（已停止；/continue 继续，/retry 重新回答）" in chat.await_prompt()
    chat.type("stop\r")
    assert chat.end().endswith("再见。\n")


def test_a_terminal_that_sends_gbk_is_understood(start: Start) -> None:
    chat = start(answers=["Good."])
    chat.await_prompt()
    os.write(chat.child.child_fd, "你好".encode("gbk"))
    assert "MOSS: Good." in chat.say("")
    assert kept_turns() == [("你好", "Good.")]


@pytest.mark.parametrize("variable", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_can_be_switched_off(start: Start, variable: dict[str, str]) -> None:
    chat = start(answers=["A."], environment=variable)
    chat.see("Type a message")
    assert "\x1b[2m" not in (chat.child.before or "")
    chat.type("hi\r")
    chat.see("MOSS: A.")
    assert "\x1b[32m" not in (chat.child.before or "")


def test_a_long_answer_to_a_terminal_keeps_no_control_characters(start: Start) -> None:
    chat = start(answers=["a\x1b[2Jb\x07c\x9bd"])
    chat.await_prompt()
    chat.type("hi\r")
    chat.see("a[2Jbcd\r\n")


def test_a_wrapped_line_does_not_look_like_a_second_one(start: Start) -> None:
    """The mark of a further line of the message stood where only the screen was too narrow."""
    chat = start(answers=["Yes.", "Yes."])
    chat.await_prompt()
    chat.type("w" * 200 + "\r")
    assert "…" not in chat.await_prompt()
    chat.type("first\\\rsecond\r")
    assert "…" in chat.await_prompt()


@pytest.mark.parametrize("in_a_background_task", [False, True])
def test_a_chat_that_is_ended_from_outside_leaves_the_terminal_as_it_was(
    start: Start, in_a_background_task: bool
) -> None:
    """SIGTERM while a message was typed left a terminal that shows nothing of what is typed into it.

    Always so where it struck one of the line editor's background tasks.
    """
    chat = start(answers=[], environment={"SIGTERM_IN_BACKGROUND": "1"} if in_a_background_task else {})
    before = termios.tcgetattr(chat.child.child_fd)[3]
    chat.await_prompt()
    chat.see("You: ")
    if not in_a_background_task:
        chat.child.kill(signal.SIGTERM)
    chat.child.expect(pexpect.EOF)
    assert termios.tcgetattr(chat.child.child_fd)[3] == before
    chat.child.close()
    assert chat.child.exitstatus == 128 + signal.SIGTERM
