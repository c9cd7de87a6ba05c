"""All samples of one part of the data, as flat arrays, kept in a file between runs.

The file's name is a hash of the data's bytes, the tokenizer's files and the settings: change one, and the data is
encoded anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moss_jt.errors import ConfigError
from moss_jt.finetune.disk import reading, writing
from moss_jt.finetune.encoding import NOT_LEARNED, Encoder, Sample
from moss_jt.finetune.records import Split, read_records, require_files
from moss_jt.finetune.settings import DataSettings
from moss_jt.language import pick
from moss_jt.progress import Progress, Quiet
from moss_jt.tokenizer import TOKENIZER_FILES, load_tokenizer

Ids = npt.NDArray[np.int32]

_FORM = 1  # of the kept file
_PIECE = 1 << 22
_HEADERS = 1 << 12  # bytes of the kept file beside its numbers, at most


@dataclass(frozen=True)
class Samples:
    """Samples one after the other.

    Attributes:
        ids: of all, flat, int32.
        labels: the same, -100 where a token is not learned.
        ends: where each sample ends in them, int64.
        dropped: records that gave no sample: not even one turn fits, or nothing in it is learned.
    """

    ids: Ids
    labels: Ids
    ends: npt.NDArray[np.int64]
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.ends)

    def sample(self, number: int) -> tuple[Ids, Ids]:
        """Ids and labels of a sample."""
        start = int(self.ends[number - 1]) if number else 0
        return self.ids[start : self.ends[number]], self.labels[start : self.ends[number]]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sample."""
        return np.diff(self.ends, prepend=0)


def join(samples: Iterable[Sample | None]) -> Samples:
    """Put samples together; None, and a sample that teaches nothing, counts as dropped."""
    ids: list[Ids] = []
    labels: list[Ids] = []
    dropped = 0
    for sample in samples:
        if sample is None or (sample.labels[1:] == NOT_LEARNED).all():
            dropped += 1
            continue
        ids.append(sample.ids)
        labels.append(sample.labels)
    ends = np.cumsum([len(part) for part in ids], dtype=np.int64)
    return Samples(_flat(ids), _flat(labels), ends, dropped)


def _flat(parts: list[Ids]) -> Ids:
    """Parts one after the other; the list is emptied, for they may be most of the memory."""
    whole: Ids = np.concatenate([np.zeros(0, np.int32), *parts])
    parts.clear()
    return whole


def load_samples(
    data_dir: Path,
    split: Split,
    tokenizer_dir: Path,
    settings: DataSettings,
    *,
    cache_dir: Path,
    progress: Progress | None = None,
) -> Samples:
    """Encode a part of the data, or read what an earlier run encoded.

    Args:
        data_dir: see `moss_jt.finetune.records`.
        split: which part.
        tokenizer_dir: folder of the model, or of the tokenizer alone.
        settings: how records become samples.
        cache_dir: where encoded data is kept.
        progress: told the files read.

    Raises:
        ConfigError: there is no data, or a record is not as it should be.
        CheckpointError: the tokenizer is broken.
        DiskError: a file cannot be read, or the encoded data not be written.
    """
    files = require_files(data_dir, split)
    kept = cache_dir / f"{split}-{_key(files, tokenizer_dir, settings)}.npz"
    found = _read(kept)
    if found is None:
        found = _encode(files, tokenizer_dir, settings, progress or Quiet())
        _write(kept, found)
    if not len(found):
        raise ConfigError(f"{files[0]}{_others(files)}: {_nothing(found.dropped, settings)}")
    return found


def _others(files: list[Path]) -> str:
    return f" and {len(files) - 1} more" if len(files) > 1 else ""


def _nothing(dropped: int, settings: DataSettings) -> str:
    """Why records gave no sample, and what to do."""
    if not dropped:
        return "no records in there. Put in conversations or texts, or remove it where it is data for validation."
    return (
        f"none of the {dropped} records gives a sample: not even a first turn fits into {settings.max_length} tokens "
        "(--max_length), or there is nothing in them that is learned, such as an answer."
    )


def _encode(files: list[Path], tokenizer_dir: Path, settings: DataSettings, progress: Progress) -> Samples:
    strips = settings.original and not _is_sentencepiece(tokenizer_dir)  # which has no such habit
    encoder = Encoder(load_tokenizer(tokenizer_dir, strip_around_added=strips), settings)

    def samples() -> Iterator[Sample | None]:
        for file in files:
            for place, record in read_records(file):
                made = list(encoder.samples(record, place))
                yield from made
                if not made:
                    yield None
            progress.advance(file.stat().st_size)

    progress.begin(pick("Encoding the data", "编码数据"), sum(file.stat().st_size for file in files), "B")
    try:
        return join(samples())
    finally:
        progress.end()


def _is_sentencepiece(folder: Path) -> bool:
    return (folder / "tokenizer.model").is_file() and not (folder / "vocab.json").is_file()


def _key(files: list[Path], tokenizer_dir: Path, settings: DataSettings) -> str:
    told = json.dumps([_FORM, asdict(settings)], sort_keys=True)
    sha = hashlib.sha256(told.encode())
    names = [tokenizer_dir / name for name in TOKENIZER_FILES]
    for file in [*files, *(file for file in names if file.is_file())]:
        sha.update(f"\0{file.name}\0".encode())
        with reading(file), file.open("rb") as stream:
            while piece := stream.read(_PIECE):
                sha.update(piece)
    return sha.hexdigest()[:16]


def _read(file: Path) -> Samples | None:
    """What a file holds; None where there is none, or a run was killed while it wrote it."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as kept:
            return Samples(kept["ids"], kept["labels"], kept["ends"], int(kept["dropped"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _write(file: Path, samples: Samples) -> None:
    scratch = file.with_suffix(f".{os.getpid()}.npz")
    with writing(file):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with scratch.open("wb") as opened:
                # room first: a zip file that cannot be finished complains once more when it is forgotten
                room = samples.ids.nbytes + samples.labels.nbytes + samples.ends.nbytes + _HEADERS
                os.posix_fallocate(opened.fileno(), 0, room)
                np.savez(opened, ids=samples.ids, labels=samples.labels, ends=samples.ends, dropped=samples.dropped)
                opened.truncate()
            scratch.replace(file)
        finally:
            scratch.unlink(missing_ok=True)
