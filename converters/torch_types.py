"""What the pickle of a torch file may describe: element types, storages and tensors."""

from __future__ import annotations

from dataclasses import dataclass

# name in the pickle -> (our dtype, bytes of an element)
STORAGE_TYPES: dict[str, tuple[str, int]] = {
    "torch.BoolStorage": ("bool", 1),
    "torch.ByteStorage": ("uint8", 1),
    "torch.CharStorage": ("int8", 1),
    "torch.ShortStorage": ("int16", 2),
    "torch.HalfStorage": ("float16", 2),
    "torch.BFloat16Storage": ("bfloat16", 2),
    "torch.IntStorage": ("int32", 4),
    "torch.FloatStorage": ("float32", 4),
    "torch.LongStorage": ("int64", 8),
    "torch.DoubleStorage": ("float64", 8),
    "torch.storage.UntypedStorage": ("uint8", 1),
}
DTYPES: dict[str, tuple[str, int]] = {
    "torch.bool": ("bool", 1),
    "torch.uint8": ("uint8", 1),
    "torch.int8": ("int8", 1),
    "torch.float8_e4m3fn": ("float8_e4m3fn", 1),
    "torch.float8_e5m2": ("float8_e5m2", 1),
    "torch.uint16": ("uint16", 2),
    "torch.int16": ("int16", 2),
    "torch.float16": ("float16", 2),
    "torch.bfloat16": ("bfloat16", 2),
    "torch.uint32": ("uint32", 4),
    "torch.int32": ("int32", 4),
    "torch.float32": ("float32", 4),
    "torch.uint64": ("uint64", 8),
    "torch.int64": ("int64", 8),
    "torch.float64": ("float64", 8),
}


@dataclass(frozen=True)
class Storage:
    """A run of bytes kept elsewhere in the file under `key`."""

    key: str
    dtype: str
    itemsize: int
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole run."""
        return self.count * self.itemsize


@dataclass(frozen=True)
class PickledTensor:
    """A view of a storage. `offset` and `stride` count elements of `dtype`; it lies inside the storage."""

    storage: Storage
    dtype: str
    itemsize: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
