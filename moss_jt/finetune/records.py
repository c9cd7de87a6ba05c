"""The files of a data folder, one record after the other.

For each of "train" and "val" there may be: `train.jsonl` (a record a line), `train.json` (one record or a list),
`train.txt` (one text), or a folder `train/` of such files. A folder with only .json files, as the data was
published, is training data. A record is a conversation (meta_instruction, chat{turn_1 …}) or {"text": …}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from moss_jt.errors import ConfigError

Split = Literal["train", "val"]
Record = dict[str, Any]

_KINDS = (".jsonl", ".json", ".txt")


def files_of(data_dir: Path, split: Split) -> list[Path]:
    """The files of one part of the data, in order; none where there are none."""
    named = [data_dir / f"{split}{kind}" for kind in _KINDS if (data_dir / f"{split}{kind}").is_file()]
    folder = data_dir / split
    if folder.is_dir():
        named += sorted(file for file in folder.rglob("*") if file.suffix in _KINDS and file.is_file())
    if not named and split == "train":
        taken = {f"val{kind}" for kind in _KINDS}
        named = sorted(file for file in data_dir.glob("*.json") if file.name not in taken)
    return named


def require_files(data_dir: Path, split: Split) -> list[Path]:
    """The files of a part that must be there.

    Raises:
        ConfigError: they are not.
    """
    if not data_dir.is_dir():
        raise ConfigError(f"--data_dir {data_dir} is not a folder. Give the folder that holds {split}.jsonl.")
    found = files_of(data_dir, split)
    if not found:
        raise ConfigError(
            f"{data_dir} has no data for {split}: wanted is {split}.jsonl, {split}.json, {split}.txt or a folder {split}."
        )
    return found


def read_records(file: Path) -> Iterator[tuple[str, Record]]:
    """Every record of a file with its place, for messages.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    if file.suffix == ".jsonl":
        for number, line in enumerate(_lines(file), 1):
            if line.strip():
                yield f"{file}:{number}", _record(_parse(line, f"{file}:{number}"), f"{file}:{number}")
        return
    text = "".join(_lines(file))
    if file.suffix == ".txt":
        yield str(file), {"text": text}
    else:
        values = _parse(text, str(file))
        for number, value in enumerate(values if isinstance(values, list) else [values], 1):
            place = f"{file}, record {number}" if isinstance(values, list) else str(file)
            yield place, _record(value, place)


def _lines(file: Path) -> Iterator[str]:
    """The lines of a text, one at a time: the data may be larger than the memory."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            yield from lines
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as UTF-8 text: {error}.") from error


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON: {error}. Mend or remove it.") from error


def _record(value: Any, place: str) -> Record:
    if not isinstance(value, dict) or not ("chat" in value or "text" in value):
        found = ", ".join(list(value)[:5]) if isinstance(value, dict) else type(value).__name__
        raise ConfigError(f'{place} holds {found}; wanted is a conversation with "chat", or a "text".')
    return value
