"""The tools of a chat: which are on, and how their work is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moss_jt.language import pick

if TYPE_CHECKING:
    from moss_jt.chat import ChatTurn
    from moss_jt.cli.chat_screen import Screen
    from moss_jt.tools.citations import Citation
    from moss_jt.tools.toolbox import Ran, Source, ToolBox

ALL = "all"


def open_tools(wanted: str | None, *, search: str | None, draw: str | None, screen: Screen) -> ToolBox | None:
    """The tools that were asked for; None if none were.

    Args:
        wanted: names between commas, or "all" for MOSS's four and every installed one.
        search: the back end to search with, None for that of the environment.
        draw: the back end to draw with.
        screen: where to say what cannot work yet.

    Raises:
        ConfigError, ToolError: there is no such tool or back end.
    """
    names = [name.strip() for name in (wanted or "").split(",") if name.strip()]
    if not names:
        return None
    from moss_jt.tools import Sandbox, ToolBox, load_plugins, moss_tools
    from moss_jt.tools.toolbox import pick_tools

    box = Sandbox()
    available = {**moss_tools(search=search, draw=draw, box=box), **load_plugins().tools}
    tools = pick_tools(list(available) if ALL in names else names, available)
    if {"calc", "solve"} & {tool.name for tool in tools}:
        box.warm()  # it is ready by the time the model is
    _say_what_is_on(screen, [tool.name for tool in tools], search)
    return ToolBox(tools)


def _say_what_is_on(screen: Screen, names: Sequence[str], search: str | None) -> None:
    from moss_jt.tools import search_backend

    listed = ", ".join(names)
    screen.note(
        pick(
            f"Tools: {listed}. /thoughts hides or shows what MOSS thinks and calls.",
            f"工具：{listed}。/thoughts 可隐藏或显示 MOSS 的思考与调用。",
        )
    )
    if "search" in names:
        backend = search_backend(search)
        if backend.name == "local" and backend.check().state != "ok":
            screen.note(
                pick(
                    "search: no documents are indexed yet, so it will find nothing. As in: moss-jt index ./docs",
                    "search：尚未索引任何文档，搜索不会有结果。例如：moss-jt index ./docs",
                )
            )


def show_result(screen: Screen, ran: Ran, *, folded: bool) -> None:
    """Show what came of a call; a picture and what it is shows even where thoughts are folded."""
    if not folded:
        screen.note(ran.block)
        if ran.error:
            screen.note(f"({ran.error})")
    if ran.picture is not None:
        screen.picture(ran.picture.path)
        if ran.picture.note:
            screen.note(ran.picture.note)


def show_citation(screen: Screen, citation: Citation, sources: Sequence[Source]) -> None:
    """Show the numbers of a citation, each a link where it leads somewhere."""
    places = {source.number: source.url for source in sources}
    if not places.keys() & set(citation.numbers):  # 10<sup>6</sup> cites nothing
        screen.answer(citation.text)
        return
    for number in citation.numbers:
        screen.link(f"[{number}]", places.get(number, ""))


def show_sources(screen: Screen, turn: ChatTurn) -> None:
    """List what an answer cites."""
    if turn.tools is None or not turn.tools.sources:
        return
    from moss_jt.tools.citations import cited

    numbers = cited(turn.answer)
    for source in turn.tools.sources:
        if source.number in numbers:
            where = "  ".join(part for part in (source.title, source.url) if part) or source.text[:80]
            screen.note(f"[{source.number}] {where}")


def show_thoughts(screen: Screen, turn: ChatTurn) -> None:
    """Show what was thought, called and found in a turn that is over."""
    if turn.tools is not None:
        screen.note(f"{thinks()}{turn.tools.thoughts}\n{turn.tools.results}")


def thinks() -> str:
    """What stands before thoughts."""
    return pick("MOSS thinks: ", "MOSS 的思考：")
