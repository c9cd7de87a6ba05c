"""--delete-source on one large file: it shrinks as it is converted, and no hole is ever taken for zeros."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from moss_folders import files_of, names_in

from moss_jt.converters import conversion as module
from moss_jt.converters import using_up
from moss_jt.converters.hf2jittor import hf2jittor
from moss_jt.converters.holes import can_punch, has_hole, is_marked, is_sparse, mark_of, punch
from moss_jt.converters.inspection import inspect
from moss_jt.converters.journal import partial_folder
from moss_jt.converters.native_tensors import NativeMaker
from moss_jt.converters.shelf import Shelf
from moss_jt.converters.source import Source
from moss_jt.converters.synth import preset_config, synthesize_foreign
from moss_jt.errors import CheckpointError

ROOT = Path(__file__).parents[2]
WEIGHTS = "pytorch_model.bin"
KILLER = """
import os, signal, sys
sys.path.insert(0, {root!r})
from moss_jt.converters import output, using_up
from moss_jt.converters.hf2jittor import hf2jittor
using_up.RETURN_BYTES = output.COMMIT_BYTES = 1 << 20
punch, left = using_up.punch, {punches}
def counted(*args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return punch(*args)
using_up.punch = counted
hf2jittor({src!r}, {dst!r}, delete_source=True)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model of 13 MB in one file."""
    if not can_punch(tmp_path):
        pytest.skip("the file system of the temporary folder knows no holes")
    return synthesize_foreign(preset_config("tiny", layers=8), tmp_path / "hf").path


@pytest.fixture
def wanted(source: Path, tmp_path: Path) -> dict[str, bytes]:
    return files_of(hf2jittor(source, tmp_path / "wanted").path)


def on_disk(*folders: Path) -> int:
    """What files take."""
    return sum(file.stat().st_blocks * 512 for folder in folders for file in folder.rglob("*") if file.is_file())


def convert_killed(source: Path, target: Path, punches: int) -> None:
    code = KILLER.format(root=str(ROOT), src=str(source), dst=str(target), punches=punches)
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL


def test_holes_read_as_zeros_and_take_no_room(tmp_path: Path) -> None:
    if not can_punch(tmp_path):
        pytest.skip("the file system of the temporary folder knows no holes")
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100_000)
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    assert not is_sparse(file)
    assert not has_hole(file, 0, 100_000)
    assert punch(file, 5000, 20_000) == 4 * 4096  # whole pages within 5000 to 25000
    assert file.read_bytes() == b"x" * 8192 + bytes(16384) + b"x" * (100_000 - 24576)
    assert is_sparse(file)
    assert has_hole(file, 24575, 1)
    assert not has_hole(file, 24576, 75_424)
    assert punch(file, 10, 100) == 0
    assert not can_punch(tmp_path / "nothing")


def test_one_file_shrinks_while_it_is_converted(
    source: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(using_up, "RETURN_BYTES", 1 << 20)
    size = (source / WEIGHTS).stat().st_size
    make, seen = NativeMaker.make, list[int]()

    def watch(*args: Any) -> Any:
        seen.append(on_disk(source, partial_folder(tmp_path / "native")))
        return make(*args)

    monkeypatch.setattr(NativeMaker, "make", watch)
    done = hf2jittor(source, tmp_path / "native", delete_source=True)
    assert max(seen) < size + (5 << 20)  # two edges, what is given back at a time, and a tensor
    assert done.deleted_bytes == size
    assert WEIGHTS not in names_in(source)
    assert files_of(done.path) == wanted


def test_the_room_asked_for_is_what_it_takes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (source / WEIGHTS).stat().st_size
    asked: list[int] = []
    monkeypatch.setattr(module, "check_room", lambda _place, needed, _hint="": asked.append(needed))
    monkeypatch.setattr(using_up, "RETURN_BYTES", 1 << 20)
    shutil.copytree(source, tmp_path / "again")
    hf2jittor(source, tmp_path / "a", delete_source=True)
    monkeypatch.setattr(using_up, "can_punch", lambda _folder: False)
    hf2jittor(tmp_path / "again", tmp_path / "b", delete_source=True)
    assert asked[0] < 3 << 20
    assert asked[1] >= size - (1 << 20)


@pytest.mark.parametrize("punches", [0, 1, 7, 20])
def test_killed_between_holes_and_resumed(source: Path, wanted: dict[str, bytes], tmp_path: Path, punches: int) -> None:
    target = tmp_path / "native"
    convert_killed(source, target, punches)
    assert is_sparse(source / WEIGHTS) == (punches > 0)
    hf2jittor(source, target, resume=True, delete_source=punches > 1)
    assert files_of(target) == wanted
    assert (source / WEIGHTS).exists() == (punches == 0), "what has holes goes, whatever the second run was asked for"
    assert not is_marked(source / WEIGHTS)


def test_a_hole_is_never_converted(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "native"
    convert_killed(source, target, 7)
    shard = next((partial_folder(target) / "out").glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"damage")
    with pytest.raises(
        CheckpointError, match=r"was given back to the disk by --delete-source, and what was made of it is"
    ):
        hf2jittor(source, target, resume=True)
    assert (partial_folder(target) / "plan.json").exists()


def test_a_file_with_holes_is_of_no_use_to_a_new_run(source: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    """Its zeros were taken for weights once the unfinished run was deleted, as messages advise."""
    target = tmp_path / "native"
    convert_killed(source, target, 7)
    shutil.rmtree(partial_folder(target))
    for convert in (hf2jittor, inspect):
        with pytest.raises(CheckpointError, match=rf"parts of .*{WEIGHTS} were given back .*fetch the file again and"):
            convert(source)
    assert names_in(source.parent) == ["hf", "wanted"]
    assert "native was made of it" in mark_of(source / WEIGHTS).read_text()


def test_a_run_that_began_before_the_holes_does_not_read_them(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", lambda *_args, **_options: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception):
            hf2jittor(source, tmp_path / "first")
    convert_killed(source, tmp_path / "native", 7)
    with pytest.raises(
        CheckpointError, match=rf"given back .* or elsewhere\. .* delete {WEIGHTS}\.given-back beside it"
    ):
        hf2jittor(source, tmp_path / "first", resume=True)
    assert is_marked(source / WEIGHTS)


def test_files_that_are_not_only_ours_get_no_holes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(using_up, "RETURN_BYTES", 1 << 20)
    other = tmp_path / "other name"
    other.hardlink_to(source / WEIGHTS)
    before = other.read_bytes()
    hf2jittor(source, tmp_path / "native", delete_source=True)
    assert WEIGHTS not in names_in(source)
    assert other.read_bytes() == before


def test_tensors_that_share_bytes_get_no_holes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Shelf(source) as shelf:
        assert using_up.may_punch(shelf, source / WEIGHTS, set())
        monkeypatch.setattr(Source, "place", lambda self, name: (1 << 20, 4096))
        assert not using_up.may_punch(shelf, source / WEIGHTS, set())
        monkeypatch.setattr(Source, "place", lambda self, name: None)  # a view of another tensor's bytes
        assert not using_up.may_punch(shelf, source / WEIGHTS, set())


def test_the_note_names_files_with_holes(source: Path, tmp_path: Path) -> None:
    convert_killed(source, tmp_path / "native", 3)
    partial = partial_folder(tmp_path / "native")
    assert (partial / "given-back").read_text() == f"{WEIGHTS}\n"
    assert json.loads((partial / "plan.json").read_text())["kind"] == "hf2jittor"


def test_no_mark_outlives_its_file(tmp_path: Path) -> None:
    for name in ("model.bin.given-back", "model.bin.given-back.new"):
        (tmp_path / name).touch()
    using_up.delete_holed(tmp_path, {"model.bin"}, {})
    assert list(tmp_path.iterdir()) == []
