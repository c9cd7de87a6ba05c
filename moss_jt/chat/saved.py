"""A conversation on disk: JSON with a version, written whole or not at all, read with distrust.

A file holds texts and the ids that were generated; what surrounds them (tags, markers, status lines)
is made again by the template, so a file cannot smuggle control tokens into a prompt.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from moss_jt.errors import ConversationError

FORMAT = "moss-jt chat"
VERSION = 2  # the newest that is read; a file is written in the oldest that can hold it
MAX_BYTES = 64 << 20  # of a file; a conversation of a thousand turns has about one million
REASONS = ("stop", "length", "time", "cancelled")


@dataclass(frozen=True)
class SavedTools:
    """What a turn with tools holds beside question and answer, since version 2."""

    thoughts: str
    commands: str
    results: str


@dataclass(frozen=True)
class SavedTurn:
    """What is kept of a turn."""

    human: str
    answer: str
    reason: Literal["stop", "length", "time", "cancelled"]
    generated: tuple[int, ...]
    tools: SavedTools | None = None


def write_conversation(path: Path, system: str, turns: Sequence[SavedTurn]) -> None:
    """Write a conversation atomically, readable by its owner only.

    Raises:
        ConversationError: the place cannot be written, or holds a file that is no saved conversation.
    """
    if os.path.lexists(path):
        _check_is_ours(path)
    values = {
        "format": FORMAT,
        "version": VERSION if any(turn.tools for turn in turns) else 1,
        "system": system,
        "turns": [_values(turn) for turn in turns],
    }
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mkstemp: mode 0600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(values, file, ensure_ascii=True, indent=1)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        reason = getattr(error, "strerror", None) or error
        raise ConversationError(
            f"{path} cannot be written: {reason}. Name another file, as in /save chat.json."
        ) from error


def _values(turn: SavedTurn) -> dict[str, Any]:
    """A turn as it stands in the file."""
    values = {"human": turn.human, "answer": turn.answer, "reason": turn.reason, "ids": list(turn.generated)}
    return values if turn.tools is None else {**values, "tools": asdict(turn.tools)}


def _check_is_ours(path: Path) -> None:
    """Refuse to replace a file that somebody else wrote."""
    try:
        read_conversation(path)
    except ConversationError as error:
        raise ConversationError(
            f"{path} exists and is not a conversation saved by moss-jt; it is left as it is. Name another file."
        ) from error


def read_conversation(path: Path) -> tuple[str, list[SavedTurn]]:
    """Read the system prompt and the turns of a file.

    Raises:
        ConversationError: the file cannot be read, or any part of it is not as `write_conversation` writes it.
    """
    values = _read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ConversationError(f"{path} is not a conversation saved by moss-jt. Name a file that /save wrote.")
    version = values.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ConversationError(f"{path} has version {version!r}; this program reads up to {VERSION}. Update moss-jt.")
    system, turns = values.get("system"), values.get("turns")
    if not isinstance(system, str) or not isinstance(turns, list):
        raise ConversationError(f'{path} lacks "system" (a text) or "turns" (a list). Save the conversation again.')
    return system, [_read_turn(turn, f"{path}: turn {number}") for number, turn in enumerate(turns, 1)]


def _read_json(path: Path) -> Any:
    """Parse a file of bounded size."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise ConversationError(f"{path} is not a plain file. Name a file that /save wrote.")
        if info.st_size > MAX_BYTES:
            raise ConversationError(f"{path} has {info.st_size} bytes; a saved conversation has at most {MAX_BYTES}.")
        return json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise ConversationError(f"{path} does not exist. Name a file that /save wrote.") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON
        reason = getattr(error, "strerror", None) or error
        raise ConversationError(
            f"{path} cannot be read as a saved conversation: {reason}. Name a file that /save wrote."
        ) from error


def _read_turn(turn: Any, where: str) -> SavedTurn:
    """Check one turn; `where` names it in errors."""
    if not isinstance(turn, dict):
        raise ConversationError(f"{where} is a {type(turn).__name__}, not an object.")
    human, answer, reason, ids = (turn.get(key) for key in ("human", "answer", "reason", "ids"))
    if not isinstance(human, str) or not isinstance(answer, str):
        raise ConversationError(f'{where}: "human" and "answer" must be texts.')
    if reason not in REASONS:
        raise ConversationError(f'{where}: "reason" is {str(reason)[:40]!r}; known are {", ".join(REASONS)}.')
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 1 << 31 for i in ids):
        raise ConversationError(f'{where}: "ids" must be a list of whole numbers from 0.')
    return SavedTurn(human, answer, cast(Literal["stop"], reason), tuple(ids), _read_tools(turn.get("tools"), where))


def _read_tools(tools: Any, where: str) -> SavedTools | None:
    """Check what a turn says of its tools."""
    if tools is None:
        return None
    keys = ("thoughts", "commands", "results")
    texts = [text for key in keys if isinstance(tools, dict) and isinstance(text := tools.get(key), str)]
    if len(texts) != len(keys):
        raise ConversationError(f'{where}: "tools" must be an object with the texts {", ".join(keys)}.')
    return SavedTools(*texts)
