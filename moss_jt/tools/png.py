"""PNG files without a library: rows of grey pixels, a line of words in block letters, a text inside."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ROWS = 7
# Each letter is seven rows of five dots, written as numbers in base 32 from the top; drawn for this file.
_LETTERS = {
    "A": "0e 11 11 1f 11 11 11", "B": "1e 11 11 1e 11 11 1e", "C": "0e 11 10 10 10 11 0e",
    "D": "1e 11 11 11 11 11 1e", "E": "1f 10 10 1e 10 10 1f", "F": "1f 10 10 1e 10 10 10",
    "G": "0e 11 10 17 11 11 0e", "H": "11 11 11 1f 11 11 11", "I": "0e 04 04 04 04 04 0e",
    "J": "01 01 01 01 01 11 0e", "K": "11 12 14 18 14 12 11", "L": "10 10 10 10 10 10 1f",
    "M": "11 1b 15 15 11 11 11", "N": "11 19 15 13 11 11 11", "O": "0e 11 11 11 11 11 0e",
    "P": "1e 11 11 1e 10 10 10", "Q": "0e 11 11 11 15 12 0d", "R": "1e 11 11 1e 14 12 11",
    "S": "0f 10 10 0e 01 01 1e", "T": "1f 04 04 04 04 04 04", "U": "11 11 11 11 11 11 0e",
    "V": "11 11 11 11 11 0a 04", "W": "11 11 11 15 15 1b 11", "X": "11 11 0a 04 0a 11 11",
    "Y": "11 11 0a 04 04 04 04", "Z": "1f 01 02 04 08 10 1f", "-": "00 00 00 1f 00 00 00",
    ".": "00 00 00 00 00 0c 0c", ":": "00 0c 0c 00 0c 0c 00", " ": "00 00 00 00 00 00 00",
}  # fmt: skip


def lettered(lines: Sequence[str], *, width: int, height: int, dot: int, text: str = "") -> bytes:
    """A grey picture with lines of capital letters in its middle.

    Args:
        lines: made of A-Z, "-", ".", ":" and spaces.
        width: of the picture, in pixels.
        height: of the picture.
        dot: pixels of a letter's dot, each way.
        text: kept in the file as its description, in any language.
    """
    picture = [bytearray([226]) * width for _ in range(height)]
    top = (height - len(lines) * (_ROWS + 4) * dot) // 2
    for number, line in enumerate(lines):
        left = (width - len(line) * 6 * dot) // 2
        for row in range(_ROWS):
            dots = "".join(f"{int(_LETTERS[letter].split()[row], 16):05b}0" for letter in line)
            for place, one in enumerate(dots):
                if one == "1":
                    _fill(picture, left + place * dot, top + (number * (_ROWS + 4) + row) * dot, dot)
    return encode(picture, text=text)


def _fill(picture: list[bytearray], left: int, top: int, size: int) -> None:
    for row in picture[max(0, top) : top + size]:
        row[max(0, left) : left + size] = bytes([60]) * (len(row[max(0, left) : left + size]))


def encode(rows: Sequence[bytes | bytearray], *, text: str = "") -> bytes:
    """Rows of grey pixels, one byte each, as a PNG file."""
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    about = _chunk(b"iTXt", b"Description\0\0\0\0\0" + text.encode("utf-8", "replace")) if text else b""
    return SIGNATURE + _chunk(b"IHDR", header) + about + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
