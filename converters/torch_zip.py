"""Where the records of a torch zip archive lie, from the zip's directory; nothing is unpacked.

torch.save writes a zip whose entries are stored, not compressed, so a record is a run of bytes in
the file that can be read by position. Python's zipfile would do for honest files; here each entry's
own header is compared with the directory, and all sizes and places are checked against the file, so
that a record is known to lie where nothing else does.

The zip's CRC-32 is checked for the small records that are read whole. Those of the storages are not:
torch does not check them either, and writes 0 where it was told not to compute them.

Source: PKWARE's APPNOTE.TXT 6.3, sections 4.3 and 4.5.3 (zip64).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from moss_jt.checked_file import CheckedFile, printable
from moss_jt.errors import CheckpointError

ZIP_MAGIC = b"PK\x03\x04"
_MAX_DIRECTORY = 32 << 20
_MAX_ENTRIES = 200_000
_MAX_COMMENT = 0xFFFF

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_SIZES_LATER = 0x08  # flag: the local header has no sizes, they follow the data
_ENCRYPTED = 0x01
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # the real value is in a zip64 field


@dataclass(frozen=True)
class Record:
    """A stored entry: `size` bytes from offset `start` of the file; `crc` 0 may mean not computed."""

    name: str
    start: int
    size: int
    crc: int


def read_directory(file: CheckedFile) -> dict[str, Record]:
    """The records of a zip file by name, in the order in which they lie.

    Raises:
        CheckpointError: the zip is cut short, damaged, compressed, encrypted, or inconsistent.
    """
    start, size, count = _find_directory(file)
    entries = _read_entries(file, file.read(start, size), count)
    records: dict[str, Record] = {}
    end = 0
    for name, offset, nbytes, crc, flags in sorted(entries, key=lambda entry: entry[1]):
        if offset < end:
            raise _damaged(file, f"the entry {name} lies over another")
        data = _data_start(file, name, offset, nbytes, flags)
        end = data + nbytes
        if end > start:
            raise _damaged(file, f"the entry {name} reaches past the data")
        if name in records:
            raise _damaged(file, f"the entry {name} is there twice")
        records[name] = Record(name, data, nbytes, crc)
    return records


def read_record(file: CheckedFile, record: Record, *, limit: int) -> bytearray:
    """Read a small record whole and check its CRC.

    Raises:
        CheckpointError: it is larger than `limit`, or damaged.
    """
    if record.size > limit:
        raise _damaged(file, f"{record.name} has {record.size} bytes where at most {limit} make sense")
    data = file.read(record.start, record.size)
    if record.crc and zlib.crc32(data) != record.crc:
        raise _damaged(file, f"the checksum of {record.name} is wrong")
    return data


def _find_directory(file: CheckedFile) -> tuple[int, int, int]:
    """Start, size and number of entries of the central directory."""
    tail_size = min(file.size, _END.size + _MAX_COMMENT)
    tail_start = file.size - tail_size
    tail = file.read(tail_start, tail_size)
    at = tail.rfind(b"PK\x05\x06")
    while at >= 0:
        if at + _END.size <= tail_size and at + _END.size + _END.unpack_from(tail, at)[7] == tail_size:
            break
        at = tail.rfind(b"PK\x05\x06", 0, at)
    if at < 0:
        raise CheckpointError(
            f"{printable(file.path)} is cut short: the directory at its end is missing. Fetch it again."
        )
    _, disk, first_disk, here, count, size, start, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    locator = tail[at - _END64_LOCATOR.size : at] if at >= _END64_LOCATOR.size else b""
    if locator[:4] == b"PK\x06\x07":
        _, _, end, _ = _END64_LOCATOR.unpack(locator)
        fields = _END64.unpack(file.read(end, _END64.size))
        if fields[0] != b"PK\x06\x06":
            raise _damaged(file, "its zip64 end record is not where it should be")
        disk, first_disk, here, count, size, start = fields[4:]
    if disk or first_disk or here != count:
        raise _damaged(file, "it is one part of a split archive")
    if start + size > end or size > _MAX_DIRECTORY or count > _MAX_ENTRIES:
        raise _damaged(file, f"its directory of {count} entries and {size} bytes at {start} is impossible")
    return start, size, count


def _read_entries(file: CheckedFile, data: bytearray, count: int) -> list[tuple[str, int, int, int, int]]:
    """Name, offset of the local header, size, CRC and flags of each entry."""
    entries = []
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(data) or data[at : at + 4] != b"PK\x01\x02":
            raise _damaged(file, "its directory ends too early")
        fields = _CENTRAL.unpack_from(data, at)
        flags, method, crc, packed, size = fields[3], fields[4], *fields[7:10]
        name_size, extra_size, comment_size, disk = fields[10:14]
        offset = fields[16]
        at += _CENTRAL.size
        name = _decode_name(file, data[at : at + name_size])
        extra = data[at + name_size : at + name_size + extra_size]
        at += name_size + extra_size + comment_size
        size, packed, offset = _zip64_values(file, name, extra, [size, packed, offset])
        if flags & _ENCRYPTED:
            raise _damaged(file, f"the entry {name} is encrypted")
        if method or packed != size:
            raise _damaged(file, f"the entry {name} is compressed, which torch.save never does")
        if disk not in (0, _FULL16):
            raise _damaged(file, "it is one part of a split archive")
        entries.append((name, offset, size, crc, flags))
    if at != len(data):
        raise _damaged(file, "its directory is longer than its entries")
    return entries


def _zip64_values(file: CheckedFile, name: str, extra: bytearray, values: list[int]) -> list[int]:
    """`values` (size, packed size, offset) with those that did not fit 32 bits taken from the zip64 field."""
    if _FULL32 not in values:
        return values
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1 and size >= 8 * values.count(_FULL32) and at + 4 + size <= len(extra):
            wide = iter(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
            return [next(wide) if value == _FULL32 else value for value in values]
        at += 4 + size
    raise _damaged(file, f"the entry {name} lacks its zip64 sizes")


def _data_start(file: CheckedFile, name: str, offset: int, nbytes: int, flags: int) -> int:
    """Where the data of an entry begins, after its local header was compared with the directory."""
    fields = _LOCAL.unpack(file.read(offset, _LOCAL.size))
    name_size, extra_size = fields[9:11]
    if fields[0] != ZIP_MAGIC or fields[3]:
        raise _damaged(file, f"the entry {name} does not begin where the directory says")
    if _decode_name(file, file.read(offset + _LOCAL.size, name_size)) != name:
        raise _damaged(file, f"the entry {name} has another name in the directory")
    sizes = fields[7:9]
    if not flags & _SIZES_LATER and any(size not in (nbytes, _FULL32) for size in sizes):
        raise _damaged(file, f"the entry {name} has another size in the directory")
    return int(offset + _LOCAL.size + name_size + extra_size)


def _decode_name(file: CheckedFile, raw: bytes | bytearray) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _damaged(file, "an entry's name is not UTF-8") from None
    if not name.isprintable() or not name or name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise _damaged(file, f'an entry has the unusable name "{printable(name, 80)}"')
    return name


def _damaged(file: CheckedFile, fault: str) -> CheckpointError:
    return CheckpointError(f"{printable(file.path)} is not a sound torch file: {fault}. Fetch it again.")
