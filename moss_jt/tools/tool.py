"""What a tool is, and what it may answer.

A tool is a value: how the system prompt announces it, and the function that runs it. MOSS's own four are
made in moss_jt.tools.{maths,search,drawing}; anybody's come through the entry points `moss_jt.tools`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moss_jt.errors import ConfigError
from moss_jt.template import ToolLine


@dataclass(frozen=True)
class Hit:
    """Something that a search has found.

    Attributes:
        text: what it says.
        title: of the page or document.
        url: where it is; "" if nowhere.
        direct: it answers the question by itself, and its title says to what (a fact, not a passage).
    """

    text: str
    title: str = ""
    url: str = ""
    direct: bool = False


@dataclass(frozen=True)
class Picture:
    """An image that was made.

    Attributes:
        path: the file, a PNG.
        note: what the user should know about it, in the user's language.
    """

    path: Path
    note: str = ""


Answer = str | Sequence[Hit] | Picture


@dataclass(frozen=True)
class Status:
    """Whether something works here. "off": it is not set up, which is no fault."""

    state: Literal["ok", "off", "fail"]
    text: str


@dataclass(frozen=True)
class Tool:
    """A tool that a model may call.

    Attributes:
        name: the word for `--tools`.
        title: in the system prompt's line, "Web search".
        api: how it is called, "Search(query)".
        run: called with the arguments of a call, each a text; whatever it raises is a failure and ends nothing.
        quoted: its answer is one short value, written in quotes behind the call ("=> '36'").
        failure: what Results say where there is no result; None is "No result." in the tool's own manner.
        broken: what they say where the tool was stopped or fell over; None is the same.
        seconds: that a call may take.
        check: tries the tool, for `moss-jt tools`.
        close: gives back what it holds.
    """

    name: str
    title: str
    api: str
    run: Callable[..., Answer]
    quoted: bool = False
    failure: str | None = None
    broken: str | None = None
    seconds: float = 20.0
    check: Callable[[], Status] | None = None
    close: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or not self.function.isidentifier() or not self.api.endswith(")"):
            raise ConfigError(
                f'a tool has the name {self.name!r} and the API {self.api!r}; wanted are a word and a call, as in "units" '
                'and "Convert(amount, units)".'
            )

    @property
    def function(self) -> str:
        """The name in a call: "Search"."""
        return self.api.partition("(")[0].strip()

    @property
    def line(self) -> ToolLine:
        """How the system prompt announces it."""
        return ToolLine(self.title, self.api)
