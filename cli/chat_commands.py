"""The slash commands of a chat: a table of names, each a small function over the talk.

`clear` and `stop` alone on a line are MOSS's own words and do the same as /clear and /exit.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moss_jt import paths
from moss_jt.cli.chat_figures import figures
from moss_jt.cli.chat_screen import Screen
from moss_jt.cli.chat_tools import show_thoughts
from moss_jt.cli.options import SAMPLING
from moss_jt.config import DRAWN
from moss_jt.errors import ConversationError
from moss_jt.language import pick

if TYPE_CHECKING:
    from moss_jt.chat import ChatEvent, ChatSession, ReplyStats
    from moss_jt.predict import Predictor

LAST_CHAT_FILE = "last-chat.json"


@dataclass
class Talk:
    """What the commands act on.

    Attributes:
        session: the conversation.
        screen: where things are shown.
        last: what the last answer cost.
        keeping: write the conversation down after each answer.
        leaving: the loop ends.
        thoughts: show what MOSS thinks and calls.
        predictor: what tells how fast the model should be; asked for when it is shown.
    """

    session: ChatSession
    screen: Screen
    last: ReplyStats | None = None
    keeping: bool = True
    leaving: bool = False
    thoughts: bool = True
    predictor: Callable[[], Predictor | None] = lambda: None


Action = Callable[[Talk, str], "Iterator[ChatEvent] | None"]


@dataclass(frozen=True)
class Command:
    """A slash command: what it takes, what it does, in both languages."""

    action: Action
    takes: str
    en: str
    zh: str


def is_command(text: str) -> bool:
    """Whether a message is meant for the program rather than the model."""
    return text.strip() in ("clear", "stop") or (text.startswith("/") and not text.startswith("//"))


def execute(talk: Talk, text: str) -> Iterator[ChatEvent] | None:
    """Carry out a command; gives the events of an answer where it asks for one.

    Raises:
        ConversationError: there is no such command, or it cannot do what it should.
    """
    name, argument = [*text.strip().removeprefix("/").split(maxsplit=1), "", ""][:2]
    command = COMMANDS.get(ALIASES.get(name, name))
    if command is None:
        raise ConversationError(_unknown(name))
    return command.action(talk, argument)


def last_chat() -> Path:
    """Where the running conversation is kept after each answer."""
    return paths.state_dir() / LAST_CHAT_FILE


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    meant = pick(f"Did you mean /{near[0]}? ", f"是否指 /{near[0]}？") if near else ""
    return pick(
        f"there is no command /{name}. {meant}/help lists them; begin with // to send the text.",
        f"没有命令 /{name}。{meant}/help 可列出全部命令；以 // 开头可把它作为消息发送。",
    )


def _help(talk: Talk, _argument: str) -> None:
    rows = [(f"/{name} {command.takes}".rstrip(), pick(command.en, command.zh)) for name, command in COMMANDS.items()]
    talk.screen.table(rows)
    talk.screen.note(
        pick(
            "Several lines: end a line with \\, press Esc then Enter, or paste. "
            "Ctrl-C stops an answer; pressed again at the empty prompt, it leaves. So does Ctrl-D.\n"
            f"The conversation is kept in {last_chat()} after each answer; /load without a name takes it up again.",
            "多行输入：行末加 \\，或按 Esc 再按回车，或直接粘贴。"
            "Ctrl-C 停止回答；在空行处再按一次则退出。Ctrl-D 也可退出。\n"
            f"每次回答后对话保存在 {last_chat()}；不带文件名的 /load 可恢复它。",
        )
    )


def _system(talk: Talk, argument: str) -> None:
    if argument:
        talk.session.set_system(None if argument == "default" else argument)
        talk.screen.note(pick("The system prompt is replaced, from the start.", "系统提示已替换，从对话开头起生效。"))
    else:
        talk.screen.note(talk.session.system or pick("(none)", "（无）"))


def _undo(talk: Talk, _argument: str) -> None:
    human = talk.session.undo()
    first = human.splitlines()[0][:60] if human.strip() else ""
    talk.screen.note(pick(f"Taken back: {first}", f"已撤销：{first}"))


def _retry(talk: Talk, _argument: str) -> Iterator[ChatEvent]:
    return talk.session.retry()


def _continue(talk: Talk, _argument: str) -> Iterator[ChatEvent]:
    return talk.session.continue_answer()


def _save(talk: Talk, argument: str) -> None:
    path = paths.expand(argument or time.strftime("moss-chat-%Y%m%d-%H%M%S.json"))
    talk.session.save(path)
    talk.screen.note(pick(f"Saved as {path}.", f"已保存到 {path}。"))


def _load(talk: Talk, argument: str) -> None:
    talk.session.load(paths.expand(argument) if argument else last_chat())
    count = len(talk.session.turns)
    turns = "turn" if count == 1 else "turns"
    talk.screen.note(pick(f"Taken up again: {count} {turns}.", f"已恢复 {count} 轮对话。"))
    if talk.session.turns:
        turn = talk.session.turns[-1]
        talk.screen.note(f"> {turn.human}\n{turn.answer}")


def _stats(talk: Talk, _argument: str) -> None:
    predictor = talk.predictor()
    talk.screen.table(figures(talk.session.stats(), talk.last, predictor))
    if predictor is None:
        hint = "`moss-jt fit` measures this machine once; then predictions stand beside these figures."
        talk.screen.note(pick(hint, "运行一次 `moss-jt fit` 测量本机后，此处会同时显示预测值。"))


def _set(talk: Talk, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if not name:
        talk.screen.table([(key, _setting(talk, key)) for key in SAMPLING])
        return
    key = name.replace("-", "_")
    if key not in SAMPLING:
        raise ConversationError(
            pick(f"there is no setting {name}; there are: ", f"没有设置项 {name}；可用：") + ", ".join(SAMPLING)
        )
    if value.strip():
        talk.session.config = replace(talk.session.config, **_parsed(key, value.strip()))
    shown = ("greedy", key) if value.strip() and key in DRAWN else (key,)  # who sets such a one wants draws
    talk.screen.table([(name, _setting(talk, name)) for name in shown])


def _setting(talk: Talk, key: str) -> str:
    """A setting as the user would type it."""
    if key == "greedy":
        return "off" if talk.session.config.do_sample else "on"
    value = getattr(talk.session.config, key)
    return "none" if value is None else str(value)


def _parsed(key: str, value: str) -> dict[str, Any]:
    """The fields of GenerationConfig for a value as typed."""
    if key == "greedy":
        if value not in ("on", "off"):
            raise ConversationError(
                pick(f"greedy is on or off, not {value}.", f"greedy 只能是 on 或 off，而不是 {value}。")
            )
        return {"do_sample": value == "off"}
    if key == "seed" and value == "none":
        return {"seed": None}
    whole = key in ("top_k", "seed", "max_new_tokens")
    try:
        drawn = {"do_sample": True} if key in DRAWN else {}
        return {key: int(value) if whole else float(value), **drawn}
    except ValueError:
        kind = pick("a whole number", "整数") if whole else pick("a number", "数")
        raise ConversationError(
            pick(f"{key} takes {kind}, not {value}.", f"{key} 需要{kind}，而不是 {value}。")
        ) from None


def _thoughts(talk: Talk, _argument: str) -> None:
    talk.thoughts = not talk.thoughts
    if not talk.thoughts:
        talk.screen.note(pick("Thoughts and calls are hidden.", "已隐藏思考与调用。"))
        return
    talk.screen.note(pick("Thoughts and calls are shown.", "已显示思考与调用。"))
    if talk.session.turns:
        show_thoughts(talk.screen, talk.session.turns[-1])


def _clear(talk: Talk, _argument: str) -> None:
    talk.session.clear()
    talk.last = None
    talk.screen.clear()
    talk.screen.note(pick("Everything said is forgotten.", "已清空对话。"))


def _exit(talk: Talk, _argument: str) -> None:
    talk.leaving = True


COMMANDS = {
    "help": Command(_help, "", "this list", "显示本列表"),
    "system": Command(
        _system,
        "[TEXT]",
        'show or replace the system prompt; "default" is MOSS\'s own',
        "查看或替换系统提示；default 为 MOSS 默认提示",
    ),
    "undo": Command(_undo, "", "take back the last turn", "撤销上一轮"),
    "retry": Command(_retry, "", "answer the last message anew", "重新回答上一条消息"),
    "continue": Command(_continue, "", "go on with an answer that was cut off", "继续被截断的回答"),
    "save": Command(_save, "[FILE]", "write the conversation to a file", "把对话保存到文件"),
    "load": Command(
        _load, "[FILE]", "take up a saved conversation, or the last one", "恢复已保存的对话，默认恢复上一次"
    ),
    "stats": Command(_stats, "", "speed, memory, room in the context", "速度、内存与上下文占用"),
    "thoughts": Command(_thoughts, "", "hide or show what MOSS thinks and calls", "隐藏或显示 MOSS 的思考与调用"),
    "set": Command(_set, "[NAME [VALUE]]", "show or change how words are chosen", "查看或修改采样设置"),
    "clear": Command(_clear, "", "forget everything said (also: clear)", "清空对话（也可输入 clear）"),
    "exit": Command(_exit, "", "leave (also: stop)", "退出（也可输入 stop）"),
}
ALIASES = {"stop": "exit", "quit": "exit"}
