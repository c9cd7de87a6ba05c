"""How long work reports its progress: the library calls these, the command line draws them.

The library never prints. Whatever may take more than two seconds takes a `progress` argument.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Somebody who wants to know how far a piece of work has come."""

    def begin(self, task: str, total: float, unit: str) -> None:
        """Start a task of `total` units ("B", "files", "tokens", "layers"); `task` is shown to the user."""

    def advance(self, amount: float) -> None:
        """`amount` more units of the current task are done."""

    def end(self) -> None:
        """The current task is over, finished or not."""


class Quiet:
    """The reporter that reports nothing; the default everywhere."""

    def begin(self, task: str, total: float, unit: str) -> None:
        """Ignore."""

    def advance(self, amount: float) -> None:
        """Ignore."""

    def end(self) -> None:
        """Ignore."""
