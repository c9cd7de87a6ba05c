"""Which files of a folder hold the weights, by their names and the index, before any is opened."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from moss_jt.checked_file import printable, read_json_object
from moss_jt.errors import CheckpointError

MAX_FILES = 256  # MOSS has 4; each stays open while it is read
_SINGLE_OR_INDEX = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_NOT_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin", "scaler.bin"})
_SHARD = re.compile(r"(.+)-(\d{1,9})-of-(\d{1,9})(\.bin|\.safetensors)")


@dataclass(frozen=True)
class WeightFiles:
    """The files of weights of a folder.

    Attributes:
        found: those that are there, in the order of their names.
        missing: names that the index or the numbering promises but the folder lacks.
        index: tensor name -> file name, empty where there is no index.
        said_by: what promised the files, for messages.
    """

    found: list[Path]
    missing: list[str] = field(default_factory=list)
    index: dict[str, str] = field(default_factory=dict)
    said_by: str = ""


def find_weight_files(folder: Path) -> WeightFiles:
    """Find the weights of a folder.

    Looked for in the order of Hugging Face's own loader: safetensors, its index, .bin, its index; then
    shards without an index, which must be numbered without a gap if they are numbered at all.

    Raises:
        CheckpointError: there are none, or the index is broken or points outside the folder.
    """
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise CheckpointError(
            f"{printable(folder)} cannot be listed: {error.strerror}. Give the folder of a model."
        ) from error
    for name in _SINGLE_OR_INDEX:
        if name in names:
            return _from_index(folder / name, names) if name.endswith(".json") else WeightFiles([folder / name])
    for ending in (".safetensors", ".bin"):
        weights = [name for name in names if name.endswith(ending) and name not in _NOT_WEIGHTS]
        weights = [name for name in weights if name.startswith(("model", "pytorch_model"))] or weights
        if weights:
            return _from_numbering(folder, weights)
    raise CheckpointError(
        f"{printable(folder)} holds no weights: neither *.safetensors nor *.bin. Is it the folder of a model?"
    )


def _from_index(path: Path, names: list[str]) -> WeightFiles:
    where = printable(path)
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where} lacks the weight_map from tensors to files. Fetch it again.")
    for tensor, name in weight_map.items():
        if (
            not isinstance(name, str)
            or not name.isprintable()
            or name in ("", ".", "..")
            or "/" in name
            or "\\" in name
        ):
            raise CheckpointError(
                f"{where} says that {printable(tensor, 80)} is in {printable(repr(name), 80)}; "
                f"it must name a file of its own folder. Do not use this checkpoint."
            )
    wanted = sorted(set(weight_map.values()))
    _check_number(len(wanted), path)
    present = set(names)
    return WeightFiles(
        [path.parent / name for name in wanted if name in present],
        [name for name in wanted if name not in present],
        weight_map,
        path.name,
    )


def _from_numbering(folder: Path, names: list[str]) -> WeightFiles:
    """Files without an index; where they are numbered "-0000i-of-0000N", find the numbers that lack."""
    _check_number(len(names), folder)
    shards = [match for match in map(_SHARD.fullmatch, names) if match]
    if not shards:
        return WeightFiles([folder / name for name in names])
    series = {(match[1], match[3], match[4]) for match in shards}
    if len(series) > 1 or len(shards) != len(names):
        raise CheckpointError(
            f"{printable(folder)} holds the weights of more than one checkpoint, such as {printable(names[0])} and "
            f"{printable(names[-1])}, and no index. Leave only those of one."
        )
    stem, total, ending = series.pop()
    _check_number(int(total), folder)
    there = {int(match[2]) for match in shards}
    missing = [f"{stem}-{i:0{len(total)}}-of-{total}{ending}" for i in range(1, int(total) + 1) if i not in there]
    return WeightFiles([folder / name for name in names], missing, said_by="the numbering of the others")


def _check_number(count: int, path: Path) -> None:
    if count > MAX_FILES:
        raise CheckpointError(
            f"{printable(path)} speaks of {count} files of weights; at most {MAX_FILES} are accepted."
        )
