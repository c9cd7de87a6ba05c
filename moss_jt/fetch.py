"""Bytes from a hub over HTTP: resumed after any break, checked against the hub's own checksums.

huggingface_hub gives the address, the token and the HTTP session (proxies, certificates). The
loop around them is ours, because its own downloads start again from zero in every new process,
and a model is one file of 10 GB. A file lies under another name until its checksum has agreed.
It knows nothing of models: `hub` says what to fetch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from moss_jt.converters.holes import discard_marked, is_marked
from moss_jt.errors import DiskError, HubError
from moss_jt.language import pick
from moss_jt.progress import Progress, Quiet

ENDPOINT_VARIABLE = "HF_ENDPOINT"
TIMEOUT_VARIABLE = "HF_HUB_DOWNLOAD_TIMEOUT"
DEFAULT_TIMEOUT_S = 20.0
CHUNK_BYTES = 64 << 10  # of the network, where it does not decide itself: what a break may cost
BLOCK_BYTES = 1 << 20  # of the disk
MAX_JSON_BYTES = 64 << 20
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # after each failure in a row that brought no byte
MAX_PAUSE_S = 60.0  # however long a busy hub asks us to wait
BUSY = (408, 429, 500, 502, 503, 504)
NO_REVISION = "Leave out --revision, or check its spelling."

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub describes it.

    Attributes:
        name: without folders.
        size: in bytes.
        kind: "sha256" of the content (large files), or "git": the sha1 of git's blob.
        digest: in hexadecimal.
    """

    name: str
    size: int
    kind: Literal["sha256", "git"]
    digest: str

    def new_hash(self) -> Any:
        """A hash object that yields `digest` once it has seen the whole content."""
        if self.kind == "sha256":
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


class _Answer(NamedTuple):
    """The same face for both HTTP libraries that huggingface_hub has used."""

    status: int
    headers: Mapping[str, str]
    chunks: Iterator[bytes]


class _BrokenOff(Exception):
    """A transfer failed in a way that may pass."""

    def __init__(self, reason: str, *, pause_s: float | None = None) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


def endpoint() -> str:
    """The address of the hub or mirror in use, without a slash at its end.

    Raises:
        HubError: HF_ENDPOINT is not an address, or the hub is switched off by HF_HUB_OFFLINE.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so nothing may be fetched. Unset it first.")
    value = (os.environ.get(ENDPOINT_VARIABLE) or constants.ENDPOINT).rstrip("/")
    try:
        parts = urlsplit(value)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a bracket left open
        sound = False
    if not sound:
        raise HubError(f"{ENDPOINT_VARIABLE} is {value!r}; it must be an address such as https://MIRROR.")
    return value


def hub_name() -> str:
    """The hub as errors call it: the address only where the user has set one."""
    chosen = os.environ.get(ENDPOINT_VARIABLE)
    return f"the hub at {chosen.rstrip('/')} ({ENDPOINT_VARIABLE})" if chosen else "the Hugging Face hub"


def get_json(url: str, *, subject: str, no_revision: str = NO_REVISION) -> Any:
    """Fetch a JSON document.

    Args:
        url: where it is.
        subject: what is asked for, as errors call it.
        no_revision: what to do where the hub does not know the revision.

    Raises:
        HubError: the hub cannot be reached, refuses, or answers with something else.
    """

    def attempt() -> bytes:
        content = bytearray()
        with _open(url, {}) as answer:
            _check_status(answer, subject, no_revision)
            for chunk in answer.chunks:
                content += chunk
                if len(content) > MAX_JSON_BYTES:
                    raise HubError(
                        f"{hub_name()} sends more than {MAX_JSON_BYTES >> 20} MB about {subject}. Is it a hub?"
                    )
        return bytes(content)

    content = _persist(attempt, subject, lambda: 0, tries=3)
    try:
        return json.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise HubError(
            f"{hub_name()} answers about {subject} with something that is not JSON ({error}). Check {ENDPOINT_VARIABLE}."
        ) from error


def is_fetched(file: RemoteFile, folder: Path) -> bool:
    """Whether the whole file is in the folder; it was checked before it got its name, and has no holes since."""
    target = folder / file.name
    return target.is_file() and target.stat().st_size == file.size and not is_marked(target)


def fetched_bytes(file: RemoteFile, folder: Path) -> int:
    """How many bytes of the file are in the folder already."""
    if is_fetched(file, folder):
        return file.size
    part = _part_path(file, folder)
    return min(part.stat().st_size, file.size) if part.is_file() else 0


def fetch_file(file: RemoteFile, url: str, folder: Path, *, progress: Progress | None = None) -> Path:
    """Fetch one file into a folder, going on where an earlier call was broken off.

    Args:
        file: what the hub says it is.
        url: where it is; it may redirect.
        folder: where it goes; must exist.
        progress: gets one task of bytes.

    Returns:
        The path of the whole, checked file.

    Raises:
        HubError: the hub cannot be reached, refuses, or sends something else than it announced.
        DiskError: the file cannot be written.
    """
    progress = progress or Quiet()
    target = folder / file.name
    if is_fetched(file, folder):
        return target
    try:
        discard_marked(target)
    except OSError as error:
        raise _disk_error(error, target, file.size) from error
    part = _part_path(file, folder)
    agrees, is_pieced = _fetch_part(file, url, part, progress)
    if not agrees and is_pieced:  # one of the pieces may be the culprit: once more from the start
        agrees, _ = _fetch_part(file, url, part, progress)
    if not agrees:
        raise HubError(
            f"{file.name} from {hub_name()} has another checksum than the {file.kind} {file.digest} that the hub "
            f"announces; it is deleted. Run the same command again; if it stays so, use another mirror "
            f"({ENDPOINT_VARIABLE})."
        )
    part.replace(target)
    return target


def _part_path(file: RemoteFile, folder: Path) -> Path:
    """Where an unfinished file lies; another version of the file gets another name."""
    return folder / f"{file.name}.{file.digest[:16]}.part"


def _fetch_part(file: RemoteFile, url: str, part: Path, progress: Progress) -> tuple[bool, bool]:
    """Bring `part` to its full size; whether its checksum agrees, and whether it is of several pieces. A wrong one is deleted."""
    try:
        with part.open("ab", buffering=0) as sink:
            transfer = _Transfer(file, url, sink, progress)
            transfer.read_what_is_there(part)
            transfer.run()
            os.fsync(sink.fileno())
    except OSError as error:
        raise _disk_error(error, part, file.size) from error
    agrees = bool(transfer.hash.hexdigest() == file.digest)
    if not agrees:
        part.unlink()
    return agrees, transfer.pieces > 1


class _Transfer:
    """The state of one file's transfer: how far it is, and the hash of that much."""

    def __init__(self, file: RemoteFile, url: str, sink: IO[bytes], progress: Progress) -> None:
        self.file = file
        self.url = url
        self.sink = sink
        self.progress = progress
        self.done = 0
        self.hash = file.new_hash()
        self.pieces = 0  # what was there, and the answers that more came of
        self._refusals = 0  # in a row, to go on where we are

    def read_what_is_there(self, part: Path) -> None:
        """Hash what an earlier run has fetched."""
        there = part.stat().st_size
        if there > self.file.size:
            self._restart()
            return
        self.pieces = min(there, 1)
        name = self.file.name
        self.progress.begin(pick(f"Checking the fetched part of {name}", f"检查 {name} 已下载的部分"), there, "B")
        try:
            with part.open("rb") as source:
                while self.done < there and (block := source.read(min(BLOCK_BYTES, there - self.done))):
                    self.hash.update(block)
                    self.done += len(block)
                    self.progress.advance(len(block))
        finally:
            self.progress.end()

    def run(self) -> None:
        """Fetch the rest, through breaks."""
        if self.done == self.file.size:
            return
        self._begin()
        try:
            _persist(self._stream, self.file.name, lambda: self.done, tries=len(PAUSES_S) + 1)
        finally:
            self.progress.end()

    def _begin(self) -> None:
        """Report a task that counts what is still to come, so that the time left is right."""
        name = self.file.name
        self.progress.begin(pick(f"Fetching {name}", f"下载 {name}"), self.file.size - self.done, "B")

    def _restart(self) -> None:
        """Forget what is there."""
        self.sink.truncate(0)
        self.done = self.pieces = 0
        self.hash = self.file.new_hash()

    def _stream(self) -> None:
        """Take one answer of the hub to its end."""
        headers = {"Range": f"bytes={self.done}-"} if self.done else {}
        with _open(self.url, headers) as answer:
            self._check_place(answer)
            _check_status(answer, self.file.name)
            known = self.done if answer.status == 200 else 0  # a hub without ranges sends all of it again
            self.pieces += 1
            for chunk in answer.chunks:
                if len(chunk) > known:
                    self._take(chunk[known:])
                known = max(known - len(chunk), 0)
        if self.done < self.file.size:
            raise _BrokenOff(f"ended after {self.done} of {self.file.size} bytes")

    def _check_place(self, answer: _Answer) -> None:
        """See that an answer is about this file and this place in it, before anything is written or thrown away."""
        if answer.status == 416 or (self.done and not _continues_at(answer, self.done)):
            self._refusals += 1
            if self._refusals > 1:  # it may be that the hub cannot go on at that place
                self._restart()
                self.progress.end()
                self._begin()
            raise _BrokenOff(f"status {answer.status} to a request for the rest")
        if answer.status in (200, 206) and answer.headers.get("Content-Type", "").startswith("text/html"):
            raise _BrokenOff("it answers with a web page")
        total = _announced_bytes(answer)
        if total not in (None, self.file.size):  # the page of a network that wants a login, say
            raise _BrokenOff(f"it answers with {total} bytes where {self.file.size} were announced")
        self._refusals = 0

    def _take(self, chunk: bytes) -> None:
        """Write a piece down."""
        if self.done + len(chunk) > self.file.size:
            self._restart()
            raise HubError(
                f"{hub_name()} sends more than the {self.file.size} bytes that it announced for {self.file.name}. "
                f"Run the same command again, or use another mirror ({ENDPOINT_VARIABLE})."
            )
        try:
            written = 0
            while written < len(chunk):  # an unbuffered file may take less than it is given
                written += self.sink.write(chunk[written:])
        except OSError as error:
            raise _disk_error(error, Path(self.sink.name), self.file.size) from error
        self.hash.update(chunk)
        self.done += len(chunk)
        self.progress.advance(len(chunk))


def _continues_at(answer: _Answer, start: int) -> bool:
    """Whether the answer holds the bytes from `start` on. So does the whole file; failures are handled as such."""
    if answer.status == 206:
        return answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
    return True


def _announced_bytes(answer: _Answer) -> int | None:
    """How large the whole file is as an answer has it; None where it does not say, or is none that holds it."""
    said = ""
    if answer.status == 206:
        said = answer.headers.get("Content-Range", "").rpartition("/")[2]
    elif answer.status == 200 and answer.headers.get("Content-Encoding", "identity") == "identity":
        said = answer.headers.get("Content-Length", "")
    return int(said) if said.isdecimal() else None


def _disk_error(error: OSError, path: Path, size: int) -> DiskError:
    """An error of the disk in words."""
    if error.errno == errno.ENOSPC:
        return DiskError(
            f"the disk of {path} is full; the file needs {size} bytes. Make room and run the same command again."
        )
    return DiskError(
        f"{path} cannot be written: {error.strerror or error}. Check the folder's permissions and its disk."
    )


def _persist(attempt: Callable[[], T], subject: str, bytes_done: Callable[[], int], *, tries: int) -> T:
    """Repeat `attempt` while it fails in a way that may pass; `tries` counts failures without a new byte."""
    failures = 0
    while True:
        before = bytes_done()
        try:
            return attempt()
        except _BrokenOff as error:
            failures = failures + 1 if bytes_done() <= before else 1
            if failures >= tries:
                raise HubError(
                    f"{subject} cannot be fetched from {hub_name()}: {error}. Check the network and run the same command "
                    f"again (it goes on where it stopped), or name a mirror: {ENDPOINT_VARIABLE}=https://MIRROR."
                ) from error
            pause_s = PAUSES_S[failures - 1] if error.pause_s is None else error.pause_s
            logger.info("%s: %s; trying again in %.0f s", subject, error, pause_s)
            _pause(pause_s)


def _pause(seconds: float) -> None:
    """Wait before the next attempt."""
    time.sleep(seconds)


def _check_status(answer: _Answer, subject: str, no_revision: str = NO_REVISION) -> None:
    """Pass over an answer that holds what was asked for; raise for the others."""
    status, headers = answer.status, answer.headers
    if status in (200, 206):
        return
    if status in BUSY:
        raise _BrokenOff(f"it answers with status {status}", pause_s=_retry_after(headers))
    code = headers.get("X-Error-Code", "")
    if code == "GatedRepo" or status == 403:
        raise HubError(
            f"{subject}: {hub_name()} gives it only to users who have accepted its terms (status {status}). "
            "Accept them on the model's page, then set HF_TOKEN to an access token of yours."
        )
    if code == "RevisionNotFound":
        raise HubError(f"{subject}: {hub_name()} knows no such revision. {no_revision}")
    if code == "EntryNotFound":
        raise HubError(f"{subject}: the file is missing on {hub_name()}. Run the same command again.")
    if status in (401, 404):
        raise HubError(
            f"{subject}: {hub_name()} knows no such model, or shows it only to its owners (status {status}). "
            "Check the spelling; for a private model set HF_TOKEN."
        )
    raise HubError(
        f"{subject}: {hub_name()} answers with status {status}. Check {ENDPOINT_VARIABLE} and try again later."
    )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a busy hub asks for, if it does."""
    value = headers.get("Retry-After", "")
    return min(float(value), MAX_PAUSE_S) if value.isdecimal() else None


def _timeout_s() -> float:
    """How long a connection may be silent."""
    value = os.environ.get(TIMEOUT_VARIABLE, "")
    return float(value) if value.isdecimal() and int(value) else DEFAULT_TIMEOUT_S


@contextmanager
def _open(url: str, headers: dict[str, str]) -> Iterator[_Answer]:
    """Ask for a URL; a failure of the network in here becomes _BrokenOff."""
    from huggingface_hub import constants, get_token
    from huggingface_hub import utils as untyped

    from moss_jt import __version__

    # Before 1.0 the errors of the network are requests' (OSErrors); since then httpx's, whose root is a base here.
    utils: Any = untyped  # its names come and go with the version
    network_errors: tuple[type[Exception], ...] = (OSError, *utils.HfHubHTTPError.__bases__)
    headers = {"User-Agent": f"moss-jt/{__version__}", "Accept-Encoding": "identity", **headers}
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if token:
        headers["Authorization"] = f"Bearer {token}"
    session = utils.get_session()
    try:
        if callable(getattr(session, "stream", None)):  # httpx; in requests it is a flag
            with session.stream("GET", url, headers=headers, timeout=_timeout_s(), follow_redirects=True) as response:
                yield _Answer(response.status_code, response.headers, response.iter_bytes())
        else:
            with session.get(url, headers=headers, timeout=_timeout_s(), stream=True) as response:
                yield _Answer(response.status_code, response.headers, response.iter_content(CHUNK_BYTES))
    except network_errors as error:
        text = " ".join(str(error).split())
        raise _BrokenOff(f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__) from error
