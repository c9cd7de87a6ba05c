"""What was trained, as a model's folder: native, which every other command takes, quantise and conversion included."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.adapter import DESCRIPTION, is_unfinished
from moss_jt.checkpoint import CONFIG_FILE, INDEX_FILE, expected_shapes
from moss_jt.config import FloatType, MossConfig, TemplateName
from moss_jt.converters.hf2jittor import hf2jittor
from moss_jt.converters.journal import partial_folder
from moss_jt.errors import ConfigError, DiskError
from moss_jt.finetune.disk import writing
from moss_jt.layout import ITEM_BYTES
from moss_jt.progress import Progress
from moss_jt.safetensors_file import write_tensors
from moss_jt.tokenizer import TOKENIZER_FILES, load_tokenizer

Floats = npt.NDArray[np.float32]

_END = "<eom>"
_SPARE_BYTES = 16 << 20  # headers, tokenizer, journals
_SOURCE, _MADE = "source", "made"  # in the workplace, the hidden folder beside the one that is written
_OLD = "old"  # there, too: what lay at the place of the new folder


@dataclass(frozen=True)
class Export:
    """A model that is to be written.

    Attributes:
        config: its shape; neither matrices nor head are quantised.
        tensor: gives the values of a tensor, float32.
        tokenizer: folder whose tokenizer files are copied. Where it knows `<eom>`, that becomes the end of a text: what
            answers end in.
        dtype: of the written weights.
        template: the prompt format that was learned.
        name: of the model.
    """

    config: MossConfig
    tensor: Callable[[str], Floats]
    tokenizer: Path
    dtype: FloatType
    template: TemplateName | None
    name: str


def export_model(folder: Path, export: Export, progress: Progress | None = None) -> Path:
    """Write a native folder; an earlier one at this place is replaced when the new one is whole.

    Raises:
        ConfigError: a value is too large for the type.
        DiskError: the disk is full or fails.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 (links are kept)
    work = folder.with_name(f".{folder.name}.{os.getpid()}")
    source, made = work / _SOURCE, work / _MADE
    with writing(folder):
        try:
            _clear(work, folder)
            for abandoned in _abandoned(folder):
                _clear(abandoned, folder)
            source.mkdir(parents=True)
            _check_room(source, folder, export)
            _write_foreign(source, export)
            _convert(source, made, export, progress)
            _tell_more(made / CONFIG_FILE, export)
            _replace(folder, made)
        except DiskError as error:  # where there is no room: the user knows of no workplace
            raise DiskError(str(error).replace(str(made), str(folder))) from error
        finally:
            _clear(work, folder)
    return folder


def _check_room(work: Path, folder: Path, export: Export) -> None:
    """See that there is room for the floats as they are written first, and for the result of one file of them.

    Raises:
        DiskError: there is not.
    """
    shapes = expected_shapes(export.config)
    numbers = [sum(prod(shapes[name]) for name in names) for names in _groups(export.config)]
    first, item = np.dtype(_type_written(export)).itemsize, ITEM_BYTES[export.dtype]
    needed = sum(numbers) * first + max(numbers) * item + _SPARE_BYTES  # each file goes when it has been converted
    free = shutil.disk_usage(work).free
    if needed > free:
        raise DiskError(
            f"{folder} needs {needed / 1e9:.2f} GB on its disk while it is written; {free / 1e9:.2f} GB are free. "
            "Make room there, or give a folder on another disk."
        )


def _type_written(export: Export) -> type[np.floating[Any]]:
    """The type of the floats before conversion: numpy has no bfloat16."""
    return np.float16 if export.dtype == "float16" else np.float32


def _convert(source: Path, made: Path, export: Export, progress: Progress | None) -> None:
    """Make a native folder.

    Raises:
        OSError: the disk fails: it cannot be gone on with here, as a conversion's own words would have it.
        DiskError: there is no room.
    """
    try:
        hf2jittor(source, made, dtype=export.dtype, name=export.name, delete_source=True, progress=progress)
    except DiskError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise


def _write_foreign(folder: Path, export: Export) -> None:
    """The same as a Hugging Face folder, a file for each layer: what conversion reads, and deletes file by file."""
    dtype = _type_written(export)
    groups = list(_groups(export.config))
    places: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_tensors(folder / file, {name: _as_type(name, export.tensor(name), dtype) for name in names})
        places.update(dict.fromkeys(names, file))
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": places}), "utf-8")
    copy_tokenizer(export.tokenizer, folder)
    tokenizer = load_tokenizer(folder)
    eos = tokenizer.markers.get(_END, tokenizer.eos_id)
    if _END in tokenizer.markers:
        end_with_marker(folder)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos}
    values = {**export.config.to_dict(), **ids, "torch_dtype": export.dtype}
    del values["moss_jt"]
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def _groups(config: MossConfig) -> Iterator[list[str]]:
    """The names of a model's tensors, those of a layer together."""
    group: list[str] = []
    for name in expected_shapes(config):
        if group and name.split(".")[:3] != group[-1].split(".")[:3]:
            yield group
            group = []
        group.append(name)
    yield group


def _as_type(name: str, values: Floats, dtype: type[np.floating[Any]]) -> npt.NDArray[Any]:
    """Values in the type in which they are written.

    Raises:
        ConfigError: one becomes infinite.
    """
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(values, dtype=dtype)
    if not np.isfinite(cast).all():
        raise ConfigError(f"{name} has values that {np.dtype(dtype).name} does not hold. Give --dtype fp32 or bf16.")
    return cast


def check_destination(folder: Path) -> None:
    """Refuse to replace what is not a model that a run like this has written.

    Raises:
        ConfigError: something else lies there.
    """
    is_ours = is_unfinished(folder) or any((folder / name).is_file() for name in (CONFIG_FILE, DESCRIPTION))
    if is_taken(folder) and not is_ours:
        raise ConfigError(f"{folder} holds something else than a model. Give another --output_dir.")


def is_taken(folder: Path) -> bool:
    """Whether something lies there already; an empty folder is nothing."""
    return os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir()))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def end_with_marker(folder: Path) -> None:
    """Make `<eom>` the end of a text in the files of a tokenizer."""
    names = ("special_tokens_map.json", "tokenizer_config.json")
    for name in names if (folder / names[1]).is_file() else names[:1]:
        path = folder / name
        values: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        old = values.get("eos_token")
        values["eos_token"] = {**old, "content": _END} if isinstance(old, dict) else _END
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _tell_more(path: Path, export: Export) -> None:
    """Tell what a foreign config.json cannot: the prompt format, and how the model is best asked."""
    values = json.loads(path.read_text("utf-8"))
    if export.template is not None:
        values["moss_jt"]["template"] = export.template
    if export.config.sampling.values():
        values["moss_jt"]["sampling"] = export.config.sampling.values()
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _replace(folder: Path, made: Path) -> None:
    """Put a folder at its place; one that was there lies in the workplace afterwards."""
    if folder.exists():
        folder.rename(made.with_name(_OLD))
    made.rename(folder)


def _clear(work: Path, folder: Path) -> None:
    """Remove a workplace; a folder that was moved there comes back if no new one took its place."""
    if (work / _OLD).exists() and not folder.exists():
        (work / _OLD).rename(folder)
    shutil.rmtree(work, ignore_errors=True)


def _abandoned(folder: Path) -> list[Path]:
    """The workplaces that killed processes have left beside a folder; what else has such a name is not ours."""
    form = re.compile(rf"\.{re.escape(folder.name)}\.(\d{{1,9}})")
    ours = {_SOURCE, _MADE, _OLD, partial_folder(Path(_MADE)).name}
    found = []
    for path in folder.parent.iterdir() if folder.parent.is_dir() else ():
        named = form.fullmatch(path.name)
        if named and not _is_alive(int(named[1])) and path.is_dir() and {part.name for part in path.iterdir()} <= ours:
            found.append(path)
    return found


def _is_alive(number: int) -> bool:
    """Whether a process of this number runs."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
