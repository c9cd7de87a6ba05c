"""The tensors of one .bin file that torch.save wrote: where each lies, without torch.

Two formats are known. The zip format (torch 1.6 and later) has a pickle `data.pkl` that describes the
tensors and a record `data/KEY` for each storage. The older one is a row of pickles (magic number,
version, machine, description, storage keys) followed by the storages, each with its length before it.
Only descriptions are read here; the numbers stay in the file.

Source: torch/serialization.py of torch 2.13, `_save` and `_legacy_save`.
"""

from __future__ import annotations

from typing import Any

from moss_jt.checked_file import CheckedFile, printable, wrong_kind
from moss_jt.converters.strided import StoredTensor
from moss_jt.converters.torch_pickle import (
    MAX_PICKLE_BYTES,
    NotAPickleError,
    Pickle,
    read_pickle,
)
from moss_jt.converters.torch_types import PickledTensor, Storage
from moss_jt.converters.torch_zip import ZIP_MAGIC, read_directory, read_record
from moss_jt.errors import CheckpointError
from moss_jt.safetensors_file import check_name

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_COUNT_BYTES = 8
_MAX_EXPANDED = 16 << 20  # bytes of a tensor that repeats the elements of a smaller storage
_WRAPPERS = ("state_dict", "model_state_dict", "module", "model")
_MAX_WRAPPERS = 3


def read_torch_file(file: CheckedFile) -> dict[str, StoredTensor]:
    """List the tensors of a .bin file in its own order.

    Raises:
        CheckpointError: the file is damaged, asks to run something, or holds something else than tensors by name.
    """
    head = file.head(64)
    kind = wrong_kind(head)
    if kind:
        raise CheckpointError(f"{printable(file.path)} {kind}")
    if head.startswith(ZIP_MAGIC):
        value, places = _read_zip(file)
    else:
        value, places = _read_legacy(file, head)
    where = printable(file.path)
    tensors = _find_state_dict(value, where)
    return {name: _place(name, tensor, places[tensor.storage.key], where) for name, tensor in tensors.items()}


def _read_zip(file: CheckedFile) -> tuple[Any, dict[str, int]]:
    """The described value, and for each storage key its start in the file."""
    where = printable(file.path)
    records = read_directory(file)
    descriptions = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(descriptions) != 1:
        raise CheckpointError(
            f"{where} is a zip file with {len(descriptions)} descriptions of tensors (data.pkl) where one was expected. "
            f"Was it written by torch.save?"
        )
    root = descriptions[0].removesuffix("data.pkl")
    order = records.get(f"{root}byteorder")
    if order is not None and read_record(file, order, limit=16) != b"little":
        raise _big_endian(where)
    data = read_record(file, records[descriptions[0]], limit=MAX_PICKLE_BYTES)
    pickle = read_pickle(data, 0, where)
    if pickle.end != len(data):
        raise CheckpointError(f"{where} is damaged: its description goes on after its end. Fetch it again.")
    places = {}
    for key, storage in pickle.storages.items():
        record = records.get(f"{root}data/{key}")
        if record is None:
            raise CheckpointError(
                f'{where} is damaged: the data "{printable(key, 60)}" of a tensor is missing. Fetch it again.'
            )
        if record.size != storage.nbytes:
            raise CheckpointError(
                f'{where} is damaged: the data "{printable(key, 60)}" has {record.size} bytes '
                f"where {storage.nbytes} were expected. Fetch it again."
            )
        places[key] = record.start
    return pickle.value, places


def _read_legacy(file: CheckedFile, head: bytearray) -> tuple[Any, dict[str, int]]:
    """As `_read_zip`, for the format before torch 1.6."""
    where = printable(file.path)
    data = file.head(MAX_PICKLE_BYTES)
    try:
        magic = read_pickle(data, 0, where)
    except NotAPickleError as error:
        if head[0] == 0x80:  # every pickle of torch.save begins so
            raise
        raise CheckpointError(
            f"{where} is neither a torch nor a safetensors file: it begins with {head[:8].hex(' ')}. Fetch it again."
        ) from error
    if type(magic.value) is not int or magic.value != _LEGACY_MAGIC:
        raise CheckpointError(f"{where} is a pickle, but not one of torch.save. Do not use this file.")
    version = read_pickle(data, magic.end, where)
    machine = read_pickle(data, version.end, where)
    if version.value != _LEGACY_VERSION or not isinstance(machine.value, dict):
        raise CheckpointError(
            f"{where} has an unknown version of torch's old format. Save it again with a newer torch."
        )
    if machine.value.get("little_endian") is not True:
        raise _big_endian(where)
    description = read_pickle(data, machine.end, where)
    keys = read_pickle(data, description.end, where)
    return description.value, _locate_legacy(file, keys, description.storages)


def _locate_legacy(file: CheckedFile, keys: Pickle, storages: dict[str, Storage]) -> dict[str, int]:
    """Walk along the storages, each a count of elements in 8 bytes and then the elements."""
    where = printable(file.path)
    at = keys.end
    places: dict[str, int] = {}
    order = keys.value
    if (
        not isinstance(order, list)
        or not all(isinstance(key, str) for key in order)
        or sorted(order) != sorted(storages)
    ):
        raise CheckpointError(f"{where} is damaged: its list of storages is not that of its tensors. Fetch it again.")
    for key in order:
        storage = storages[key]
        count = int.from_bytes(file.read(at, _COUNT_BYTES), "little", signed=True)
        if count != storage.count:
            raise CheckpointError(
                f"{where} is damaged: a storage of {storage.count} elements says that it has {count}. Fetch it again."
            )
        places[key] = at + _COUNT_BYTES
        at = places[key] + storage.nbytes
    if at != file.size:
        fault = "is cut short" if at > file.size else "goes on after its last storage"
        raise CheckpointError(f"{where} {fault}: it should have {at} bytes and has {file.size}. Fetch it again.")
    return places


def _find_state_dict(value: Any, where: str) -> dict[str, PickledTensor]:
    """The dict of tensors itself, or the one that a trainer wrapped in a larger dict."""
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{where} holds a {_kind(value)} where a dict of tensors by name was expected. Is it a model's?"
            )
        if any(isinstance(item, PickledTensor) for item in value.values()):
            return _only_tensors(value, where)
        wrapped = [key for key in _WRAPPERS if isinstance(value.get(key), dict)]
        if len(wrapped) != 1:
            found = f"candidates are {', '.join(wrapped)}" if wrapped else "it holds none"
            raise CheckpointError(
                f"{where} does not say which of its parts is the dict of tensors: {found}. Save that dict alone."
            )
        value = value[wrapped[0]]
    raise CheckpointError(f"{where} hides its tensors too deeply in other dicts. Save the dict of tensors alone.")


def _only_tensors(values: dict[Any, Any], where: str) -> dict[str, PickledTensor]:
    for name, value in values.items():
        check_name(name, where)
        if not isinstance(value, PickledTensor):
            raise CheckpointError(f"{where} holds {name}, a {_kind(value)}, among its tensors. Save the tensors alone.")
    return values


def _place(name: str, tensor: PickledTensor, storage_start: int, where: str) -> StoredTensor:
    """Turn an offset in a storage into one in the file."""
    start = storage_start + tensor.offset * tensor.itemsize
    placed = StoredTensor(tensor.dtype, tensor.shape, tensor.stride, start)
    if placed.overlapping:
        raise CheckpointError(
            f"{where}: {name} {tensor.shape} with stride {tensor.stride} overlaps itself; weights never do. "
            f"Do not use this file."
        )
    if placed.nbytes > max(tensor.storage.nbytes, _MAX_EXPANDED):
        raise CheckpointError(
            f"{where}: {name} {tensor.shape} would have {placed.nbytes} bytes, but the file stores only "
            f"{tensor.storage.nbytes} of them. Do not use this file."
        )
    return placed


def _kind(value: Any) -> str:
    names = {PickledTensor: "lone tensor", Storage: "storage", int: "number", float: "number", str: "text"}
    return names.get(type(value), type(value).__name__.strip("_").lower())


def _big_endian(where: str) -> CheckpointError:
    return CheckpointError(
        f"{where} was written on a big-endian machine, which is not supported. Save it again on another."
    )
