"""load_model(): the one place that joins checkpoint, weights and network."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import weakref
from collections.abc import Iterator
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Literal, get_args

from moss_jt import launch, paths
from moss_jt.accelerator import check_device_name, open_accelerator
from moss_jt.adapter import Adapter, load_adapter
from moss_jt.budget import Budget
from moss_jt.checkpoint import Checkpoint, is_native
from moss_jt.device import Device
from moss_jt.device_check import check_device
from moss_jt.errors import CheckpointError, ConfigError, DeviceMemoryError, DiskError, KernelError, MossError
from moss_jt.kv_layout import KVType
from moss_jt.memory import (
    automatic_memory,
    format_size,
    memory_for,
    parse_size,
    require_room_to_start,
    resident_memory,
    room_in_process,
)
from moss_jt.placement import Placed, place
from moss_jt.plan import MatrixSize, Plan, make_plan, matrix_sizes, needs_of, smallest_memory
from moss_jt.progress import Progress, Quiet
from moss_jt.runner import DEFAULT_KV, KV_TYPES, Compute, Model
from moss_jt.tokenizer import TOKENIZER_FILES, load_tokenizer
from moss_jt.weights import WeightStore

DeviceName = Literal["auto", "cpu"] | str  # "cuda", "cuda:1"

_UNSTEADY = 4 << 20  # bytes by which the same process is larger or smaller from start to start: mapped files, mostly

_log = logging.getLogger(__name__)


def load_model(
    path: str | os.PathLike[str],
    device: DeviceName | Device = "auto",
    compute: Compute = "exact",
    *,
    memory: int | str | None = None,
    vram: int | str | None = None,
    host_share: float | Literal["auto"] = 0.0,
    kv: str | None = None,
    max_tokens: int | None = None,
    adapter: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Model:
    """Load a model from its folder.

    A Hugging Face folder is converted into the cache first (paths.models_dir()/converted); that is
    logged, takes about the folder's size on disk, and is done once.

    Args:
        path: a native folder, or a Hugging Face folder of a MOSS model.
        device: "cpu", "cuda", "cuda:1", or "auto": a CUDA device where one can be used and has room, else the CPU. It must
            compute a small network correctly first. Or an open device, which stays the caller's.
        compute: "exact" computes in float32; "fast" rounds the inputs of int4 and int8 matrices, to int8 on the CPU, to
            half on a device.
        memory: what the whole process may take, in bytes or like "6GiB"; None for what is free, less a reserve.
            What does not fit is read from disk in every pass. Results do not depend on it.
        vram: what the process may take on the device, in the same way. What does not fit is kept in main memory and
            copied in every pass, as far as that has room for it.
        host_share: this part of the feed-forward weights that would be copied for each token, 0 to 1, is multiplied by the
            host's processor instead, with fast compute. Worth it where main memory is faster than the link. "auto"
            measures both, half a second, and takes the part with which a token is fastest; 0 where none pays.
        kv: type of the cached keys and values, "fp32", "fp16" or "int8"; None for fp32 with exact compute, else fp16.
        max_tokens: positions that a cache holds, prompt and answer together; None for n_positions, or for what
            fits where memory is short.
        adapter: folder of an adapter that `moss-jt finetune` made for this model; it is computed beside the weights.
        progress: told about compiling, converting and loading.

    Raises:
        CheckpointError: no model there, or its files are broken.
        ConfigError: an argument, or a value in config.json, cannot work; or the memory is too little, and then
            the least that would do is named.
        StartupError: Jittor cannot be started here.
        KernelError: the device that was asked for cannot be used.
    """
    check_arguments(device, compute, kv, max_tokens)
    limit = parse_size(memory) if isinstance(memory, str) else memory
    if host_share != "auto" and (isinstance(host_share, str) or not 0 <= host_share <= 1):
        raise ConfigError(f'host_share is {host_share}; it must be from 0 to 1, or "auto".')
    vram_limit = parse_size(vram, "vram") if isinstance(vram, str) else vram
    require_room_to_start()
    progress = Quiet() if progress is None else progress
    checkpoint = Checkpoint.open(native_folder(Path(path), progress))
    kind = KV_TYPES[kv] if kv is not None else DEFAULT_KV[compute]
    tokenizer = None
    with contextlib.suppress(MossError):  # whoever needs it is told then what is wrong with it
        tokenizer = load_tokenizer(checkpoint.path)
    terms = None if adapter is None else load_adapter(adapter, checkpoint.config)
    accelerator = device if not isinstance(device, str) else open_checked(device, vram_limit, progress)
    must = device != "auto" or vram is not None or host_share not in (0, "auto")
    if accelerator is not None:
        try:
            with _given_back(accelerator, ours=isinstance(device, str)):
                placed = _place(
                    checkpoint, accelerator, kind, limit=limit, max_tokens=max_tokens, adapter=terms, progress=progress
                )
                if host_share != 0 and compute == "fast":
                    _share(placed, host_share, progress)
        except (ConfigError, DeviceMemoryError) as error:
            if must:
                raise
            _log.warning("%s The CPU computes.", error)
        else:
            if isinstance(device, str):
                weakref.finalize(placed.space, close_device, accelerator).atexit = False  # the driver does it then
            return Model(
                checkpoint,
                placed.store,
                compute=compute,
                device=accelerator.name,
                max_tokens=placed.plans.device.context,
                kv=kind,
                budget=placed.budget,
                tokenizer=tokenizer,
                placed=placed,
                adapter=terms,
            )
    if vram is not None or host_share not in (0, "auto"):
        raise ConfigError("vram or host_share was given, and no device is used. Leave it out, or see `moss-jt doctor`.")
    launch.warm_up(progress)
    plan, sizes = _plan(checkpoint, kind, limit, max_tokens)
    with memory_for("the weights"):
        store = WeightStore(checkpoint, plan, progress)
    return Model(
        checkpoint,
        store,
        compute=compute,
        device="cpu",
        max_tokens=plan.context,
        kv=kind,
        budget=Budget(plan, sizes, store),
        tokenizer=tokenizer,
        adapter=terms,
    )


@contextlib.contextmanager
def _given_back(device: Device, *, ours: bool) -> Iterator[None]:
    """Close a device that was opened here, where loading onto it fails."""
    try:
        yield
    except BaseException:
        if ours:
            close_device(device)
        raise


def _share(placed: Placed, host_share: float | Literal["auto"], progress: Progress) -> None:
    """Leave a part of what would be copied to the host's processor."""
    launch.warm_up(progress)
    if host_share == "auto":
        _log.info("host_share: %s.", placed.space.choose_share())
    else:
        placed.space.leave_to_host(host_share)


def close_device(device: Device) -> None:
    """Give a device's memory back, as far as it still answers."""
    with contextlib.suppress(KernelError):
        device.close()


def open_checked(device: DeviceName, vram: int | None, progress: Progress) -> Device | None:
    """Open the device to compute on, and see that it computes correctly; None for the CPU.

    Raises:
        ConfigError: there is no such name.
        KernelError: what was asked for by name is not there, or computes wrong.
    """
    found = open_accelerator(device, vram, progress)
    if found is not None:
        try:
            check_device(found)
        except (KernelError, DeviceMemoryError) as error:
            close_device(found)
            if device != "auto":
                raise
            _log.warning("%s The CPU computes.", error)
            return None
    return found


def _place(
    checkpoint: Checkpoint,
    device: Device,
    kind: KVType,
    *,
    limit: int | None,
    max_tokens: int | None,
    adapter: Adapter | None,
    progress: Progress,
) -> Placed:
    """Load onto a device; on the host goes what has no room there."""
    base = resident_memory()
    context = None if max_tokens is None else min(max_tokens, checkpoint.config.n_positions)
    if limit is None:
        limit = base + automatic_memory()
    with memory_for("the weights"):
        return place(
            checkpoint,
            device,
            kind,
            vram=device.own_bytes + device.capacity,
            memory=limit,
            host_base=base,
            context=context,
            terms=None if adapter is None else adapter.scaled(),
            progress=progress,
        )


def _plan(
    checkpoint: Checkpoint, kind: KVType, limit: int | None, max_tokens: int | None
) -> tuple[Plan, list[MatrixSize]]:
    """Divide the memory, now that the process has everything but the weights."""
    config = checkpoint.config
    sizes = matrix_sizes(config, {name: entry.layout for name, entry in checkpoint.entries.items()})
    base, room = resident_memory(), room_in_process()
    needs = needs_of(config, sizes, base=base, kv=kind)
    context = None if max_tokens is None else min(max_tokens, config.n_positions)
    if limit is None:
        free = automatic_memory()
        limit = base + (free if room is None else min(free, max(0, room) // 2))
    try:
        plan = make_plan(sizes, needs, memory=limit, context=context)
    except ConfigError:
        smaller = replace(needs, base=base - _UNSTEADY)  # what an earlier, smaller process named must do
        if limit < smallest_memory(sizes, smaller, context):
            raise
        plan = make_plan(sizes, smaller, memory=limit, context=context)
    _check_room(plan, limit - base, room)
    return plan, sizes


def _check_room(plan: Plan, more: int, room: int | None) -> None:
    """Refuse a plan that the limits of the process forbid. A cache has addresses for all that it may ever hold.

    Raises:
        DeviceMemoryError: they do.
    """
    wanted = more + plan.kv_bytes(plan.context)
    if room is not None and wanted > room:
        raise DeviceMemoryError(
            f"{format_size(plan.memory)} of memory need {format_size(wanted)} of addresses; ulimit -v or ulimit -d leave "
            f"{format_size(max(0, room))}. Raise them, or give less memory."
        )


def native_folder(path: Path, progress: Progress) -> Path:
    """The folder itself where it is native, else its converted copy in the cache, made if need be.

    Raises:
        CheckpointError: there is no model.
    """
    try:
        is_folder, has_config = path.is_dir(), (path / "config.json").is_file()
    except OSError as error:  # no permission, or too long a name
        raise CheckpointError(
            f"{path} cannot be looked at: {error.strerror}. Check the path and its rights."
        ) from error
    if not is_folder:
        raise CheckpointError(f"{path} is not a folder. Give the folder of a model, with its config.json.")
    if is_native(path):
        return path
    if not has_config:
        raise CheckpointError(
            f"{path} has no config.json, so it is not the folder of a model. Give the folder with config.json and weights."
        )
    from moss_jt.converters.hf2jittor import hf2jittor

    target = paths.models_dir() / "converted" / f"{path.resolve().name}-{_fingerprint(path)}"
    if not is_native(target):
        size = sum(file.stat().st_size for file in _weight_files(path))
        _log.warning(
            "%s is in the Hugging Face format: converting it once to %s (about %.1f GB).", path, target, size / 1e9
        )
        with writing_own_folder():
            hf2jittor(path, target, resume=True, progress=progress)
    _renew_tokenizer(path, target)
    return target


@contextlib.contextmanager
def writing_own_folder() -> Iterator[None]:
    """Add to an error of the disk where to, since nobody named this place."""
    try:
        yield
    except DiskError as error:
        raise DiskError(
            f"{error} It is where moss-jt keeps its own files; {paths.HOME_VARIABLE} names another place."
        ) from error


def _renew_tokenizer(path: Path, target: Path) -> None:
    """Take over a tokenizer that was put beside the weights, or changed, after they were converted."""
    from moss_jt.converters.journal import copy_small_files

    new = [name for name in TOKENIZER_FILES if _is_newer(path / name, target / name)]
    if new:
        _log.info("copying %s from %s to %s.", ", ".join(new), path, target)
        copy_small_files(path, new, target)


def _is_newer(file: Path, copy: Path) -> bool:
    return file.is_file() and (not copy.is_file() or file.stat().st_mtime_ns > copy.stat().st_mtime_ns)


def _weight_files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.suffix in (".bin", ".safetensors") and file.is_file())


def _fingerprint(path: Path) -> str:
    """A name for what lies in a folder now: changes when a file does."""
    parts = [str(path.resolve())]
    for file in [*_weight_files(path), path / "config.json"]:
        found = file.stat()
        parts.append(f"{file.name} {found.st_size} {found.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def check_arguments(device: DeviceName | Device, compute: str, kv: str | None, max_tokens: int | None) -> None:
    """Refuse what `load_model` could not do.

    Raises:
        ConfigError: names the argument.
    """
    if isinstance(device, str):
        check_device_name(device)
    if compute not in get_args(Compute):
        raise ConfigError(f'compute is "{compute}"; known are {", ".join(get_args(Compute))}.')
    if kv is not None and kv not in KV_TYPES:
        raise ConfigError(f'kv is "{kv}"; known are {", ".join(KV_TYPES)}.')
    if max_tokens is not None and not (isinstance(max_tokens, Integral) and max_tokens >= 1):
        raise ConfigError(f"max_tokens is {max_tokens!r}; it must be a whole number from 1, or None.")
