"""--delete-source: the source gives its room back while it is being converted.

A file is deleted once no tensor needs it any more. A large file that holds many tensors is given
back in parts before that, as holes, where the file system knows them and the file is wholly ours.
Nothing is given up before what was made of it is safe on disk. Which files have holes is written
down first: in a mark beside the file, so that no run ever takes a hole for zeros, and in `given-back`
beside the journal, so that this run knows its own.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Set
from itertools import pairwise
from pathlib import Path

from moss_jt.converters.holes import can_punch, has_hole, is_marked, is_sparse, mark_of, punch
from moss_jt.converters.journal import Workplace, disk_error, sync_folder, write_safely
from moss_jt.converters.names import source_names
from moss_jt.converters.output import TensorWriter
from moss_jt.converters.plan import Plan
from moss_jt.converters.shelf import Shelf, delete_file, delete_index
from moss_jt.errors import CheckpointError

RETURN_BYTES = 256 << 20  # given back at a time: each time waits for the disk
_NOTE_FILE = "given-back"
_EDGE_BYTES = 1 << 20  # of a file's start and end: what it is known by


def used_up(plan: Plan, waiting: Collection[str]) -> set[str]:
    """The source files that none of the tensors still waiting needs."""
    needs = plan.inputs["needs"]
    every: set[str] = {file for files in needs.values() for file in files} | plan.inputs["files"].keys()
    return every - {file for name in waiting for file in needs[name]}


def read_note(workplace: Workplace) -> set[str]:
    """The source files that this run has made holes in, before it was broken off."""
    file = workplace.path / _NOTE_FILE
    return set(file.read_text("utf-8", errors="surrogateescape").splitlines()) if file.exists() else set()


def check_no_hole(shelf: Shelf, noted: Set[str], names: list[str]) -> None:
    """See that source tensors have not been given back; a file that has lost one arrives again where files arrive.

    Raises:
        CheckpointError: one has been given back; what was made of it is lost.
    """
    for name in names:
        file = shelf.source.tensors[name].file
        holed = file.name in noted or is_marked(file)
        if not holed or not any(has_hole(file, *place) for place in _places(shelf, [name])):
            continue
        if not shelf.arriving:
            raise CheckpointError(
                f"{file}: {name} was given back to the disk by --delete-source, and what was made of it is damaged or "
                f"elsewhere. Fetch the file again, delete {mark_of(file).name} beside it, and start again."
            )
        shelf.fetch_again(file)


def delete_rest(plan: Plan, source: Path, freed: dict[str, int]) -> None:
    """Delete what is left of the source's weights, once the result is visible; adds to `freed`.

    Args:
        source: the folder, which then loses its index too, or the single file.
    """
    folder = source if source.is_dir() else source.parent
    files = used_up(plan, ())
    for file in files - freed.keys():
        freed[file] = delete_file(folder / file)
    if source.is_dir():
        delete_index(source, files)


def delete_holed(source: Path, noted: Collection[str], freed: dict[str, int]) -> None:
    """Delete the files that have holes, of which nobody has any use, where the others are to stay; adds to `freed`."""
    folder = source if source.is_dir() else source.parent
    for name in noted:
        file = folder / name
        if not file.exists():
            delete_file(file)  # its mark, if that is still there
        elif not is_marked(file):
            continue
        elif has_hole(file, 0, file.stat().st_size):
            freed[name] = delete_file(file)
        else:
            mark_of(file).unlink()  # broken off just before its first hole


class UsingUp:
    """The source of one conversion, shrinking.

    Args:
        waiting: tensors that are still to be made.
        freed: bytes of the files that are deleted, by name; added to.
    """

    def __init__(self, workplace: Workplace, shelf: Shelf, waiting: Collection[str], freed: dict[str, int]) -> None:
        assert workplace.plan is not None, "the run has a plan"
        self._freed = freed
        self._plan = workplace.plan
        self._place = workplace.dst
        self._note = workplace.path / _NOTE_FILE
        self._noted = read_note(workplace)
        self._shelf = shelf
        self._waiting = set(waiting)
        self._made: list[str] = []  # source tensors that are used up and still there
        self._made_bytes = 0
        self._may_punch: dict[str, bool] = {}

    def before_start(self, writer: TensorWriter) -> None:
        """Delete what an earlier run has used up."""
        self._delete(writer)

    def after(self, name: str, writer: TensorWriter) -> None:
        """Give back what is used up now that a tensor has been handed to the writer."""
        self._waiting.discard(name)
        sources = _sources(self._shelf, name)
        self._made += sources
        self._made_bytes += sum(self._shelf.source.tensors[source].nbytes for source in sources)
        self._delete(writer)
        if self._made_bytes >= RETURN_BYTES:
            self._punch(writer)

    def _delete(self, writer: TensorWriter) -> None:
        for file in used_up(self._plan, self._waiting) - self._freed.keys():
            writer.flush()
            self._freed[file] = self._shelf.delete(file)

    def _punch(self, writer: TensorWriter) -> None:
        """Make holes where the tensors were that are used up."""
        writer.flush()
        tensors = self._shelf.source.tensors
        for name in self._made:
            file = tensors[name].file if name in tensors else None
            if file is None or file.name in self._freed or not self._is_ours(file):
                continue
            self._write_notes(file)
            for start, nbytes in _places(self._shelf, [name]):
                last = min(start + nbytes, file.stat().st_size - _EDGE_BYTES)
                first = max(start, _EDGE_BYTES)
                if last > first:
                    punch(file, first, last - first)
        self._made, self._made_bytes = [], 0

    def _is_ours(self, file: Path) -> bool:
        """Whether a file may get holes; asked once."""
        if file.name not in self._may_punch:
            self._may_punch[file.name] = may_punch(self._shelf, file, self._noted)
        return self._may_punch[file.name]

    def _write_notes(self, file: Path) -> None:
        """Note what gets holes, for everybody and for us."""
        mark = mark_of(file)
        if file.name in self._noted and is_marked(file):
            return
        self._noted.add(file.name)
        texts = {
            self._note: "".join(f"{one}\n" for one in sorted(self._noted)),
            mark: f"Parts of {file.name} were given back to the disk while {self._place} was made of it.\n",
        }
        for path, text in texts.items():
            try:
                write_safely(path, text.encode(errors="surrogateescape"))
                sync_folder(path.parent)
            except OSError as error:
                raise disk_error(error, path) from error


def may_punch(shelf: Shelf, file: Path, noted: Set[str]) -> bool:
    """Whether holes may be made in a source file.

    Not where another name of the file exists, where somebody else has made holes, or where two
    tensors share bytes.
    """
    if file.is_symlink() or file.stat().st_nlink > 1 or not os.access(file, os.W_OK):
        return False
    if file.name not in noted and is_sparse(file):
        return False
    inside = [name for name, tensor in shelf.source.tensors.items() if tensor.file == file]
    places = sorted(_places(shelf, inside))
    if len(places) < len(inside):
        return False
    apart = all(one[0] + one[1] <= other[0] for one, other in pairwise(places))
    return apart and can_punch(file.parent)


def most_bytes(shelf: Shelf, plan: Plan, order: list[str], done: Collection[str], noted: Set[str]) -> int:
    """What the result and its source take together at most, beyond the source as it is now.

    Args:
        order: of the tensors, as they will be made.
        done: those that are made already.
    """
    places = plan.places()
    files = {file.name: file for file in shelf.source.files}
    in_parts = {name for name, file in files.items() if may_punch(shelf, file, noted)}
    left = {name: file.stat().st_blocks * 512 for name, file in files.items()}
    waiting = set(order) - set(done)
    gone = used_up(plan, waiting)
    written, freed, most, made = sum(places[name][1].nbytes for name in done), 0, 0, 0
    held: dict[str, int] = {}
    for name in (name for name in order if name in waiting):
        written += places[name][1].nbytes
        most = max(most, written - freed)
        waiting.discard(name)
        for source in _sources(shelf, name):
            tensor = shelf.source.tensors[source]
            held[tensor.file.name] = held.get(tensor.file.name, 0) + tensor.nbytes
            made += tensor.nbytes
        for file in used_up(plan, waiting) - gone:
            gone.add(file)
            freed += left.pop(file, 0)
        if made >= RETURN_BYTES:
            for file in in_parts & held.keys() & left.keys():
                freed += min(left[file], held[file])
                left[file] -= min(left[file], held[file])
            held, made = {}, 0
    return max(most, written - freed)


def _sources(shelf: Shelf, name: str) -> list[str]:
    """The source tensors of one of ours, those that are there."""
    names = source_names(name, gptq=False) + source_names(name, gptq=True)
    return [source for source in names if source in shelf.source.tensors]


def _places(shelf: Shelf, names: list[str]) -> list[tuple[int, int]]:
    """Where source tensors lie in their files, (start, bytes); views are left out."""
    return [place for name in names if (place := shelf.source.place(name)) is not None]
