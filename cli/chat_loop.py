"""The loop of a chat: a message comes in, a command is carried out or an answer is shown."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from moss_jt.chat import Calls, Finished, Notice, Prefill, Result, TextDelta, ThoughtDelta
from moss_jt.cli.chat_commands import Talk, execute, is_command, last_chat
from moss_jt.cli.chat_input import Input
from moss_jt.cli.chat_tools import show_citation, show_result, show_sources, thinks
from moss_jt.errors import MossError
from moss_jt.language import pick

if TYPE_CHECKING:
    from moss_jt.chat import ChatEvent
    from moss_jt.tools.citations import Citation
    from moss_jt.tools.toolbox import Source

_log = logging.getLogger(__name__)


def converse(talk: Talk, source: Input) -> bool:
    """Answer messages until there are no more; false if one of them could not be answered.

    Raises:
        KeyboardInterrupt: Ctrl-C where nobody sits at a terminal: it ends the program, not only the answer.
    """
    try:
        good = _answer_all(talk, source)
    finally:
        talk.session.close()
    if talk.screen.interactive:
        talk.screen.note(pick("Good-bye.", "再见。"))
    return good


def _answer_all(talk: Talk, source: Input) -> bool:
    """The loop itself."""
    good = True
    warned = False  # Ctrl-C was pressed and nothing typed since: the next one leaves
    while not talk.leaving:
        try:
            text = source.read()
        except KeyboardInterrupt:
            if not talk.screen.interactive:
                raise
            if warned:
                break
            warned = True
            talk.screen.note(pick("(Ctrl-C again leaves)", "（再按一次 Ctrl-C 退出）"))
            continue
        if text is None:
            break
        try:
            warned = bool(text.strip()) and _take(talk, text)
        except MossError as error:
            _log.debug("a message could not be answered", exc_info=True)
            talk.screen.end_answer()
            talk.screen.error(str(error))
            good = warned = False
        except (
            KeyboardInterrupt
        ):  # a moment before the answer or after it: it must not end the chat and unload the model
            talk.screen.end_answer()
            warned = True
        if warned and not talk.screen.interactive:
            raise KeyboardInterrupt
    return good


def _take(talk: Talk, text: str) -> bool:
    """Carry out a command or answer a message; true if Ctrl-C stopped the answer."""
    if is_command(text):
        events = execute(talk, text)
    else:
        events = talk.session.reply(text.removeprefix("/") if text.startswith("//") else text)
    return events is not None and _show_answer(talk, events)


def _show_answer(talk: Talk, events: Iterator[ChatEvent]) -> bool:
    """Show an answer as it comes; true if Ctrl-C stopped it."""
    interrupted = False
    finished: Finished | None = None
    while True:
        try:
            finished = _show_events(talk, events)
            break
        except KeyboardInterrupt:  # it struck between two events; the session closes the turn
            interrupted = True
            talk.session.cancel()
    talk.screen.end_answer()
    if finished is not None:
        talk.last = finished.stats
        if finished.kept:
            _keep(talk)
            show_sources(talk.screen, talk.session.turns[-1])
        _explain_end(talk, finished)
    return interrupted or (finished is not None and finished.reason == "cancelled")


def _show_events(talk: Talk, events: Iterator[ChatEvent]) -> Finished | None:
    """Show events until the answer is over."""
    with talk.screen.waiting() as waiting:
        shown = _Shown(talk)
        for event in events:
            if isinstance(event, Finished):
                shown.end()
                return event
            if isinstance(event, Prefill):
                waiting.update(event.done, event.total, event.reused)
            else:
                waiting.over()
                shown.show(event)
        shown.end()
    return None


class _Shown:
    """What is on the screen of one answer."""

    def __init__(self, talk: Talk) -> None:
        from moss_jt.tools.citations import CitationStream

        self._talk = talk
        self._screen = talk.screen
        self._thinking = self._begun = False
        self._sources: list[Source] = []
        self._citations = CitationStream() if talk.session.tools is not None else None

    def show(self, event: ChatEvent) -> None:
        """Show one event."""
        if isinstance(event, TextDelta):
            self._answer(self._citations.push(event.text) if self._citations else [event.text])
        elif isinstance(event, ThoughtDelta) and self._talk.thoughts:
            self._screen.aside(event.text if self._thinking else thinks() + event.text)
            self._thinking = True
        elif isinstance(event, Calls):
            self._screen.end_aside()
        elif isinstance(event, Result):
            self._sources += event.ran.sources
            show_result(self._screen, event.ran, folded=not self._talk.thoughts)
        elif isinstance(event, Notice):
            self._screen.end_answer()
            self._screen.note(event.text)

    def end(self) -> None:
        """Show what was held back."""
        if self._citations:
            self._answer(self._citations.flush())

    def _answer(self, parts: Sequence[str | Citation]) -> None:
        for part in parts:
            if not self._begun:
                self._screen.tag("MOSS: ")
                self._begun = True
            if isinstance(part, str):
                self._screen.answer(part)
            else:
                show_citation(self._screen, part, self._sources)


def _explain_end(talk: Talk, finished: Finished) -> None:
    """Say why an answer ended, where it did not end by itself."""
    if not finished.kept:
        talk.screen.note(
            pick(
                "(no answer; your message is taken back: press Up, or /retry, to send it again)",
                "（没有回答，消息已收回；按向上键或用 /retry 可重新发送）",
            )
        )
    elif not talk.session.turns[-1].answer.strip():
        talk.screen.note(pick("(an empty answer; /retry asks again)", "（回答为空；可用 /retry 重新回答）"))
    elif finished.reason == "cancelled":
        talk.screen.note(
            pick("(stopped; /continue goes on, /retry answers anew)", "（已停止；/continue 继续，/retry 重新回答）")
        )
    elif finished.reason != "stop":
        talk.screen.note(
            pick(
                f"(cut off after {finished.stats.new_tokens} tokens; /continue goes on)",
                f"（已生成 {finished.stats.new_tokens} 个词元后截断；/continue 继续）",
            )
        )


def _keep(talk: Talk) -> None:
    """Write the conversation down after each answer, so that leaving, a crash or Ctrl-C right now loses nothing."""
    if not talk.screen.interactive or not talk.keeping:
        return
    try:
        _save(talk)
    except KeyboardInterrupt:
        _save(talk)
        raise


def _save(talk: Talk) -> None:
    try:
        last_chat().parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        talk.session.save(last_chat())
    except (MossError, OSError) as error:
        talk.keeping = False  # said once
        talk.screen.note(pick(f"The conversation is not being kept: {error}", f"对话未能自动保存：{error}"))
