"""Text2Image(description): one interface, several back ends; the picture is a file in moss-jt's own folder."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import Protocol

from moss_jt import paths
from moss_jt.errors import ToolError
from moss_jt.language import pick
from moss_jt.tools import png
from moss_jt.tools.tool import Picture, Status, Tool

SECONDS = 300.0  # a picture on a processor takes minutes
MAX_DESCRIPTION = 1000


class DrawingBackend(Protocol):
    """Something that makes pictures."""

    @property
    def name(self) -> str:
        """The word by which it is chosen."""
        ...

    @property
    def note(self) -> str:
        """What the user should know about its pictures; "" for nothing."""
        ...

    def draw(self, description: str) -> bytes:
        """A picture as the bytes of a PNG or JPEG file.

        Raises:
            ToolError: there is none.
        """
        ...

    def check(self) -> Status:
        """Whether it can draw."""
        ...


class Placeholder:
    """No back end: a picture that says so, in letters."""

    name = "placeholder"

    @property
    def note(self) -> str:
        """Says how to get real pictures."""
        return pick(
            "This is only a placeholder: no image back end is set. `moss-jt tools` shows how to set one.",
            "这只是占位图：尚未设置绘图后端。运行 `moss-jt tools` 查看设置方法。",
        )

    def draw(self, description: str) -> bytes:
        """Letters on grey; the description is kept in the file."""
        lines = ("NO PICTURE", "", "NO IMAGE BACK END IS SET", "SEE: MOSS-JT TOOLS")
        return png.lettered(lines, width=512, height=320, dot=3, text=description)

    def check(self) -> Status:
        """It always works, and never draws."""
        return Status("off", pick("only a placeholder is drawn", "只生成占位图"))


def drawing_tool(backend: DrawingBackend, folder: Path | None = None) -> Tool:
    """Text2Image(description) with a back end; pictures go to `folder`, by default in moss-jt's own."""

    def run(*texts: str) -> Picture:
        description = " ".join(", ".join(texts).split())[:MAX_DESCRIPTION]
        if not description:
            raise ToolError("the description is empty.")
        content = backend.draw(description)
        return Picture(_keep(content, folder or _own_folder()), backend.note)

    return Tool("draw", "Text-to-image", "Text2Image(description)", run, seconds=SECONDS, check=backend.check)


def is_kept_here(path: Path) -> bool:
    """Whether a picture is in moss-jt's own folder, so that moss-jt may remove it."""
    return path.parent == _own_folder()


def _own_folder() -> Path:
    return paths.home() / "images"


def _keep(content: bytes, folder: Path) -> Path:
    """Write a picture under a name of its own, whole or not at all."""
    ending = suffix(content)
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}{ending}"
    part = path.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ToolError(f"the picture cannot be written to {folder}: {error.strerror}.") from error
    return path


def suffix(content: bytes) -> str:
    """The ending that fits a picture's first bytes.

    Raises:
        ToolError: it is no picture.
    """
    for start, ending in ((png.SIGNATURE, ".png"), (b"\xff\xd8\xff", ".jpg")):
        if content.startswith(start):
            return ending
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    raise ToolError("the back end did not send a picture that is PNG, JPEG or WebP.")
