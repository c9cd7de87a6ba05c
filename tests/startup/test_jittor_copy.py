"""The private copy of the installed Jittor."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path

import pytest
from fake_machine import install_wheel

from moss_jt.startup.jittor_copy import copy_name, copy_packages, staged

FILES = {"jittor/__init__.py": "x = 1\n", "jittor/src/a.cc": "int a;\n", "jittor_utils/__init__.py": "y = 2\n"}


def jittor_in(site: Path, files: dict[str, str] | None = None) -> importlib.metadata.Distribution:
    return importlib.metadata.PathDistribution(install_wheel(site, "jittor", "1.3.11.0", files or FILES))


def test_copies_of_two_environments_are_one(tmp_path: Path) -> None:
    one, two = jittor_in(tmp_path / "one"), jittor_in(tmp_path / "two")
    (tmp_path / "two" / "jittor" / "__pycache__").mkdir()
    assert copy_name(one) == copy_name(two)
    assert copy_name(one).startswith("1.3.11.0-")


def test_name_follows_the_content_where_there_is_no_record(tmp_path: Path) -> None:
    names = set()
    for folder, text in (("one", "int a;\n"), ("two", "int b;\n"), ("three", "int a;\n")):
        installed = jittor_in(tmp_path / folder, {**FILES, "jittor/src/a.cc": text})
        (tmp_path / folder / "jittor-1.3.11.0.dist-info" / "RECORD").unlink()
        names.add(copy_name(installed))
    assert len(names) == 2


def test_copy_is_whole_and_leaves_the_installed_files_alone(tmp_path: Path) -> None:
    installed = jittor_in(tmp_path / "site")
    (tmp_path / "site" / "jittor" / "__pycache__").mkdir()
    before = sorted(tmp_path.glob("site/**/*"))
    copy_packages(installed, tmp_path / "src" / "copy")
    copy_packages(installed, tmp_path / "src" / "copy")
    assert (tmp_path / "src" / "copy" / "jittor" / "src" / "a.cc").read_text("ascii") == "int a;\n"
    assert (tmp_path / "src" / "copy" / "jittor_utils" / "__init__.py").is_file()
    assert not list((tmp_path / "src").rglob("__pycache__"))
    assert [entry.name for entry in (tmp_path / "src").iterdir()] == ["copy"]
    assert sorted(tmp_path.glob("site/**/*")) == before


def test_staged_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"), staged(tmp_path / "made") as stage:
        (stage / "half").write_text("", "ascii")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_staged_folder_when_another_was_faster(tmp_path: Path) -> None:
    with staged(tmp_path / "made") as stage:
        (stage / "mine").write_text("", "ascii")
        shutil.copytree(stage, tmp_path / "made")
        (tmp_path / "made" / "theirs").write_text("", "ascii")
    assert {file.name for file in (tmp_path / "made").iterdir()} == {"mine", "theirs"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["made"]


def test_remains_of_a_killed_process_are_swept_later(tmp_path: Path) -> None:
    old, new = tmp_path / ".new-old", tmp_path / ".new-new"
    for left in (old, new):
        (left / "jittor").mkdir(parents=True)
    os.utime(old, (0, 0))
    with staged(tmp_path / "made"):
        pass
    assert {entry.name for entry in tmp_path.iterdir()} == {".new-new", "made"}
