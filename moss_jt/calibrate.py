"""Calibration: the rates of this machine, measured once and kept under `paths.state_dir()`.

    found = calibrate(Wanted(stored={"int4", "float16"}, compute="fast", kv="float16", folder=folder))
    rates = found.rates(...)

Only what is missing is measured: a new format, another disk, another type of cache. What is kept
holds for one processor, its cores and one state of our kernels. Where Jittor is not compiled yet,
the kernels' rates are estimated from the limits of memory and arithmetic instead.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from moss_jt import paths, startup
from moss_jt.errors import DiskError
from moss_jt.kv_layout import KVType
from moss_jt.language import pick
from moss_jt.limits import Limits
from moss_jt.memory import MIB
from moss_jt.predict import KernelRate, Rates, Spread
from moss_jt.progress import Progress, Quiet
from moss_jt.runner import Compute
from moss_jt.startup import machine

_log = logging.getLogger(__name__)

_FILE = "calibration.json"
_VERSION = 2
_MOST_MACHINES = 8  # and states of our kernels, that are kept
_LEAST_FILE = 64 * MIB  # of a file that the disk is measured with
_DECODE_SHARE, _ROUNDED_SHARE, _FLOAT_SHARE = 0.85, 0.5, 0.5  # of the limits, where kernels were not measured
_KV_BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0625}
_ESTIMATED_LAYER_S, _ESTIMATED_TOKEN_S = 0.0005, 0.002


@dataclass(frozen=True)
class Wanted:
    """What a prediction needs to know.

    Attributes:
        stored: how matrices are stored: "int4", "int8", types of floating point.
        compute: "fast" rounds the inputs of int4 and int8.
        kv: type of the cache.
        folder: of the model, or where it would come to lie: its disk is measured.
    """

    stored: frozenset[str]
    compute: Compute
    kv: KVType
    folder: Path


@dataclass(frozen=True)
class DiskRate:
    """What a disk reaches.

    Attributes:
        rate: bytes a second.
        beside: the same while the processor computes and the memory is busy.
        cpu: processor seconds a byte.
    """

    rate: Spread
    beside: Spread
    cpu: float


@dataclass(frozen=True)
class KernelFound:
    """What the kernels reach with one format and way of computing."""

    decode: Spread
    prefill: Spread


@dataclass(frozen=True)
class Calibration:
    """What is known of this machine.

    Attributes:
        when: of the last measurement, UTC.
        memory: bytes a second that all cores together read.
        fp32, int8: operations a second, without memory.
        idle: the part of all cores that nobody else used meanwhile, 0 to 1.
        disks: by device number.
        kernels: by format and way of computing, "int4 fast".
        attention: bytes of cached keys and values a second, by type.
        layer_s, token_s: fixed times of a pass; None where not measured.
    """

    when: str = ""
    memory: Spread | None = None
    fp32: Spread | None = None
    int8: Spread | None = None
    idle: float = 1.0
    disks: Mapping[str, DiskRate] = field(default_factory=dict)
    kernels: Mapping[str, KernelFound] = field(default_factory=dict)
    attention: Mapping[str, Spread] = field(default_factory=dict)
    layer_s: float | None = None
    token_s: float | None = None

    def rates(self, wanted: Wanted) -> Rates:
        """Medians for a prediction; kernels that were not measured are estimated from the limits."""
        assert self.memory is not None, "calibrate() measures the memory first"
        disk = self.disks[disk_of(wanted.folder)]
        return Rates(
            disk=disk.rate.median,
            disk_beside=disk.beside.median,
            disk_cpu=disk.cpu,
            cores=machine.logical_cores(),
            kernels={stored: self._kernel(stored, wanted.compute) for stored in wanted.stored},
            attention=self._attention(wanted.kv),
            layer_s=_ESTIMATED_LAYER_S if self.layer_s is None else self.layer_s,
            token_s=_ESTIMATED_TOKEN_S if self.token_s is None else self.token_s,
        )

    def is_measured(self, wanted: Wanted) -> bool:
        """Whether no kernel had to be estimated."""
        return all(_kernel_key(stored, wanted.compute) in self.kernels for stored in wanted.stored)

    def _attention(self, kv: KVType) -> float:
        """What was measured; for another type as many numbers a second; else a share of the memory's limit."""
        assert self.memory is not None, "the memory is measured first"
        if not self.attention:
            return self.memory.median * _DECODE_SHARE
        other = kv if kv in self.attention else next(iter(self.attention))
        return self.attention[other].median * _KV_BYTES[kv] / _KV_BYTES[other]

    def _kernel(self, stored: str, compute: Compute) -> KernelRate:
        found = self.kernels.get(_kernel_key(stored, compute))
        if found is not None:
            return KernelRate(found.decode.median, found.prefill.median)
        assert self.memory is not None and self.fp32 is not None and self.int8 is not None
        rounded = stored in ("int4", "int8") and compute == "fast"
        prefill = self.int8.median * _ROUNDED_SHARE if rounded else self.fp32.median * _FLOAT_SHARE
        return KernelRate(self.memory.median * _DECODE_SHARE, prefill)


def calibrate(wanted: Wanted, *, again: bool = False, progress: Progress | None = None) -> Calibration:
    """Look up what is wanted; measure what is missing, a few seconds in all.

    Args:
        wanted: what a prediction needs.
        again: measure everything that is wanted anew, and compile Jittor if need be.
        progress: told about the measurements.

    Raises:
        StartupError: no compiler, or a limit could not be measured.
        KernelError: a kernel failed.
        DiskError: the calibration cannot be kept, or the disk cannot be measured.
    """
    progress = Quiet() if progress is None else progress
    found = load_calibration()
    with_kernels = again or not startup.compile_needed("cpu")
    missing = _missing(Calibration() if again else found, wanted, with_kernels=with_kernels)
    if not missing:
        return found
    if with_kernels:
        _start_kernels(progress)
    progress.begin(pick("measuring this machine", "测量本机性能"), len(missing), "steps")
    try:
        for what in missing:
            found = _measure(what, found, wanted)
            progress.advance(1)
    finally:
        progress.end()
    found = replace(found, when=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"))
    _save(found)
    return found


def _missing(found: Calibration, wanted: Wanted, *, with_kernels: bool) -> list[str]:
    """What to measure, in this order: "limits", "disk", "fixed", and ways of storing."""
    missing = []
    if found.memory is None or found.fp32 is None or found.int8 is None:
        missing.append("limits")
    if disk_of(wanted.folder) not in found.disks:
        missing.append("disk")
    if with_kernels:
        if found.layer_s is None or found.token_s is None:
            missing.append("fixed")
        kernels = sorted(s for s in wanted.stored if _kernel_key(s, wanted.compute) not in found.kernels)
        missing += kernels or ([] if wanted.kv in found.attention else [min(wanted.stored)])
    return missing


def _start_kernels(progress: Progress) -> None:
    from moss_jt import launch

    launch.warm_up(progress)


def _measure(what: str, found: Calibration, wanted: Wanted) -> Calibration:
    """The calibration with one more thing known."""
    from moss_jt import measuring

    if what == "limits":
        return _measure_limits(found)
    if what == "disk":
        return replace(found, disks={**found.disks, disk_of(wanted.folder): _measure_disk(wanted.folder)})
    if what == "fixed":
        fixed = measuring.measure_fixed(wanted.kv)
        return replace(found, layer_s=fixed.layer_s, token_s=fixed.token_s)
    assert found.layer_s is not None and found.token_s is not None, "the fixed times are measured first"
    fixed = measuring.FixedTimes(found.layer_s, found.token_s)
    rates = measuring.measure_layers(what, wanted.kv, rounding=wanted.compute == "fast", fixed=fixed)
    kernel = KernelFound(rates.decode, rates.prefill)
    return replace(
        found,
        kernels={**found.kernels, _kernel_key(what, wanted.compute): kernel},
        attention={**found.attention, wanted.kv: rates.attention},
    )


def _measure_limits(found: Calibration) -> Calibration:
    with Limits() as limits:
        limits.memory(0.1)  # touches the memory
        readings = [limits.memory(0.1) for _ in range(7)]
        memory = Spread.of(reading.per_second for reading in readings)
        cores = machine.logical_cores()
        idle = Spread.of(min(1.0, reading.cpu_seconds / reading.seconds / cores) for reading in readings)
        fp32, int8 = (Spread.of(ask(0.05).per_second for _ in range(5)) for ask in (limits.fp32, limits.int8))
    return replace(found, memory=memory, fp32=fp32, int8=int8, idle=idle.median)


def _measure_disk(folder: Path) -> DiskRate:
    alone, beside = [], []
    with _file_on(folder) as file, Limits() as limits, Limits() as load:
        limits.disk(file, 0.1)
        for _ in range(5):
            alone.append(limits.disk(file, 0.25))
            beside.append(limits.disk_beside(load, file, 0.25))
    cpu = Spread.of(reading.cpu_seconds / reading.amount for reading in alone)
    rate, busy = (Spread.of(reading.per_second for reading in readings) for readings in (alone, beside))
    return DiskRate(rate, busy, cpu.median)


@contextmanager
def _file_on(folder: Path) -> Iterator[Path]:
    """A file to read: the largest of the model's, or one made for the purpose on the same disk.

    Raises:
        DiskError: there is none and none can be made.
    """
    sizes = {file: file.stat().st_size for file in folder.glob("*") if file.is_file()} if folder.is_dir() else {}
    largest = max(sizes, key=lambda file: sizes[file], default=None)
    if largest is not None and sizes[largest] >= _LEAST_FILE:
        yield largest
        return
    place = _existing(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".moss-jt-disk-") as scratch:
            for _ in range(2 * _LEAST_FILE // MIB):
                scratch.write(os.urandom(MIB))
            scratch.flush()
            os.fsync(scratch.fileno())
            yield Path(scratch.name)
    except OSError as error:
        raise DiskError(
            f"the disk of {place} cannot be measured: {error.strerror}. Make room for {2 * _LEAST_FILE // MIB} MiB there."
        ) from error


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def disk_of(folder: Path) -> str:
    """The key of `Calibration.disks` for the disk of a folder, which need not exist yet."""
    return str(_existing(folder).stat().st_dev)


def _kernel_key(stored: str, compute: Compute) -> str:
    return f"{stored} {compute}" if stored in ("int4", "int8") else stored


def machine_key() -> str:
    """Changes with the processor, its cores, and the code of the kernels."""
    parts = [str(_VERSION), machine.processor(), str(machine.logical_cores())]
    room = resources.files("moss_jt.kernels").joinpath("cpu")
    for header in sorted(room.iterdir(), key=lambda item: item.name):
        if header.name.endswith(".h"):
            parts.append(header.read_text("utf-8"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def load_calibration() -> Calibration:
    """What is kept for this machine; empty where nothing is, or where it cannot be read."""
    kept = _kept().get(machine_key())
    try:
        return Calibration() if kept is None else _from_dict(kept)
    except (KeyError, TypeError, ValueError) as error:
        _log.warning("%s is broken (%r): this machine is measured again.", _file(), error)
        return Calibration()


def _file() -> Path:
    return paths.state_dir() / _FILE


def _kept() -> dict[str, Any]:
    """The calibrations of all machines that share this folder."""
    try:
        kept = json.loads(_file().read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _save(found: Calibration) -> None:
    file = _file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}.tmp")
        kept = {**_kept(), machine_key(): asdict(found)}
        scratch.write_text(json.dumps(dict(list(kept.items())[-_MOST_MACHINES:]), indent=1), "utf-8")
        scratch.replace(file)
    except OSError as error:
        raise DiskError(
            f"{file} cannot be written: {error.strerror}. {paths.HOME_VARIABLE} names another place."
        ) from error


def _from_dict(kept: Mapping[str, Any]) -> Calibration:
    """The opposite of `asdict`."""

    def spread(values: Mapping[str, float] | None) -> Spread | None:
        return None if values is None else Spread(**values)

    return Calibration(
        when=str(kept["when"]),
        memory=spread(kept["memory"]),
        fp32=spread(kept["fp32"]),
        int8=spread(kept["int8"]),
        idle=float(kept["idle"]),
        disks={
            name: DiskRate(Spread(**disk["rate"]), Spread(**disk["beside"]), float(disk["cpu"]))
            for name, disk in kept["disks"].items()
        },
        kernels={
            name: KernelFound(Spread(**kernel["decode"]), Spread(**kernel["prefill"]))
            for name, kernel in kept["kernels"].items()
        },
        attention={name: Spread(**values) for name, values in kept["attention"].items()},
        layer_s=kept["layer_s"],
        token_s=kept["token_s"],
    )
