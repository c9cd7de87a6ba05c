"""Names, listing and removal of what is stored."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moss_jt import paths, stored
from moss_jt.converters.hf2jittor import hf2jittor
from moss_jt.errors import DiskError, HubError


@pytest.fixture
def models(golden: Path) -> Path:
    """One whole int4 model, "tiny", and two partial ones."""
    folder = paths.models_dir()
    hf2jittor(golden / "tiny-int4" / "g32", folder / "tiny")
    (folder / "fnlp--moss.pull" / "source").mkdir(parents=True)
    (folder / "fnlp--moss.pull" / "source" / "config.json").write_bytes((folder / "tiny" / "config.json").read_bytes())
    (folder / ".halfway.partial" / "out").mkdir(parents=True)
    (folder / "tiny.source").mkdir()
    (folder / "tiny.source" / "pytorch_model.bin").write_bytes(b"x" * 100_000)
    return folder


def test_list(models: Path) -> None:
    os.utime(models / "tiny", (1_700_000_000, 1_700_000_000))
    listed = {model.name: model for model in stored.list_models()}
    assert list(listed) == ["fnlp/moss", "halfway", "tiny"]
    tiny = listed["tiny"]
    assert (tiny.state, tiny.bits, tiny.path, tiny.last_used) == ("complete", 4, models / "tiny", 1_700_000_000)
    assert tiny.parts == (models / "tiny", models / "tiny.source")
    written = sum(file.stat().st_size for part in tiny.parts for file in part.iterdir())
    assert abs(tiny.size_bytes - written) < 4096 * 20
    assert {name: model.state for name, model in listed.items()} == {
        "fnlp/moss": "partial", "halfway": "partial", "tiny": "complete",
    }  # fmt: skip
    assert listed["fnlp/moss"].bits == 4
    assert listed["halfway"].bits is None


def test_nothing_stored_yet() -> None:
    assert stored.list_models() == []
    with pytest.raises(HubError, match=r"^tiny is not stored \(stored: nothing\)\. Fetch it with: moss-jt pull tiny$"):
        stored.get_model("tiny")


def test_path_of(models: Path) -> None:
    assert stored.path_of("tiny") == models / "tiny"
    with pytest.raises(HubError, match=r"fnlp/moss is stored only in part"):
        stored.path_of("fnlp/moss")
    with pytest.raises(HubError, match=r"the making of halfway has not finished\. Repeat .*moss-jt models rm halfway$"):
        stored.path_of("halfway")
    with pytest.raises(HubError, match=r"other is not stored \(stored: fnlp/moss, halfway, tiny\)"):
        stored.path_of("other")


@pytest.mark.parametrize("name", ["tiny", "fnlp/moss", "halfway"])
def test_remove_takes_all_parts_and_nothing_else(models: Path, name: str) -> None:
    before = {model.name: model for model in stored.list_models()}
    assert stored.remove_model(name) == before[name].size_bytes
    assert [model.name for model in stored.list_models()] == [other for other in before if other != name]
    left = {path for path in models.iterdir()}
    assert left == {part for model in before.values() if model.name != name for part in model.parts}


def test_models_converted_on_the_fly(models: Path, golden: Path) -> None:
    hf2jittor(golden / "tiny-int8" / "g32", models / "converted" / "my model-0123")
    (models / "converted" / ".other-4567.partial").mkdir()
    names = [model.name for model in stored.list_models()]
    assert names == ["converted/my model-0123", "converted/other-4567", "fnlp/moss", "halfway", "tiny"]
    assert stored.path_of("converted/my model-0123") == models / "converted" / "my model-0123"
    stored.remove_model("converted/my model-0123")
    stored.remove_model("converted/other-4567")
    assert [model.name for model in stored.list_models()] == ["fnlp/moss", "halfway", "tiny"]


def test_remove_goes_on_after_an_interruption(models: Path) -> None:
    (models / "tiny").rename(models / "tiny.removed")
    assert stored.find_model("tiny") is not None
    stored.remove_model("tiny")
    assert stored.find_model("tiny") is None


def test_remove_never_follows_a_link(models: Path, tmp_path: Path) -> None:
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "file").write_text("keep")
    (models / "linked").symlink_to(outside)
    (models / "tiny" / "link").symlink_to(outside)
    stored.remove_model("linked")
    stored.remove_model("tiny")
    assert (outside / "file").read_text() == "keep"
    assert not (models / "linked").is_symlink()


@pytest.mark.parametrize("name", [
    "", ".", "..", "../tiny", "/tmp", "a/../b", "tiny/", "a//b", "a\\b", "a b", "a\0", "tiny.pull", "tiny.source", "x" * 200,
    "~", "-rf", "$HOME", "tiny\n", ".halfway.partial",
    "converted", "converted/", "converted/..", "converted/a/b", "converted/.hidden",
])  # fmt: skip
def test_names_that_are_none(models: Path, name: str) -> None:
    for function in (stored.folder_of, stored.find_model, stored.get_model, stored.path_of, stored.remove_model):
        with pytest.raises(HubError, match=r"is not the name of a model\. A name is OWNER/NAME or NAME"):
            function(name)
    assert len(list(models.iterdir())) == 4


def test_folder_that_cannot_be_read(own_home: Path) -> None:
    (own_home / "models").write_text("in the way")
    with pytest.raises(DiskError, match=r"models cannot be read: Not a directory\. Set MOSS_JT_HOME"):
        stored.list_models()
