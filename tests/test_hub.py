"""Pulling whole models from a fake hub, broken off in every way, and finding them by name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub
from moss_folders import float_tensors, gptq_tensors, read_folder, write_shards

from moss_jt import fetch, paths, stored
from moss_jt.checkpoint import Checkpoint, is_native
from moss_jt.config import FloatType
from moss_jt.converters import using_up
from moss_jt.converters.hf2jittor import hf2jittor
from moss_jt.converters.holes import can_punch, punch
from moss_jt.converters.jittor2hf import jittor2hf
from moss_jt.converters.synth import preset_config, synthesize_foreign
from moss_jt.errors import CheckpointError, DiskError, HubError
from moss_jt.fetch import fetch_file
from moss_jt.hub import find_pulled, pull, resolve_model
from moss_jt.progress import Progress
from moss_jt.pull_plan import HEADROOM_BYTES, PullPlan, plan_pull

FP = "fnlp/moss-tiny-sft"
INT4 = "fnlp/moss-tiny-sft-int4"
SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, golden: Path) -> Iterator[FakeHub]:
    monkeypatch.setattr(fetch, "_pause", lambda seconds: None)
    tokenizer = golden / "tokenizer" / "c-addedtoken-specials"
    code = {
        "modeling_moss.py": b"raise SystemExit('remote code ran')",
        "README.md": b"# MOSS",
        "training_args.bin": b"pickle",
    }
    with FakeHub() as server:
        server.use(monkeypatch, tmp_path / "hf")
        server.add(FP, golden / "tiny-fp" / "bin-2shards", tokenizer, extra=code)
        server.add(INT4, golden / "tiny-int4" / "g32", tokenizer, extra=code)
        yield server


def fetch_model(name: str, *, delete_source: bool = False, dtype: FloatType | None = None) -> Path:
    return pull(plan_pull(name, delete_source=delete_source, dtype=dtype))


def break_for_good(hub: FakeHub, file: str, *, after: int = 0) -> None:
    """Some bytes, then nothing but broken connections."""
    hub.fail("break", file, after=after)
    hub.fail("break", file, times=50)


def tensors_of(path: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint.open(path)
    return {name: checkpoint.read(name).tobytes() for name in checkpoint.entries}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def files_asked_for(hub: FakeHub) -> set[str]:
    return {request.split()[1].rsplit("/", 1)[-1] for request in hub.requests if "/resolve/" in request}


@pytest.mark.parametrize("delete_source", [False, True])
def test_pulled_model_is_the_converted_one(hub: FakeHub, golden: Path, tmp_path: Path, delete_source: bool) -> None:
    path = fetch_model(FP, delete_source=delete_source)
    assert path == paths.models_dir() / "fnlp--moss-tiny-sft"
    hf2jittor(golden / "tiny-fp" / "bin-2shards", tmp_path / "expected")
    assert tensors_of(path) == tensors_of(tmp_path / "expected")
    assert {"vocab.json", "merges.txt", "added_tokens.json", "config.json", "origin.json"} <= names_in(path)
    left = {"fnlp--moss-tiny-sft"} if delete_source else {"fnlp--moss-tiny-sft", "fnlp--moss-tiny-sft.source"}
    assert names_in(paths.models_dir()) == left


def test_only_what_is_needed_is_fetched(hub: FakeHub) -> None:
    fetch_model(FP)
    asked = files_asked_for(hub)
    assert {*SHARDS, "config.json", "pytorch_model.bin.index.json", "vocab.json", "merges.txt"} <= asked
    assert not asked & {"modeling_moss.py", "README.md", "training_args.bin"}
    assert not list(paths.models_dir().rglob("*.py"))


def test_int4_in_one_file(hub: FakeHub) -> None:
    plan = plan_pull(INT4, delete_source=True)
    assert [file.name for file in plan.weights] == ["pytorch_model.bin"]
    assert not plan.one_by_one
    path = pull(plan)
    assert Checkpoint.open(path).config.quantization is not None
    assert json.loads((path / "config.json").read_text())["moss_jt"]["name"] == INT4


def test_dtype(hub: FakeHub) -> None:
    assert Checkpoint.open(fetch_model(FP, dtype="float32")).config.dtype == "float32"


def weights_in(folder: Path) -> set[str]:
    return {name for name in names_in(folder) if name.endswith((".bin", ".safetensors"))}


def test_each_shard_is_gone_before_the_next_comes(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disk at its largest: the result and one shard."""
    hub.add("owner/five", write_shards(tmp_path / "five", float_tensors(), 5))
    there: list[set[str]] = []

    def watch(file: fetch.RemoteFile, url: str, folder: Path, *, progress: Progress) -> Path:
        there.append(weights_in(folder))
        return fetch_file(file, url, folder, progress=progress)

    monkeypatch.setattr("moss_jt.hub.fetch_file", watch)
    plan = plan_pull("owner/five", delete_source=True)
    assert plan.one_by_one
    path = pull(plan)
    assert there == [set()] * (len(plan.small) + 5)
    hf2jittor(tmp_path / "five", tmp_path / "expected")
    assert tensors_of(path) == tensors_of(tmp_path / "expected")


@pytest.mark.parametrize("fallen", [2, 3, 5])
def test_one_by_one_goes_on_at_the_shard_that_broke(hub: FakeHub, tmp_path: Path, fallen: int) -> None:
    hub.add("owner/five", write_shards(tmp_path / "five", float_tensors(), 5))
    shards = [f"model-{number:05d}-of-00005.safetensors" for number in range(1, 6)]
    break_for_good(hub, shards[fallen - 1], after=3000)
    with pytest.raises(HubError, match=shards[fallen - 1]):
        fetch_model("owner/five", delete_source=True)
    hub.faults.clear()
    sent = dict(hub.sent)
    plan = plan_pull("owner/five", delete_source=True)
    assert 0 < plan.download_bytes <= sum(file.size for file in plan.weights[fallen - 1 :])
    path = pull(plan)
    assert {name: hub.sent[name] for name in shards[: fallen - 1]} == {
        name: sent[name] for name in shards[: fallen - 1]
    }
    hf2jittor(tmp_path / "five", tmp_path / "expected")
    assert tensors_of(path) == tensors_of(tmp_path / "expected")


def test_quantised_shards_must_all_be_there(hub: FakeHub, tmp_path: Path) -> None:
    """Only their numbers tell the layout of the result."""
    source = write_shards(tmp_path / "four", gptq_tensors(4, act_order=True), 4, wbits=4, groupsize=32)
    hub.add("owner/four", source)
    plan = plan_pull("owner/four", delete_source=True)
    assert not plan.one_by_one
    assert plan.needed_bytes == plan.download_bytes + plan.native_bytes + HEADROOM_BYTES
    path = pull(plan)
    hf2jittor(source, tmp_path / "expected")
    assert tensors_of(path) == tensors_of(tmp_path / "expected")


def test_native_model_is_taken_as_it_is(hub: FakeHub, golden: Path, tmp_path: Path) -> None:
    hf2jittor(golden / "tiny-int4" / "g32", tmp_path / "native")
    hub.add("owner/native", tmp_path / "native")
    path = fetch_model("owner/native")
    assert tensors_of(path) == tensors_of(tmp_path / "native")
    assert names_in(paths.models_dir()) == {"owner--native"}
    with pytest.raises(HubError, match="native format already, which --dtype cannot change"):
        plan_pull("owner/native@main", dtype="float32")


@pytest.mark.parametrize("delete_source", [False, True])
@pytest.mark.parametrize("file", [*SHARDS, "vocab.json", "config.json"])
def test_broken_off_and_run_again(hub: FakeHub, golden: Path, tmp_path: Path, file: str, delete_source: bool) -> None:
    break_for_good(hub, file, after=100)
    with pytest.raises(HubError, match=rf"{file}.* cannot be fetched from .*run the same command again"):
        fetch_model(FP, delete_source=delete_source)
    hub.faults.clear()
    for model in stored.list_models():
        assert (model.name, model.state) == (FP, "partial")
    path = fetch_model(FP, delete_source=delete_source)
    hf2jittor(golden / "tiny-fp" / "bin-2shards", tmp_path / "expected")
    assert tensors_of(path) == tensors_of(tmp_path / "expected")


def test_checksum_that_stays_wrong(hub: FakeHub) -> None:
    hub.fail("corrupt", SHARDS[1], times=9)
    with pytest.raises(HubError, match=f"{SHARDS[1]} from .* has another checksum"):
        fetch_model(FP)
    assert find_pulled(FP) is None


def test_model_that_is_not_what_it_says(hub: FakeHub) -> None:
    hub.repos[FP].files["config.json"] = hub.repos[FP].files["config.json"].replace(b'"n_layer": 3', b'"n_layer": 4')
    with pytest.raises(CheckpointError, match=r"does not fit its config.json: .*transformer.h.3.* is missing"):
        fetch_model(FP)
    assert stored.list_models()[0].state == "partial"


def run_pull(hub: FakeHub, *, delete_source: bool) -> subprocess.Popen[bytes]:
    script = (
        "from moss_jt.hub import pull; from moss_jt.pull_plan import plan_pull\n"
        f"pull(plan_pull({FP!r}, delete_source={delete_source}))"
    )
    return subprocess.Popen([sys.executable, "-c", script], env=dict(os.environ), stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("delete_source", [False, True])
def test_killed_while_fetching_the_second_shard(
    hub: FakeHub, golden: Path, tmp_path: Path, delete_source: bool
) -> None:
    hub.fail("stall", SHARDS[1], after=20_000)
    child = run_pull(hub, delete_source=delete_source)
    try:
        deadline = time.monotonic() + 30
        while hub.sent[SHARDS[1]] < 20_000:
            assert time.monotonic() < deadline, "the child never came to the second shard"
            assert child.poll() is None, "the child has ended by itself"
            time.sleep(0.02)
        with pytest.raises(HubError, match=f"{FP} is being pulled by another process"):
            fetch_model(FP, delete_source=delete_source)
        with pytest.raises(HubError, match=f"{FP} is being pulled by another process"):
            stored.remove_model(FP)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    hub.released.set()
    sent = dict(hub.sent)
    plan = plan_pull(FP, delete_source=delete_source)
    assert plan.accepted, "what was accepted once is not asked again"
    path = pull(plan)
    assert hub.sent[SHARDS[0]] == sent[SHARDS[0]], "the first shard was fetched again"
    hf2jittor(golden / "tiny-fp" / "bin-2shards", tmp_path / "expected")
    assert tensors_of(path) == tensors_of(tmp_path / "expected")


def test_unfinished_pull_stays_with_its_version_and_options(hub: FakeHub, golden: Path) -> None:
    break_for_good(hub, SHARDS[1])
    with pytest.raises(HubError):
        fetch_model(FP)
    begun = hub.repos[FP]
    with pytest.raises(
        HubError,
        match=rf"a pull of {FP} was begun with no --dtype, and now float32 is asked for.*moss-jt models rm {FP}",
    ):
        plan_pull(FP, dtype="float32")
    assert plan_pull(FP).commit == begun.commit
    assert f"GET /api/models/{FP}/revision/{begun.commit}" in hub.requests


def break_off_in_holes(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, shards: bool = False
) -> dict[str, bytes]:
    """Pull a model with --delete-source, break off when parts of a file are given back; what it shall be."""
    if not can_punch(tmp_path):
        pytest.skip("the file system of the temporary folder knows no holes")
    source = synthesize_foreign(preset_config("tiny", layers=8), tmp_path / "hf").path
    wanted = tensors_of(hf2jittor(source, tmp_path / "wanted").path)
    if shards:
        back = read_folder(jittor2hf(tmp_path / "wanted", tmp_path / "back").path)
        shutil.move(source / "pytorch_model.bin", tmp_path)
        write_shards(tmp_path / "shards", back, 2)
        for file in (tmp_path / "shards").iterdir():
            if file.name != "config.json":
                shutil.move(file, source)
    hub.add("owner/holed", source)
    with monkeypatch.context() as patch:
        patch.setattr(using_up, "RETURN_BYTES", 1 << 20)
        punches = iter(range(30 if shards else 10))

        def counted(*place: object) -> int:
            if next(punches, None) is None:
                raise KeyboardInterrupt
            return punch(*place)  # type: ignore[arg-type]

        patch.setattr(using_up, "punch", counted)
        with pytest.raises(KeyboardInterrupt):
            fetch_model("owner/holed", delete_source=True)
    return wanted


def damage_what_was_made() -> None:
    """Of the model of `break_off_in_holes`, as a loss of power may."""
    made = next((plan_pull("owner/holed").work / ".native.partial" / "out").glob("*.safetensors"))
    with made.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"damage")


def test_holes_are_not_kept(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = break_off_in_holes(hub, tmp_path, monkeypatch)
    with pytest.raises(HubError, match=r"begun with --delete-source, so its original files cannot be kept.*models rm"):
        fetch_model("owner/holed", delete_source=False)
    assert tensors_of(pull(plan_pull("owner/holed"))) == wanted
    assert names_in(paths.models_dir()) == {"owner--holed"}


@pytest.mark.parametrize("shards", [False, True])
def test_holes_are_fetched_again_where_the_result_is_lost(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: bool
) -> None:
    wanted = break_off_in_holes(hub, tmp_path, monkeypatch, shards=shards)
    shutil.rmtree(plan_pull("owner/holed").work / ".native.partial")
    assert plan_pull("owner/holed").download_bytes > 5_000_000
    assert tensors_of(pull(plan_pull("owner/holed"))) == wanted


def test_holes_are_fetched_again_where_the_result_is_damaged(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = break_off_in_holes(hub, tmp_path, monkeypatch)
    damage_what_was_made()
    assert tensors_of(pull(plan_pull("owner/holed"))) == wanted
    assert names_in(paths.models_dir()) == {"owner--holed"}


def test_a_single_file_that_was_given_up_for_another_comes_again(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = break_off_in_holes(hub, tmp_path, monkeypatch)
    damage_what_was_made()
    break_for_good(hub, "pytorch_model.bin", after=1000)
    with pytest.raises(HubError):
        pull(plan_pull("owner/holed"))
    hub.faults.clear()
    plan = plan_pull("owner/holed")
    assert plan.download_bytes > 5_000_000, "it is counted"
    assert tensors_of(pull(plan)) == wanted


def test_what_was_only_fetched_so_far_may_be_kept(hub: FakeHub) -> None:
    break_for_good(hub, SHARDS[0])
    with pytest.raises(HubError):
        fetch_model(FP, delete_source=True)
    hub.faults.clear()
    plan = plan_pull(FP, delete_source=False)
    assert not plan.delete_source


def test_version_that_the_hub_has_lost(hub: FakeHub) -> None:
    break_for_good(hub, SHARDS[1])
    with pytest.raises(HubError):
        fetch_model(FP)
    hub.repos[FP].commit = "a" * 40
    with pytest.raises(
        HubError, match=rf"no such revision\. An unfinished pull is of it\. .*pull again: moss-jt models rm {FP}$"
    ):
        plan_pull(FP)
    stored.remove_model(FP)
    assert plan_pull(FP).commit == "a" * 40


def test_disk_that_fills_up_in_the_conversion(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("moss_jt.converters.output.os.pwrite", refuse)
        with pytest.raises(
            DiskError, match=r"is full\. Make room and run the same command again; it goes on from here"
        ):
            fetch_model(FP)
    assert find_pulled(FP) is None
    assert fetch_model(FP)


def test_kill_between_rename_and_tidying(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("moss_jt.hub._tidy", lambda work, path: None)
        path = fetch_model(FP)
    assert "fnlp--moss-tiny-sft.pull" in names_in(paths.models_dir())
    assert find_pulled(FP) == path
    assert names_in(paths.models_dir()) == {"fnlp--moss-tiny-sft", "fnlp--moss-tiny-sft.source"}


def test_revision_has_a_name_of_its_own(hub: FakeHub) -> None:
    commit = hub.repos[FP].commit
    path = pull(plan_pull(FP, revision=commit))
    assert path.name == f"fnlp--moss-tiny-sft@{commit}"
    assert find_pulled(FP) is None
    assert find_pulled(FP, commit) == find_pulled(f"{FP}@{commit}") == path
    assert [m.name for m in stored.list_models()] == [f"{FP}@{commit}"]


def test_resolve(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(tmp_path) == tmp_path
    with pytest.raises(
        HubError,
        match=rf"^there is neither a folder {FP} nor a .* \(stored: nothing\)\. .* fetch it with: moss-jt pull {FP}$",
    ):
        resolve_model(FP)
    path = fetch_model(FP)
    os.utime(path, (1, 1))
    assert resolve_model(FP) == path
    assert path.stat().st_mtime > 1_000_000, "its last use is noted"
    (tmp_path / "file.bin").write_bytes(b"")
    with pytest.raises(HubError, match=r"file\.bin is a file; what is wanted is the folder"):
        resolve_model(tmp_path / "file.bin")
    with pytest.raises(HubError, match=r"xxx cannot be looked at: File name too long\. Check the path"):
        resolve_model("x" * 300)  # was a bare OSError
    with pytest.raises(HubError, match=r"there is no folder \./absent/model/here"):
        resolve_model("./absent/model/here")


def test_resolve_of_a_partial_model(hub: FakeHub) -> None:
    break_for_good(hub, SHARDS[0])
    with pytest.raises(HubError):
        fetch_model(FP)
    with pytest.raises(
        HubError, match=rf"^{FP} is stored only in part\. Go on where it stopped with: moss-jt pull {FP}$"
    ):
        resolve_model(FP)


def test_home_that_cannot_be_written(hub: FakeHub, own_home: Path) -> None:
    plan: PullPlan = plan_pull(FP)
    (own_home / "models").write_text("a file in the way")
    with pytest.raises(Exception, match=r"models.* cannot be written: Not a directory.*MOSS_JT_HOME"):
        pull(plan)
    assert not is_native(plan.path)
