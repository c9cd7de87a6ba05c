"""What a hub says, honest or not, and what is made of it."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub

from moss_jt import fetch, paths
from moss_jt.config import MossConfig
from moss_jt.errors import ConfigError, DiskError, HubError
from moss_jt.fetch import RemoteFile
from moss_jt.pull_plan import HEADROOM_BYTES, PullPlan, check_room, gigabytes, plan_pull, stored_name
from moss_jt.stored import remove_model

FP = "fnlp/moss-tiny-sft"
CONFIG = b'{"model_type": "moss", "vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}'
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, golden: Path) -> Iterator[FakeHub]:
    monkeypatch.setattr(fetch, "_pause", lambda seconds: None)
    with FakeHub() as server:
        server.use(monkeypatch, tmp_path / "hf")
        server.add(FP, golden / "tiny-fp" / "bin-2shards", golden / "tokenizer" / "a-plain-added")
        yield server


def plan_of(hub: FakeHub, files: dict[str, bytes], **options: Any) -> PullPlan:
    hub.add("owner/model", extra={"config.json": CONFIG, **files})
    return plan_pull("owner/model", **options)


def index_of(*names: object) -> bytes:
    return json.dumps({"weight_map": {f"tensor.{i}": name for i, name in enumerate(names)}}).encode()


def test_plan_names_version_licence_files_and_sizes(hub: FakeHub) -> None:
    plan = plan_pull(FP)
    repo = hub.repos[FP]
    assert (plan.name, plan.repo, plan.commit, plan.license) == (FP, FP, repo.commit, "agpl-3.0")
    assert [file.name for file in plan.weights] == [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    assert (
        plan.total_bytes
        == plan.download_bytes
        == sum(len(repo.files[file.name]) for file in (*plan.small, *plan.weights))
    )
    assert plan.native_bytes == sum(file.size for file in plan.weights)
    assert not plan.accepted
    assert not paths.models_dir().exists(), "planning writes nothing"


MOSS = MossConfig.from_dict({"vocab_size": 107008, "n_embd": 6144, "n_layer": 34, "n_head": 24})
GB = 10**9


def plan_for(plan: PullPlan, sizes: tuple[int, ...], native: int, **changes: Any) -> PullPlan:
    """The plan with the sizes of a real model."""
    weights = tuple(RemoteFile(f"w{i}.bin", size, "sha256", "0" * 64) for i, size in enumerate(sizes))
    changes = {"config": MOSS, "small": (), "weights": weights, "native_bytes": native, "can_punch": True, **changes}
    return replace(plan, **changes)


@pytest.mark.parametrize(
    ("sizes", "changes", "low", "high"),
    [
        ((9 * GB,) * 4, {}, 72.0, 72.1),  # the originals are kept
        ((9 * GB,) * 4, {"delete_source": True}, 36.0, 39.0),  # one by one, each shrinking
        ((9 * GB,) * 4, {"delete_source": True, "can_punch": False}, 45.0, 45.1),  # one by one, each as a whole
        ((36 * GB,), {"can_arrive": False}, 72.0, 72.1),
        ((36 * GB,), {"delete_source": True, "can_arrive": False}, 36.0, 39.0),  # one file, shrinking
        ((36 * GB,), {"delete_source": True, "can_arrive": False, "can_punch": False}, 72.0, 72.1),
    ],
)
def test_room(hub: FakeHub, sizes: tuple[int, ...], changes: dict[str, Any], low: float, high: float) -> None:
    plan = plan_for(plan_pull(FP), sizes, sum(sizes), **changes)
    assert low <= plan.needed_bytes / GB <= high


def test_room_of_a_model_that_grows_or_shrinks(hub: FakeHub) -> None:
    plan = plan_pull(FP, delete_source=True)
    grows = plan_for(plan, (9 * GB,) * 4, 72 * GB, dtype="float32")
    shrinks = plan_for(plan, (9 * GB,) * 4, 18 * GB)
    assert 72 <= grows.needed_bytes / GB <= 78.5
    assert 18 + 4.5 <= shrinks.needed_bytes / GB <= 27.1


def test_room_counts_what_is_there(hub: FakeHub) -> None:
    plan = plan_pull(FP)
    assert plan.needed_bytes == plan.download_bytes + plan.native_bytes + HEADROOM_BYTES
    (plan.work / "source").mkdir(parents=True)
    first = plan.weights[0]
    (plan.work / "source" / first.name).write_bytes(b"x" * first.size)
    assert plan.download_bytes == plan.total_bytes - first.size
    assert 0 <= plan.total_bytes + plan.native_bytes + HEADROOM_BYTES - plan.needed_bytes - first.size < 65536


def test_too_small_a_disk_is_refused_with_a_way_out(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(plan_pull(FP), can_punch=False)
    delete = replace(plan, delete_source=True)
    check_room(replace(plan, free_bytes=plan.needed_bytes))
    with pytest.raises(
        DiskError,
        match=rf"{FP} needs {gigabytes(plan.needed_bytes)} in .*models; .* are free\. With "
        rf"--delete-source {gigabytes(delete.needed_bytes)} are enough\. Make room, or set MOSS_JT_HOME",
    ):
        check_room(replace(plan, free_bytes=plan.needed_bytes - 1))
    with pytest.raises(DiskError, match=r"are free\. Make room"):
        check_room(replace(delete, free_bytes=1000))


def test_free_room_is_that_of_the_disk(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moss_jt.pull_plan.shutil.disk_usage", lambda path: Usage(10**12, 0, 123_456_789))
    assert plan_pull(FP).free_bytes == 123_456_789


def test_another_dtype_changes_the_size(hub: FakeHub) -> None:
    half, full = plan_pull(FP, dtype="float16"), plan_pull(FP, dtype="float32")
    assert full.native_bytes == 2 * half.native_bytes


def test_safetensors_are_preferred_and_only_one_format_is_taken(hub: FakeHub) -> None:
    both = {"pytorch_model.bin": b"12", "model.safetensors": b"345", "flax_model.msgpack": b"6", "x.onnx": b"7"}
    assert [file.name for file in plan_of(hub, both).weights] == ["model.safetensors"]
    assert [file.name for file in plan_of(hub, {"pytorch_model.bin": b"12"}).weights] == ["pytorch_model.bin"]


def test_shards_without_an_index(hub: FakeHub) -> None:
    shards = {f"pytorch_model-0000{i}-of-00003.bin": b"1" for i in (1, 2, 3)}
    plan = plan_of(hub, shards, delete_source=True)
    assert [file.name for file in plan.weights] == sorted(shards)
    assert not plan.one_by_one, "without an index nobody knows what the next shard holds"
    del shards["pytorch_model-00002-of-00003.bin"]
    with pytest.raises(HubError, match=r"owner/model lacks the weight files pytorch_model-00002-of-00003\.bin"):
        plan_of(hub, shards)


def test_hidden_files_code_and_folders_are_passed_over(hub: FakeHub) -> None:
    odd = {
        "../up.json": b"1",
        "sub/config.json": b"2",
        "a\nb.json": b"3",
        ".hidden": b"4",
        "tokenization_moss.py": b"5",
    }
    plan = plan_of(hub, {"model.safetensors": b"1", "vocab.json": b"{}", **odd})
    assert {file.name for file in plan.small} == {"config.json", "vocab.json"}


@pytest.mark.parametrize("file", ["../../x.bin", "/etc/passwd", "a/b.bin", "", 7, "modeling.py", ".bin"])
def test_index_that_points_elsewhere(hub: FakeHub, file: object) -> None:
    with pytest.raises(
        HubError, match=r"pytorch_model\.bin\.index\.json of owner/model names the weight file .*cannot be one"
    ):
        plan_of(hub, {"pytorch_model.bin.index.json": index_of("a.bin", file), "a.bin": b"1"})


def test_index_that_is_not_one(hub: FakeHub) -> None:
    with pytest.raises(HubError, match="has no weight_map"):
        plan_of(hub, {"pytorch_model.bin.index.json": b"{}"})
    with pytest.raises(HubError, match="holds a list where an object was expected"):
        plan_of(hub, {"pytorch_model.bin.index.json": b"[]"})
    with pytest.raises(HubError, match=r"lacks the weight files b\.bin"):
        plan_of(hub, {"pytorch_model.bin.index.json": index_of("a.bin", "b.bin"), "a.bin": b"1"})


@pytest.mark.parametrize("claim", [
    {"size": None}, {"size": -1}, {"size": 1 << 60}, {"size": "12"}, {"size": True}, {"blobId": None}, {"blobId": "xyz"},
    {"lfs": {"sha256": "zz", "size": 3}}, {"lfs": {"size": 3}},
])  # fmt: skip
def test_sizes_and_checksums_must_be_sound(hub: FakeHub, claim: dict[str, Any]) -> None:
    hub.repos[FP].claims["vocab.json"] = claim
    with pytest.raises(HubError, match=r"gives no usable size or checksum for vocab\.json of fnlp/moss-tiny-sft"):
        plan_pull(FP)


def test_huge_size_is_refused_for_lack_of_room(hub: FakeHub) -> None:
    weights = hub.repos[FP].files["pytorch_model-00001-of-00002.bin"]
    hub.repos[FP].claims["pytorch_model-00001-of-00002.bin"] = {"lfs": {"sha256": "0" * 64, "size": 1 << 49}}
    assert len(weights) < 1 << 20
    with pytest.raises(DiskError, match=rf"{FP} needs 11\d{{5}}\.\d GB"):
        check_room(plan_pull(FP))


def test_no_weights_or_no_config(hub: FakeHub) -> None:
    with pytest.raises(
        HubError,
        match=r"owner/model has no weights in \.safetensors or \.bin files \(it has README\.md, config\.json\)",
    ):
        plan_of(hub, {"README.md": b"x"})
    hub.add("owner/data", extra={"README.md": b"x"})
    with pytest.raises(HubError, match=r"owner/data has no config\.json"):
        plan_pull("owner/data")


def test_config_of_another_kind(hub: FakeHub) -> None:
    with pytest.raises(ConfigError, match=r"config\.json of owner/model: model_type is 'llama'"):
        plan_of(hub, {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"1"})


def test_unknown_model_revision_and_gate(hub: FakeHub) -> None:
    with pytest.raises(HubError, match=r"^owner/none: the hub at .* knows no such model, or shows it only .*HF_TOKEN"):
        plan_pull("owner/none")
    with pytest.raises(HubError, match=rf"^{FP} at revision v9: .* knows no such revision\. Leave out --revision"):
        plan_pull(FP, revision="v9")
    hub.repos[FP].gated = True
    with pytest.raises(HubError, match=r"only to users who have accepted its terms .* set HF_TOKEN"):
        plan_pull(FP)


def test_busy_hub_is_asked_again(hub: FakeHub) -> None:
    hub.fail("status", "info", status=429, headers={"Retry-After": "1"})
    hub.fail("status", "info", status=503)
    assert plan_pull(FP).repo == FP
    hub.fail("status", "info", status=503, times=9)
    with pytest.raises(HubError, match=rf"^{FP} cannot be fetched from the hub at .*: it answers with status 503"):
        plan_pull(FP)


def test_mirror_that_is_no_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fail("status", "info", status=418)
    with pytest.raises(HubError, match=r"answers with status 418\. Check HF_ENDPOINT"):
        plan_pull(FP)
    monkeypatch.setattr("fake_hub._information", lambda name, repo: {"sha": "short", "siblings": []})
    with pytest.raises(HubError, match="does not describe fnlp/moss-tiny-sft as a hub does"):
        plan_pull(FP)


def test_what_lies_in_the_models_place_is_told_before_anything_is_fetched(hub: FakeHub) -> None:
    path = paths.models_dir() / "fnlp--moss-tiny-sft"
    path.mkdir(parents=True)
    assert plan_pull(FP).path == path  # an empty folder gives way
    (path / "config.json").write_text("{}")
    with pytest.raises(
        HubError, match=rf"{path} is in the way, and is not a .* remove it with: moss-jt models rm {FP}$"
    ):
        plan_pull(FP)
    remove_model(FP)
    path.write_text("a file")
    with pytest.raises(HubError, match=rf"{path} is in the way, and is not a whole model\. Move it away\.$"):
        plan_pull(FP)


def test_stored_names() -> None:
    assert stored_name("fnlp/x", None) == stored_name("fnlp/x", "main") == stored_name("fnlp/x@main", None) == "fnlp/x"
    assert stored_name("fnlp/x@v1", None) == stored_name("fnlp/x", "v1") == "fnlp/x@v1"
    for name, revision in (
        ("fnlp/x", "../y"),
        ("../x", None),
        ("a/b/c", None),
        ("fnlp/x", "-v"),
        ("", None),
        ("a/b\n", None),
    ):
        with pytest.raises(HubError, match="is not the name of a model"):
            stored_name(name, revision)
