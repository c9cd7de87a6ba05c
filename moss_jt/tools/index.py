"""The local index: a user's own documents, searched with no network at all (SQLite FTS5).

FTS5 cuts text at spaces, and Chinese has none. So what is indexed are terms made here: words of letters and
digits as they are, and every two neighbouring characters of a Chinese, Japanese or Korean run; a query is
cut the same way, and its terms are alternatives ranked by BM25. A query of one such character finds the
pairs that begin with it. FTS5's own stemmer joins "index" and "indexing".

Only changed files are read again. Nothing of a file is kept but its text and its path.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sqlite3
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from moss_jt import paths
from moss_jt.errors import ToolError
from moss_jt.language import pick
from moss_jt.progress import Progress, Quiet
from moss_jt.tools.passages import covers, documents, read_passages
from moss_jt.tools.tool import Hit, Status

FILE = "documents.sqlite"
_VERSION = 1
_WIDE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_RUNS = re.compile(rf"([{_WIDE}]+)|([^\W_]+)")
_WIDE_RUN = re.compile(rf"[{_WIDE}]+")
MAX_TERMS = 64  # of a query
_COMMON = frozenset(
    [
        "the",
        "a",
        "an",
        "of",
        "to",
        "in",
        "is",
        "are",
        "was",
        "were",
        "and",
        "or",
        "for",
        "on",
        "at",
        "by",
        "with",
        "what",
        "which",
        "who",
        "how",
        "do",
        "does",
        "did",
    ]
)
_TABLES = """
CREATE TABLE IF NOT EXISTS files (id INTEGER PRIMARY KEY, path TEXT UNIQUE, folder TEXT, changed INTEGER, size INTEGER);
CREATE TABLE IF NOT EXISTS passages (id INTEGER PRIMARY KEY, file INTEGER, heading TEXT, text TEXT);
CREATE INDEX IF NOT EXISTS passages_of_a_file ON passages (file);
CREATE VIRTUAL TABLE IF NOT EXISTS terms USING fts5 (heading, text, tokenize = 'porter unicode61');
"""
_PART = "folder = ? AND (path = ? OR substr(path, 1, ?) = ?)"


@dataclass(frozen=True)
class Indexed:
    """What a run over a folder did, in files; `passages` counts those of the folder now."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    unreadable: int = 0
    passages: int = 0


@dataclass(frozen=True)
class Folder:
    """A folder in the index."""

    path: str
    files: int
    passages: int


def terms(text: str, *, ends: bool = False) -> list[str]:
    """The terms of a text, in order; with `ends`, the last character of a run too, for a query of it alone."""
    found: list[str] = []
    for run in _RUNS.finditer(unicodedata.normalize("NFKC", text).lower()):
        if run[2]:
            for wide, other in re.findall(rf"([{_WIDE}]+)|([^{_WIDE}]+)", run[2]):
                found += _pairs(wide, ends) if wide else [other]
        else:
            found += _pairs(run[1], ends)
    return found


def _pairs(run: str, ends: bool) -> list[str]:
    """Every two neighbours of a run; the character itself where there is only one."""
    return [run[at : at + 2] for at in range(len(run) - 1)] + ([run[-1]] if ends or len(run) == 1 else [])


class LocalIndex:
    """The index in one file.

    Args:
        path: of the file; by default in moss-jt's own folder.
    """

    name = "local"

    def __init__(self, path: Path | None = None) -> None:
        self.path = path if path is not None else paths.state_dir() / FILE

    def add(self, folder: Path, *, progress: Progress | None = None) -> Indexed:
        """Bring the index up to date with the documents below a folder.

        Each file is there once. What lies below a folder of the index stays a part of that folder; a folder
        around others takes them in, and they are listed no more.

        Raises:
            ToolError: the folder does not exist or its name is no text, or the index cannot be written.
        """
        folder = _place(folder)
        if not _is_text(folder):
            raise ToolError(
                f"the name of {str(folder)!r} is not UTF-8, and links to its files could not be given. Rename it."
            )
        if not folder.exists():
            raise ToolError(f"{folder} does not exist. {self._remedy(folder)}")
        progress = progress or Quiet()
        files = list(documents(folder))
        with self._open(write=True) as database:
            owner = _around(_listed(database), folder) or folder
            _take_in(database, owner)
            known = {
                str(path): (int(changed), int(size))
                for path, changed, size in database.execute(
                    f"SELECT path, changed, size FROM files WHERE {_PART}", _part(owner, folder)
                )
            }
            counts = {"added": 0, "changed": 0, "unchanged": 0, "unreadable": 0}
            progress.begin(pick("Reading documents", "正在读取文档"), len(files), "files read")
            try:
                for path in files:
                    counts[_take(database, owner, path, known.get(str(path)))] += 1
                    progress.advance(1)
            finally:
                progress.end()
            gone = known.keys() - {str(path) for path in files}
            for name in gone:
                _forget(database, name)
            passages = _count(database, owner, folder)
        return Indexed(removed=len(gone), passages=passages, **counts)

    def remove(self, folder: Path) -> int:
        """Take a folder out of the index; gives the number of its files.

        Raises:
            ToolError: it is not in the index, or as a part of another folder.
        """
        place = _place(folder)
        with self._open(write=True) as database:
            listed = _listed(database)
            owner = _around(listed, place)
            if owner and database.execute(f"SELECT 1 FROM files WHERE {_PART}", _part(owner, place)).fetchone():
                raise ToolError(
                    f"{folder} is in the index as a part of {owner}, which can only be taken out whole: "
                    f"moss-jt index --remove {owner}"
                )
            removed = sum(_forget_all(database, one) for one in listed if _place(one) == place)
        if not removed:
            raise ToolError(f"{folder} is not in the index. `moss-jt index --list` shows what is.")
        return removed

    def _remedy(self, folder: Path) -> str:
        """What to do about a folder that does not exist."""
        listed = [Path(one.path) for one in self.folders()]
        if folder in listed:
            return f"To forget it: moss-jt index --remove {folder}"
        owner = _around(listed, folder)
        return f"To forget it: moss-jt index {owner}" if owner else "Name a folder of documents."

    def folders(self) -> list[Folder]:
        """What is in the index."""
        if not self.path.exists():
            return []
        with self._open() as database:
            rows = database.execute(
                "SELECT folder, COUNT(DISTINCT files.id), COUNT(passages.id) FROM files"
                " LEFT JOIN passages ON passages.file = files.id GROUP BY folder ORDER BY folder"
            )
            return [Folder(*row) for row in rows]

    def search(self, query: str, count: int) -> Sequence[Hit]:
        """The best passages, one or two of a file; of files that are gone, none.

        Raises:
            ToolError: nothing has been indexed, or the file is broken.
        """
        if not self.path.exists():
            raise ToolError("no documents have been indexed. Run: moss-jt index FOLDER")
        wanted = _match(query)
        if not wanted:
            return []
        with self._open() as database:
            found = database.execute(
                "SELECT files.path, passages.heading, passages.text FROM terms"
                " JOIN passages ON passages.id = terms.rowid JOIN files ON files.id = passages.file"
                " WHERE terms MATCH ? ORDER BY bm25(terms, 2.0, 1.0)",
                (wanted,),
            )
            is_there = cache(os.path.exists)
            rows = list(itertools.islice((row for row in found if is_there(row[0])), 4 * count))
        return list(_spread(rows, count, query))

    def check(self) -> Status:
        """What is in the index."""
        try:
            folders = self.folders()
        except ToolError as error:
            return Status("fail", str(error))
        if not folders:
            return Status(
                "off", pick("nothing indexed yet: moss-jt index FOLDER", "尚未建立索引：moss-jt index 文件夹")
            )
        files, passages = sum(one.files for one in folders), sum(one.passages for one in folders)
        return Status("ok", pick(f"{files} files, {passages} passages", f"{files} 个文件，{passages} 个段落"))

    @contextlib.contextmanager
    def _open(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """The database; what was written stays if nothing went wrong."""
        try:
            if write:
                self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            database = sqlite3.connect(self.path, timeout=20)
        except (OSError, sqlite3.Error) as error:
            raise ToolError(
                f"the index {self.path} cannot be opened: {error}. Is its folder yours to write?"
            ) from error
        try:
            with contextlib.closing(database), database:
                if write:
                    database.executescript(_TABLES)
                    database.execute(f"PRAGMA user_version = {_VERSION}")
                    self.path.chmod(0o600)
                yield database
        except (sqlite3.Error, OSError) as error:
            raise ToolError(
                f"the index {self.path} is broken: {error}. Remove it, and index your folders again."
            ) from error


def _place(folder: Path) -> Path:
    """A folder's absolute name, without ".."; links stay, but for those that ".." leads back over."""
    return Path(os.path.realpath(folder)) if ".." in folder.parts else folder.absolute()


def _listed(database: sqlite3.Connection) -> list[Path]:
    """The folders of the index."""
    return [Path(name) for (name,) in database.execute("SELECT DISTINCT folder FROM files")]


def _around(listed: Sequence[Path], folder: Path) -> Path | None:
    """The outermost of some folders whose documents are also those of another."""
    return min((one for one in listed if covers(one, folder)), key=lambda one: len(one.parts), default=None)


def _take_in(database: sqlite3.Connection, owner: Path) -> None:
    """Hand to a folder the files of those that it covers; what was once kept under names with ".." is forgotten."""
    for one in _listed(database):
        place = _place(one)
        if place != one and (place == owner or covers(owner, place)):
            _forget_all(database, one)
        elif covers(owner, one):
            database.execute("UPDATE files SET folder = ? WHERE folder = ?", (str(owner), str(one)))


def _part(owner: Path, folder: Path) -> tuple[str, str, int, str]:
    """The values of `_PART`: the files of one folder that lie below another."""
    inside = str(folder).rstrip(os.sep) + os.sep
    return str(owner), str(folder), len(inside), inside


def _take(database: sqlite3.Connection, folder: Path, path: Path, known: tuple[int, int] | None) -> str:
    """Enter a file unless it is there as it is; tells what was done."""
    if not _is_text(path):
        return "unreadable"
    try:
        info = path.stat()
        mark = (info.st_mtime_ns, info.st_size)
        if known == mark:
            return "unchanged"
        found = read_passages(path)
    except OSError:
        return "unreadable"
    _forget(database, str(path))
    file = database.execute(
        "INSERT INTO files (path, folder, changed, size) VALUES (?, ?, ?, ?)", (str(path), str(folder), *mark)
    ).lastrowid
    for passage in found:
        heading = passage.heading or path.stem
        number = database.execute(
            "INSERT INTO passages (file, heading, text) VALUES (?, ?, ?)", (file, heading, passage.text)
        ).lastrowid
        database.execute(
            "INSERT INTO terms (rowid, heading, text) VALUES (?, ?, ?)",
            (number, _indexed(f"{path.stem} {heading}"), _indexed(passage.text)),
        )
    return "added" if known is None else "changed"


def _is_text(path: Path) -> bool:
    """Whether a name can be kept: one that comes from another system's zip may be no UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _indexed(text: str) -> str:
    return " ".join(terms(text, ends=True))


def _forget(database: sqlite3.Connection, path: str) -> None:
    """Take a file out."""
    of_file = "(SELECT passages.id FROM passages JOIN files ON files.id = passages.file WHERE files.path = ?)"
    database.execute(f"DELETE FROM terms WHERE rowid IN {of_file}", (path,))
    database.execute(f"DELETE FROM passages WHERE id IN {of_file}", (path,))
    database.execute("DELETE FROM files WHERE path = ?", (path,))


def _forget_all(database: sqlite3.Connection, folder: Path) -> int:
    """Take the files of a folder out; gives their number."""
    found = database.execute("SELECT path FROM files WHERE folder = ?", (str(folder),)).fetchall()
    for (name,) in found:
        _forget(database, name)
    return len(found)


def _count(database: sqlite3.Connection, owner: Path, folder: Path) -> int:
    """The passages of what lies below a folder."""
    (count,) = database.execute(
        f"SELECT COUNT(*) FROM passages JOIN files ON files.id = passages.file WHERE {_PART}", _part(owner, folder)
    ).fetchone()
    return int(count)


def _match(query: str) -> str:
    """A query in FTS5's language: its terms as alternatives. They hold letters and digits only."""
    every = list(dict.fromkeys(terms(query)))
    telling = [term for term in every if term not in _COMMON] or every
    alone = {term for term in telling if len(term) == 1 and _WIDE_RUN.fullmatch(term)}
    return " OR ".join(f'"{term}"{" *" if term in alone else ""}' for term in telling[:MAX_TERMS])


def _spread(rows: Sequence[tuple[str, str, str]], count: int, query: str) -> Iterator[Hit]:
    """Hits of different files first, so that one long document does not fill them all."""
    taken: dict[str, int] = {}
    later: list[Hit] = []
    given = 0
    for path, heading, text in rows:
        taken[path] = taken.get(path, 0) + 1
        hit = Hit(window(text, query), title=heading, url=Path(path).as_uri())
        if taken[path] > 1:
            later.append(hit)
        elif given < count:
            given += 1
            yield hit
    yield from later[: count - given]


def window(text: str, query: str, longest: int = 400) -> str:
    """The part of a text of at most `longest` characters that holds most of a query's terms, from a line's beginning."""
    if len(text) <= longest:
        return text
    wanted = set(terms(query)) - _COMMON
    starts = [0, *(found.end() for found in re.finditer("[\n。！？.!?]\\s*", text))]
    best = max(starts, key=lambda at: len(wanted & set(terms(text[at : at + longest]))))
    return text[best:]
