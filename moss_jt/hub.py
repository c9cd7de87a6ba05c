"""Models by name: finding the folder of a stored one, and fetching one from a hub.

`resolve_model` is what `--model` goes through. `pull` carries out what `pull_plan.plan_pull` has
planned: fetch the files, convert them, put the native folder in its place. It works in NAME.pull
beside that place and can be killed at any moment and run again: files are resumed by `fetch`, the
conversion by its own journal, and a model has its name only when it is whole.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from moss_jt import paths, stored
from moss_jt.checkpoint import Checkpoint
from moss_jt.converters.hf2jittor import hf2jittor
from moss_jt.converters.holes import discard_marked
from moss_jt.errors import DiskError, HubError
from moss_jt.fetch import RemoteFile, fetch_file
from moss_jt.progress import Progress, Quiet
from moss_jt.pull_plan import (
    NATIVE_FOLDER,
    RECORD_FILE,
    SOURCE_FOLDER,
    PullPlan,
    file_url,
    is_converting,
    read_record,
    stored_name,
)


def resolve_model(name_or_path: str | os.PathLike[str], *, progress: Progress | None = None) -> Path:
    """Find the folder of a model: a folder as it is, a stored model by its name, or the one that comes with us.

    Args:
        name_or_path: a path, a name as `moss-jt models list` shows it, or "moss-tiny".
        progress: not used as long as nothing is fetched here.

    Raises:
        HubError: there is neither; the message says how to get it.
    """
    text = os.fspath(name_or_path)
    folder = paths.expand(text)
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except OSError as error:  # no permission, or too long a name
        raise HubError(f"{text} cannot be looked at: {error.strerror}. Check the path and its permissions.") from error
    if is_folder:
        return folder
    if text == paths.EMBEDDED_MODEL and not exists:
        return paths.embedded_model()
    if exists:
        raise HubError(f"{text} is a file; what is wanted is the folder that holds config.json and the weights.")
    if not stored.is_model_name(text):
        raise HubError(f"there is no folder {text}. Check the path; `moss-jt models list` tells what is stored.")
    if stored.find_model(text) is None:
        raise HubError(
            f"there is neither a folder {text} nor a stored model of that name (stored: {stored.names()}). "
            f"Check the path, or fetch it with: moss-jt pull {text}"
        )
    found = stored.path_of(text)
    stored.mark_used(found)
    return found


def find_pulled(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model that has been pulled whole; finishes the tidying of an interrupted pull.

    Raises:
        HubError: the name or the revision cannot be one.
    """
    full = stored_name(name, revision)
    model = stored.find_model(full)
    if model is None or model.state != "complete":
        return None
    work = stored.beside(model.path, stored.PULL_SUFFIX)
    if work.is_dir():
        with stored.lock(work, full):
            _tidy(work, model.path)
    return model.path


def pull(plan: PullPlan, *, progress: Progress | None = None) -> Path:
    """Fetch and convert a model as planned.

    The caller has shown the plan, and the user has accepted the licence.

    Returns:
        The native folder, `plan.path`.

    Raises:
        HubError: the network or the hub fails, or another process is pulling the same model.
        CheckpointError: the files are not those of a MOSS model.
        DiskError: the disk is full or fails.
    """
    progress = progress or Quiet()
    source = plan.work / SOURCE_FOLDER
    try:
        source.mkdir(parents=True, exist_ok=True)
        with stored.lock(plan.work, plan.name):
            _write_record(plan, plan.arrived)
            for file in plan.small:
                _fetch(plan, file, progress)
            made = _fetch_native(plan, progress) if plan.native else _convert(plan, progress)
            _write_origin(plan, made)
            made.rename(plan.path)
            _tidy(plan.work, plan.path)
    except OSError as error:
        raise _disk_error(error, plan) from error
    return plan.path


def _write_record(plan: PullPlan, arrived: Iterable[str]) -> None:
    """Note what this pull is and how far it is, so that the next call goes on with it."""
    record = {
        "name": plan.name,
        "commit": plan.commit,
        "dtype": plan.dtype or "",
        "source": "delete" if plan.delete_source else "keep",
        "arrived": " ".join(sorted(arrived)),
    }
    _write_json(plan.work / RECORD_FILE, record)


def _write_json(path: Path, values: dict[str, str]) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", "utf-8")
    temporary.replace(path)


def _fetch(plan: PullPlan, file: RemoteFile, progress: Progress) -> Path:
    """Fetch one of the plan's files."""
    return fetch_file(file, file_url(plan.repo, plan.commit, file.name), plan.work / SOURCE_FOLDER, progress=progress)


def _fetch_native(plan: PullPlan, progress: Progress) -> Path:
    """Fetch a model that is in our format already."""
    for file in plan.weights:
        _fetch(plan, file, progress)
    return Checkpoint.open(plan.work / SOURCE_FOLDER).path


def _convert(plan: PullPlan, progress: Progress) -> Path:
    """Fetch the weights and convert them; file by file where that saves room."""
    source, native = plan.work / SOURCE_FOLDER, plan.work / NATIVE_FOLDER
    files = {file.name: file for file in plan.weights}

    arrived = set(plan.arrived)

    def arrive(path: Path) -> None:
        if path.name in arrived:  # it is of no use any more, and comes anew
            arrived.discard(path.name)
            _write_record(plan, arrived)
        _fetch(plan, files[path.name], progress)
        arrived.add(path.name)
        _write_record(plan, arrived)

    if not is_converting(plan.work):
        for file in plan.weights:
            discard_marked(source / file.name)  # used up for a result that somebody has deleted
        for file in plan.weights[:1] if plan.one_by_one else plan.weights:
            arrive(source / file.name)
    try:
        return hf2jittor(
            source,
            native,
            dtype=plan.dtype,
            resume=True,
            delete_source=plan.delete_source,
            name=plan.name,
            arrive=arrive,
            way_out="" if plan.delete_source else ", or add --delete-source",
            progress=progress,
        ).path
    except DiskError as error:
        if isinstance(error.__cause__, OSError) and "--resume" in str(error):  # which pull does not have
            raise error.__cause__ from None
        raise


def _write_origin(plan: PullPlan, folder: Path) -> None:
    """Note in the model's folder where it came from."""
    origin = {"name": plan.name, "repo": plan.repo, "commit": plan.commit, "license": plan.license or ""}
    _write_json(folder / stored.ORIGIN_FILE, origin)


def _tidy(work: Path, path: Path) -> None:
    """Clear away the folder of a finished pull; keep the hub's files where asked."""
    keep = read_record(work).get("source") == "keep"
    source, kept = work / SOURCE_FOLDER, stored.beside(path, stored.SOURCE_SUFFIX)
    if keep and source.is_dir() and not kept.exists():
        source.rename(kept)
    shutil.rmtree(work)


def _disk_error(error: OSError, plan: PullPlan) -> DiskError:
    """An error of the disk in words."""
    where = error.filename or plan.work
    if error.errno == errno.ENOSPC:
        return DiskError(
            f"the disk of {where} is full. Make room and run the same command again; it goes on from here."
        )
    return DiskError(
        f"{where} cannot be written: {error.strerror or error}. Check its permissions, or set {paths.HOME_VARIABLE} "
        "to a folder of yours."
    )
