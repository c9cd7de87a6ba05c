"""What the server and the process of the model say to each other: plain values over a pipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from moss_jt.config import MossConfig
from moss_jt.messages import Event, Request
from moss_jt.progress import Progress

Stats = dict[str, float | int | str]


@dataclass(frozen=True)
class Submit:
    """Answer a request; events and refusals name it by this number."""

    number: int
    request: Request


@dataclass(frozen=True)
class Cancel:
    """End a request; it finishes with "cancelled", or has finished."""

    number: int


@dataclass(frozen=True)
class Forget:
    """Give back the cache of a conversation."""

    conversation: str


@dataclass(frozen=True)
class ModelInfo:
    """The model, as far as the server must know it."""

    folder: Path
    config: MossConfig
    context_size: int
    device: str
    compute: str


@dataclass(frozen=True)
class Loading:
    """How far loading has come."""

    task: str
    share: float


@dataclass(frozen=True)
class Ready:
    """The engine takes requests."""

    model: ModelInfo


@dataclass(frozen=True)
class Happened:
    """Events of one pass, by the number of their request, and now and then the figures of the engine."""

    events: tuple[tuple[int, Event], ...]
    stats: Stats | None = None


@dataclass(frozen=True)
class Failed:
    """A request could not be done; `mine` says that the request itself was wrong."""

    number: int
    message: str
    mine: bool


@dataclass(frozen=True)
class Fatal:
    """The model cannot be loaded."""

    message: str


@dataclass(frozen=True)
class LogLine:
    """Something for the server's log."""

    level: int
    name: str
    message: str


ToWorker = Submit | Cancel | Forget
FromWorker = Loading | Ready | Happened | Failed | Fatal | LogLine
State = Literal["loading", "ready", "failed", "stopped"]


class EngineLike(Protocol):
    """What the worker asks of an engine; see moss_jt.engine.Engine."""

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        ...

    def submit(self, request: Request) -> int:
        """Queue a request."""
        ...

    def cancel(self, request: int) -> None:
        """End a request."""
        ...

    def forget(self, conversation: str) -> None:
        """Give back a cache."""
        ...

    def step(self) -> list[Event]:
        """One pass."""
        ...

    def stats(self) -> Stats:
        """Figures."""
        ...


MakeEngine = Callable[[Progress], tuple[EngineLike, ModelInfo]]  # called in the worker, so it must be picklable
