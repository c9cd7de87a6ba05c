"""How much main memory there is for us, and sizes as people write them.

What is free is the least that any of these leaves: the machine (MemAvailable), every control group
that this process is in (version 1 or 2, limits of parents included), and the limits of the process
itself (address space, data). Nothing here imports numpy or Jittor.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

from moss_jt.errors import ConfigError, DeviceMemoryError, StartupError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
HUGE_PAGE = 2 * MIB
PAGE = mmap.PAGESIZE  # what the system gives and takes back: 4 KiB, on some ARM machines 16 or 64
RESERVE = GIB  # left to the rest of the machine at least,
RESERVE_SHARE = 10  # or one part in this many of what is free

_TO_START = {"Max address space": (384 * MIB, 64 * MIB), "Max data size": (128 * MIB, 16 * MIB)}  # and for each core
_A_THREAD = {
    "Max address space": 72 * MIB,
    "Max data size": 8 * MIB,
}  # its stack, and what its first allocation reserves
_OTHER_THREADS = 4  # that read
_OPTIONS = {"Max address space": "ulimit -v", "Max data size": "ulimit -d"}

_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)
_UNITS = {
    **{"": 1, "b": 1},
    **{"k": KIB, "kib": KIB, "kb": 10**3},
    **{"m": MIB, "mib": MIB, "mb": 10**6},
    **{"g": GIB, "gib": GIB, "gb": 10**9},
    **{"t": 1 << 40, "tib": 1 << 40, "tb": 10**12},
}
_UNLIMITED = 1 << 62  # control groups of version 1 write a number near 2^63 for "no limit"


def parse_size(text: str, what: str = "memory") -> int:
    """Read "6GiB", "6g" (the same), "6GB" (10^9 bytes each), "512MiB", "1.5g", or a number of bytes.

    Raises:
        ConfigError: it is not a size, or less than a byte; `what` names the option.
    """
    found = _SIZE.fullmatch(text)
    unit = _UNITS.get(found.group(2).lower()) if found else None
    if found is None or unit is None:
        raise ConfigError(f"{what} is {text!r}; give a size like 6GiB, 6GB or 512MiB.")
    value = int(Fraction(found.group(1)) * unit)
    if value < 1:
        raise ConfigError(f"{what} is {text!r}; it must be more than nothing.")
    return value


def format_size(count: int) -> str:
    """A number of bytes for people, rounded up, so that what is typed back is never less."""
    unit, name = (GIB, "GiB") if count >= GIB else (MIB, "MiB") if count >= MIB else (KIB, "KiB")
    hundredths = -(-count * 100 // unit)
    return f"{hundredths / 100:.2f}".rstrip("0").rstrip(".") + name


def automatic_memory(root: Path = Path("/")) -> int:
    """What this process may take beside what it holds, where nobody said: what is free, less a reserve.

    The reserve is 1 GiB or a tenth of what is free, whichever is more; but never more than half of it.
    """
    free = available_memory(root)
    return free - min(max(RESERVE, free // RESERVE_SHARE), free // 2)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take before something refuses or swaps.

    Args:
        root: where /proc and /sys are looked for, for tests.

    Raises:
        StartupError: the system does not say how much memory it has.
    """
    machine = _machine_available(root)
    process = [left for _, left in _left_in_process(root)]
    return max(0, min([machine, *_left_in_groups(root), *process]))


def require_room_to_start(root: Path = Path("/")) -> None:
    """Refuse to start where `ulimit -v` or `ulimit -d` leave too little for numpy and Jittor themselves.

    They would hang or crash: their threads and tables do not expect to be refused memory.

    Raises:
        DeviceMemoryError: names the limit, and what it should leave.
    """
    for limit, left in _left_in_process(root):
        start, a_core = _TO_START[limit]
        wanted = start + a_core * usable_cores()
        if left < wanted:
            raise DeviceMemoryError(
                f"{_OPTIONS[limit]} leaves {format_size(max(0, left))} to this process; {format_size(wanted)} are needed "
                "to start. Raise it."
            )


def room_in_process(root: Path = Path("/")) -> int | None:
    """Bytes that the limits of this process leave when its threads have started; None where there are no limits."""
    threads = usable_cores() + _OTHER_THREADS
    return min((left - threads * _A_THREAD[limit] for limit, left in _left_in_process(root)), default=None)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Say what memory was for, where Python or numpy cannot have it.

    Raises:
        DeviceMemoryError: in place of MemoryError.
    """
    try:
        yield
    except MemoryError as error:
        wanted = f" ({' '.join(str(error).split())})" if str(error) else ""
        raise DeviceMemoryError(
            f"the system does not give the memory for {what}{wanted}. Close other programs, or give a smaller --memory."
        ) from error


def resident_memory() -> int:
    """Bytes of memory that this process takes now.

    Raises:
        StartupError: the system does not say.
    """
    return _own_status("VmRSS")


def peak_memory() -> int:
    """Bytes of memory that this process has taken at most.

    Raises:
        StartupError: the system does not say.
    """
    return _own_status("VmHWM")


def _own_status(field: str) -> int:
    file = Path("/proc/self/status")
    found = re.search(rf"^{field}:\s+(\d+) kB", file.read_text("ascii", "replace"), re.MULTILINE)
    if found is None:
        raise StartupError(f"{file} has no {field}, so the memory of this process is unknown. Is /proc mounted?")
    return int(found.group(1)) << 10


def _machine_available(root: Path) -> int:
    file = root / "proc" / "meminfo"
    try:
        lines = file.read_text("ascii", "replace").splitlines()
        values = {line.partition(":")[0]: int(line.partition(":")[2].split()[0]) << 10 for line in lines if ":" in line}
        return values.get("MemAvailable", values["MemFree"])
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise StartupError(
            f"{file} does not tell the free memory ({error}). Give the memory to use yourself."
        ) from error


def _left_in_groups(root: Path) -> Iterator[int]:
    """Limit minus use of each control group from ours up to the root, where there is a limit."""
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text("utf-8", "replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            limits, mount = ["memory.max", "memory.high"], root / "sys/fs/cgroup"  # past the latter it swaps and crawls
            usage, cached = "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            limits, mount = ["memory.limit_in_bytes"], root / "sys/fs/cgroup/memory"
            usage, cached = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        for limit in limits:
            yield from _left_on_the_way(mount, path, limit, usage, cached)


def _left_on_the_way(mount: Path, path: str, limit: str, usage: str, cached: str) -> Iterator[int]:
    parts = [part for part in path.split("/") if part not in ("", "..")]
    folders = [mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]
    for folder in folders:  # inside a container the path may not exist; then its own root is what counts
        most, used = _number(folder / limit), _number(folder / usage)
        if most is not None and used is not None and most < _UNLIMITED:
            yield most - max(0, used - _cached(folder / "memory.stat", cached))


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text("ascii"))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _cached(file: Path, name: str) -> int:
    """File pages that the system drops when somebody needs the room."""
    try:
        words = dict(line.split(maxsplit=1) for line in file.read_text("ascii").splitlines() if " " in line)
        return int(words.get(name, "0"))
    except (OSError, ValueError):
        return 0


def _left_in_process(root: Path) -> Iterator[tuple[str, int]]:
    """What `ulimit -v` and `ulimit -d` leave, with the system's name of the limit."""
    try:
        limits = (root / "proc" / "self" / "limits").read_text("ascii", "replace")
        used = (root / "proc" / "self" / "status").read_text("ascii", "replace")
    except OSError:
        return
    for name, field in (("Max address space", "VmSize"), ("Max data size", "VmData")):
        limit = re.search(rf"^{name}\s+(\d+)\s", limits, re.MULTILINE)
        now = re.search(rf"^{field}:\s+(\d+) kB", used, re.MULTILINE)
        if limit:
            yield name, int(limit.group(1)) - (int(now.group(1)) << 10 if now else 0)
