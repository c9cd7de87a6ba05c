"""What it would take to fetch a model: which files, how many bytes, how much disk, under which licence.

The hub is asked for its list of files; needed are the config, the tokenizer and the weights in one
format, never code. What the hub says is hostile until checked: names hold no folders, sizes and
checksums must be there. `hub` carries a plan out; between the two the caller shows it to the user.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moss_jt import paths, stored
from moss_jt.checkpoint import expected_shapes, is_native
from moss_jt.config import FloatType, MossConfig
from moss_jt.converters.holes import can_punch
from moss_jt.converters.journal import PLAN_FILE, partial_folder
from moss_jt.converters.using_up import RETURN_BYTES
from moss_jt.errors import ConfigError, DiskError, HubError
from moss_jt.fetch import NO_REVISION, RemoteFile, endpoint, fetched_bytes, get_json, hub_name
from moss_jt.layout import ITEM_BYTES
from moss_jt.tokenizer import TOKENIZER_FILES

CONFIG_FILE = "config.json"
RECORD_FILE = "pull.json"  # in the folder of an unfinished pull: what it is a pull of
SOURCE_FOLDER = "source"  # in the folder of an unfinished pull: the hub's files
NATIVE_FOLDER = "native"  # in the folder of an unfinished pull: the result
SUFFIXES = (".safetensors", ".bin")  # the better first
WHOLE_FILES = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}
INDEX_FILES = {".safetensors": "model.safetensors.index.json", ".bin": "pytorch_model.bin.index.json"}
MANIFEST_FILE = "manifest.json"
HEADROOM_BYTES = 16 << 20  # headers, journals
MAX_FILE_BYTES = 1 << 50
MAX_SHARDS = 1000
DEFAULT_REVISION = "main"

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,150}")
_SHARD = re.compile(r"(model|pytorch_model)-\d{5}-of-(\d{5})\.(?:safetensors|bin)")
_HEX = {"sha256": re.compile(r"[0-9a-f]{64}"), "git": re.compile(r"[0-9a-f]{40}")}


@dataclass(frozen=True)
class PullPlan:
    """What a pull would do.

    Attributes:
        name: the model's name in `stored`; with @REVISION unless that is "main".
        repo: its name on the hub.
        commit: the exact version on the hub.
        license: what the hub says, None if nothing.
        config: the model's shape.
        small: config, index and tokenizer files.
        weights: the weight files, in one format.
        native: the hub has our own format: nothing to convert.
        dtype: floats of the result; None for the source's.
        delete_source: convert each weight file when it has arrived, as far as it can, and delete it.
        native_bytes: estimated size of the result, 0 if nothing is converted.
        can_arrive: each weight file can be converted by itself, before the others are there. Not those
            of a quantised model: the order of its inputs must be known to lay out the result.
        can_punch: a weight file can be freed in parts while it is being converted.
        free_bytes: room on the disk when the plan was made.
        path: where the model will lie.
        accepted: the terms were accepted when this pull was begun.
        arrived: weight files that were fetched whole by this pull.
    """

    name: str
    repo: str
    commit: str
    license: str | None
    config: MossConfig
    small: tuple[RemoteFile, ...]
    weights: tuple[RemoteFile, ...]
    native: bool
    dtype: FloatType | None
    delete_source: bool
    native_bytes: int
    can_arrive: bool
    can_punch: bool
    free_bytes: int
    path: Path
    accepted: bool
    arrived: frozenset[str]

    @property
    def total_bytes(self) -> int:
        """Size of all files to fetch, those already here included."""
        return sum(file.size for file in (*self.small, *self.weights))

    @property
    def one_by_one(self) -> bool:
        """Whether each weight file is fetched when the conversion comes to it, and deleted after it."""
        return self.delete_source and self.can_arrive and not self.native

    @property
    def download_bytes(self) -> int:
        """Still to fetch."""
        return sum(self._left(self.small)) + sum(self._left(self.weights))

    @property
    def needed_bytes(self) -> int:
        """Room that the pull still takes at its largest."""
        rest = max(self._largest_bytes() - stored.size_on_disk(self.work), 0)
        return rest + sum(self._left(self.small)) + HEADROOM_BYTES

    def _largest_bytes(self) -> int:
        """What the weights, the hub's and the result's, take up at the worst moment."""
        source, largest = sum(file.size for file in self.weights), max(file.size for file in self.weights)
        both = source + self.native_bytes
        if self.native or not self.delete_source:
            return both
        if not self.can_punch:  # a weight file is freed as a whole, after the last of its tensors
            return self.native_bytes + largest if self.one_by_one else both
        tensor = max(prod(shape) for shape in expected_shapes(self.config).values())
        delay = RETURN_BYTES + 2 * tensor * ITEM_BYTES[self.dtype or "float16"]  # freed somewhat later than converted
        if self.one_by_one:
            shrinking = largest - largest * self.native_bytes // source
            return min(self.native_bytes + max(shrinking, 0) + delay, self.native_bytes + largest)
        return min(max(source, self.native_bytes) + delay, both)

    @property
    def work(self) -> Path:
        """The folder of the unfinished pull."""
        return stored.beside(self.path, stored.PULL_SUFFIX)

    def _left(self, files: tuple[RemoteFile, ...]) -> list[int]:
        """Bytes of each file that are still to fetch; what was fetched and is gone has been converted."""
        source = self.work / SOURCE_FOLDER
        return [0 if file.name in self.arrived else file.size - fetched_bytes(file, source) for file in files]


def stored_name(name: str, revision: str | None) -> str:
    """The name under which a pulled model is stored: OWNER/NAME, with @REVISION unless that is "main".

    Raises:
        HubError: the name or the revision cannot be one.
    """
    repo, _, in_name = name.partition("@")
    version = revision or in_name
    full = repo if version in ("", DEFAULT_REVISION) else f"{repo}@{version}"
    stored.folder_of(full)
    return full


def plan_pull(
    name: str, *, revision: str | None = None, dtype: FloatType | None = None, delete_source: bool | None = None
) -> PullPlan:
    """Ask the hub what it would take to get a model.

    Args:
        name: OWNER/NAME, or OWNER/NAME@REVISION.
        revision: branch, tag or commit; None for the hub's main branch.
        dtype: floats of the result; None keeps the source's.
        delete_source: see PullPlan; None goes on as an unfinished pull was begun, and keeps them in a new one.

    Raises:
        HubError: no such model, the hub cannot be reached, it holds no weights that can be used, or something
            else lies in the model's place.
        ConfigError: its config.json is not that of a MOSS model.
    """
    name = stored_name(name, revision)
    repo, _, version = name.partition("@")
    path = stored.folder_of(name)
    _check_place(name, path)
    work = stored.beside(path, stored.PULL_SUFFIX)
    record = read_record(work)
    _check_same_request(name, record, dtype, keeps=delete_source is False and is_converting(work))
    if delete_source is None:
        delete_source = record.get("source") == "delete"
    lost = f"An unfinished pull is of it. Remove that, then pull again: moss-jt models rm {name}"
    info = _information(
        repo, record.get("commit") or version or DEFAULT_REVISION, lost if "commit" in record else NO_REVISION
    )
    commit, files = info["sha"], _root_files(repo, info)
    values = _remote_json(repo, commit, files, CONFIG_FILE)
    native = "moss_jt" in values
    if native and dtype is not None:
        raise HubError(f"{repo} is in the native format already, which --dtype cannot change. Leave --dtype out.")
    config = _read_config(repo, values)
    weights, index = _choose_weights(repo, commit, files)
    names = [CONFIG_FILE, *TOKENIZER_FILES, *([MANIFEST_FILE] if native else [])]
    small = (*(files[name] for name in dict.fromkeys(names) if name in files), *([index] if index else []))
    return PullPlan(
        name=name,
        repo=repo,
        commit=commit,
        license=_license(info),
        config=config,
        small=small,
        weights=weights,
        native=native,
        dtype=dtype,
        delete_source=delete_source,
        native_bytes=0 if native else _native_bytes(config, weights, dtype),
        can_arrive=index is not None and config.quantization is None,
        can_punch=can_punch(_existing(paths.models_dir())),
        free_bytes=shutil.disk_usage(_existing(paths.models_dir())).free,
        path=path,
        accepted=bool(record),
        arrived=frozenset(record.get("arrived", "").split() if is_converting(work) else ()),
    )


def check_room(plan: PullPlan) -> None:
    """Refuse a pull for which the disk is too small.

    Raises:
        DiskError: with what is needed, what is free, and what would need less.
    """
    if plan.needed_bytes <= plan.free_bytes:
        return
    least = replace(plan, delete_source=True).needed_bytes
    hint = f" With --delete-source {gigabytes(least)} are enough." if least < plan.needed_bytes else ""
    raise DiskError(
        f"{plan.name} needs {gigabytes(plan.needed_bytes)} in {paths.models_dir()}; {gigabytes(plan.free_bytes)} are "
        f"free.{hint} Make room, or set {paths.HOME_VARIABLE} to a folder on a larger disk."
    )


def gigabytes(nbytes: int) -> str:
    """A size in words."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def read_record(work: Path) -> dict[str, str]:
    """What an unfinished pull is a pull of; empty if there is none, or none that can be read."""
    try:
        values = json.loads((work / RECORD_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in values.items() if isinstance(v, str)} if isinstance(values, dict) else {}


def file_url(repo: str, commit: str, name: str) -> str:
    """Where the hub has a file."""
    return f"{endpoint()}/{repo}/resolve/{quote(commit, safe='')}/{quote(name)}"


def _check_place(name: str, path: Path) -> None:
    """See that nothing is in the way of a model but a whole one, or an empty folder, which it replaces."""
    folder = path.is_dir() or path.is_symlink()
    try:
        empty = folder and not path.is_symlink() and not any(path.iterdir())
    except OSError:
        empty = False
    if os.path.lexists(path) and not empty and not is_native(path):
        away = f", or remove it with: moss-jt models rm {name}" if folder else "."
        raise HubError(f"{path} is in the way, and is not a whole model. Move it away{away}")


def is_converting(work: Path) -> bool:
    """Whether an unfinished pull has got as far as its conversion, which goes on from what is left of its files."""
    native = work / NATIVE_FOLDER
    return native.exists() or (partial_folder(native) / PLAN_FILE).exists()


def _check_same_request(name: str, record: Mapping[str, str], dtype: FloatType | None, *, keeps: bool) -> None:
    """An unfinished pull goes on with the dtype that it was begun with, and what it may have deleted cannot be kept."""
    begun, asked = record.get("dtype", ""), dtype or ""
    if record and begun != asked:
        raise HubError(
            f"a pull of {name} was begun with {f'floats as {begun}' if begun else 'no --dtype'}, and now "
            f"{f'{asked} is' if asked else 'none is'} asked for. Ask for the same to go on, or start afresh after: "
            f"moss-jt models rm {name}"
        )
    if keeps and record.get("source") == "delete":
        raise HubError(
            f"a pull of {name} was begun with --delete-source, so its original files cannot be kept any more. Go on "
            f"with --delete-source, or start afresh after: moss-jt models rm {name}"
        )


def hub_config(name: str) -> MossConfig:
    """The shape of a model on the hub, from its config.json alone.

    Args:
        name: OWNER/NAME, or OWNER/NAME@REVISION.

    Raises:
        HubError: no such model, or the hub cannot be reached.
        ConfigError: its config.json is not that of a MOSS model.
    """
    name = stored_name(name, None)
    repo, _, version = name.partition("@")
    info = _information(repo, version or DEFAULT_REVISION)
    values = _remote_json(repo, info["sha"], _root_files(repo, info), CONFIG_FILE)
    return replace(_read_config(repo, values), name=name)


def _information(repo: str, version: str, no_revision: str = NO_REVISION) -> dict[str, Any]:
    """The hub's description of a model at a revision; `no_revision` is the advice where there is none."""
    url = f"{endpoint()}/api/models/{repo}/revision/{quote(version, safe='')}?blobs=true"
    subject = repo if version == DEFAULT_REVISION else f"{repo} at revision {version}"
    info = get_json(url, subject=subject, no_revision=no_revision)
    sound = isinstance(info, dict) and isinstance(info.get("siblings"), list)
    if not sound or not _HEX["git"].fullmatch(str(info.get("sha"))):
        raise HubError(f"{hub_name()} does not describe {repo} as a hub does (sha and siblings). Use another mirror.")
    return dict(info)


def _root_files(repo: str, info: Mapping[str, Any]) -> dict[str, RemoteFile]:
    """The files at the top of the model's repository, each with its size and checksum."""
    files: dict[str, RemoteFile] = {}
    for entry in info["siblings"]:
        name = entry.get("rfilename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            continue
        file = _remote_file(name, entry)
        if file is None:
            raise HubError(f"{hub_name()} gives no usable size or checksum for {name} of {repo}. Use another mirror.")
        files[name] = file
    return files


def _remote_file(name: str, entry: Mapping[str, Any]) -> RemoteFile | None:
    """One entry of the list, if it is complete."""
    lfs = entry.get("lfs")
    size = entry.get("size")
    if isinstance(lfs, dict):
        kind, digest, size = "sha256", lfs.get("sha256"), lfs.get("size", size)
    else:
        kind, digest = "git", entry.get("blobId")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_FILE_BYTES:
        return None
    if not isinstance(digest, str) or not _HEX[kind].fullmatch(digest):
        return None
    return RemoteFile(name, size, "sha256" if kind == "sha256" else "git", digest)


def _remote_json(repo: str, commit: str, files: Mapping[str, RemoteFile], name: str) -> dict[str, Any]:
    """A small JSON file of the model."""
    if name not in files:
        raise HubError(f"{repo} has no {name}, so it is not a model that can be run. Check the name.")
    values = get_json(file_url(repo, commit, name), subject=f"{name} of {repo}")
    if not isinstance(values, dict):
        raise HubError(f"{name} of {repo} holds a {type(values).__name__} where an object was expected.")
    return values


def _read_config(repo: str, values: Mapping[str, Any]) -> MossConfig:
    """The model's shape from its config.json."""
    try:
        return MossConfig.from_dict(values)
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"config.json of {repo}: {error}") from error


def _choose_weights(
    repo: str, commit: str, files: Mapping[str, RemoteFile]
) -> tuple[tuple[RemoteFile, ...], RemoteFile | None]:
    """The weight files of the best format there is, and their index if they have one.

    The order is that of `converters.weight_files`, which will look for them in the fetched folder.
    """
    for suffix in SUFFIXES:
        whole, index = WHOLE_FILES[suffix], INDEX_FILES[suffix]
        if whole in files:
            return (files[whole],), None
        names = _indexed(repo, commit, files, index) if index in files else _numbered(files, suffix)
        missing = [name for name in names if name not in files]
        if missing:
            raise HubError(
                f"{repo} lacks the weight files {', '.join(missing)}. It may be half uploaded: try again later."
            )
        if names:
            return tuple(files[name] for name in names), files.get(index)
    found = ", ".join(sorted(files)[:20]) or "nothing"
    raise HubError(f"{repo} has no weights in .safetensors or .bin files (it has {found}). Check the name.")


def _indexed(repo: str, commit: str, files: Mapping[str, RemoteFile], index: str) -> list[str]:
    """The weight files that an index names."""
    weight_map = _remote_json(repo, commit, files, index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    for name in names:
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name) or not name.endswith(SUFFIXES):
            raise HubError(f"{index} of {repo} names the weight file {name!r}, which cannot be one.")
    if not names:
        raise HubError(f"{index} of {repo} has no weight_map. The model cannot be used as it is.")
    return sorted(set(names))


def _numbered(files: Mapping[str, RemoteFile], suffix: str) -> list[str]:
    """The shards of a format where there is no index: all those that their numbers promise."""
    for name in sorted(files):
        match = _SHARD.fullmatch(name)
        if match and name.endswith(suffix):
            count = min(int(match[2]), MAX_SHARDS)
            return [f"{match[1]}-{number:05d}-of-{match[2]}{suffix}" for number in range(1, count + 1)]
    return []


def _license(info: Mapping[str, Any]) -> str | None:
    """The licence that the hub shows."""
    card, tags = info.get("cardData"), info.get("tags")
    found = card.get("license") if isinstance(card, dict) else None
    for tag in tags if isinstance(tags, list) else []:
        if not found and isinstance(tag, str) and tag.startswith("license:"):
            found = tag.removeprefix("license:")
    return found[:80] if isinstance(found, str) and found.isprintable() else None


def _native_bytes(config: MossConfig, weights: tuple[RemoteFile, ...], dtype: FloatType | None) -> int:
    """How large the result will be, as far as one can tell before the files are here."""
    there = sum(file.size for file in weights)
    if config.quantization is not None or dtype is None:
        return there
    return sum(prod(shape) for shape in expected_shapes(config).values()) * ITEM_BYTES[dtype]


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists already."""
    while not folder.is_dir():
        folder = folder.parent
    return folder
