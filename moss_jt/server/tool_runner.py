"""The tools of a ToolBox for the server's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moss_jt.tools.wording import joined

if TYPE_CHECKING:
    from moss_jt.template import ToolLine
    from moss_jt.tools.toolbox import ToolBox


class BoxRunner:
    """Runs the calls of answers with tools of this machine; implements `moss_jt.server.calls.ToolRunner`."""

    def __init__(self, box: ToolBox) -> None:
        self._box = box

    @property
    def enabled(self) -> Sequence[str | ToolLine]:
        """The tools that are offered."""
        return self._box.lines

    def run(self, commands: str) -> str | None:
        """The Results field of a Commands field; None where nothing was called."""
        blocks = [ran.block for ran in self._box.run(commands)]
        return joined(blocks) if blocks else None
