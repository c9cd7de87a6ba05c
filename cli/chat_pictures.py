"""Pictures in a terminal that can show them: the protocols of iTerm2 and of kitty."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

LARGEST = 8 << 20  # bytes that are sent to a terminal
_CHUNK = 4096  # of base64, as kitty's protocol has it


def picture_codes(path: Path, environ: Mapping[str, str]) -> str | None:
    """The escape codes that draw a picture; None where the terminal is not known to understand any."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if len(content) > LARGEST or "TMUX" in environ or environ.get("TERM", "").startswith("screen"):
        return None
    coded = base64.b64encode(content).decode("ascii")
    if "KITTY_WINDOW_ID" in environ or environ.get("TERM_PROGRAM") == "ghostty":
        return _kitty(coded) if path.suffix == ".png" else None
    if environ.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm", "vscode"):
        return f"\x1b]1337;File=inline=1;size={len(content)}:{coded}\x07"
    return None


def _kitty(coded: str) -> str:
    """A PNG in chunks: the first says what it is, all but the last that more comes."""
    chunks = [coded[at : at + _CHUNK] for at in range(0, len(coded), _CHUNK)]
    codes = []
    for number, chunk in enumerate(chunks):
        head = "a=T,f=100," if number == 0 else ""
        codes.append(f"\x1b_G{head}m={int(number < len(chunks) - 1)};{chunk}\x1b\\")
    return "".join(codes)
