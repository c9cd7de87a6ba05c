"""The tools of a ToolBox for the server's answers."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moss_jt.errors import ToolError
from moss_jt.server.calls import DrawnPicture, FoundSource, ToolResults
from moss_jt.tools.drawing import is_kept_here, suffix
from moss_jt.tools.wording import joined

if TYPE_CHECKING:
    from moss_jt.template import ToolLine
    from moss_jt.tools.tool import Picture
    from moss_jt.tools.toolbox import Ran, ToolBox

LARGEST = 16 << 20  # bytes of a picture
_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
_log = logging.getLogger(__name__)


class BoxRunner:
    """Runs the calls of answers with tools of this machine; implements `moss_jt.server.calls.ToolRunner`."""

    def __init__(self, box: ToolBox) -> None:
        self._box = box

    @property
    def enabled(self) -> Sequence[str | ToolLine]:
        """The tools that are offered."""
        return self._box.lines

    def run(self, commands: str) -> ToolResults | None:
        """What the calls of a Commands field give; None where nothing was called."""
        ran = list(self._box.run(commands))
        if not ran:
            return None
        sources = (FoundSource(one.number, one.title, one.url) for call in ran for one in call.sources)
        return ToolResults(joined([one.block for one in ran]), tuple(sources), _pictures(ran))


def _pictures(ran: Sequence[Ran]) -> tuple[DrawnPicture, ...]:
    """The pictures of a turn, each once: the same call has the same picture."""
    drawn = {one.picture.path: one.picture for one in ran if one.picture is not None}
    read = (_read(picture) for picture in drawn.values())
    return tuple(picture for picture in read if picture is not None)


def _read(picture: Picture) -> DrawnPicture | None:
    """A picture from its file, which goes if it is our own: with its conversation it is to be gone for good."""
    try:
        if picture.path.stat().st_size > LARGEST:
            raise ToolError(f"it has more than {LARGEST} bytes.")
        content = picture.path.read_bytes()
        kind = _TYPES[suffix(content)]
    except (OSError, ToolError) as error:
        _log.warning("the picture %s cannot be shown: %s", picture.path, error)
        return None
    if is_kept_here(picture.path):
        with contextlib.suppress(OSError):
            picture.path.unlink()
    return DrawnPicture(secrets.token_hex(16), kind, picture.note, content)
