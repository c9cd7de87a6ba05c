"""Fetching one file through everything that a network does."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub

from moss_jt import fetch
from moss_jt.converters.holes import mark_of
from moss_jt.errors import DiskError, HubError
from moss_jt.fetch import RemoteFile, fetch_file, fetched_bytes, get_json, is_fetched

CONTENT = bytes(range(256)) * 20_000  # 5 MB
NAME = "pytorch_model.bin"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as server:
        server.use(monkeypatch, tmp_path / "hf")
        server.add("owner/model", extra={NAME: CONTENT, "vocab.json": b"{}" * 700, "empty.txt": b""})
        yield server


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, noted instead of waited for."""
    noted: list[float] = []
    monkeypatch.setattr(fetch, "_pause", noted.append)
    return noted


def large(content: bytes = CONTENT) -> RemoteFile:
    return RemoteFile(NAME, len(content), "sha256", hashlib.sha256(content).hexdigest())


def url(hub: FakeHub, name: str = NAME) -> str:
    return f"{hub.url}/owner/model/resolve/main/{name}"


class Counting:
    """A progress that adds up."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, float]] = []
        self.done: list[float] = []

    def begin(self, task: str, total: float, unit: str) -> None:
        assert unit == "B"
        self.tasks.append((task, total))
        self.done.append(0)

    def advance(self, amount: float) -> None:
        self.done[-1] += amount

    def end(self) -> None:
        pass


def test_whole_file_with_progress(hub: FakeHub, tmp_path: Path) -> None:
    progress = Counting()
    path = fetch_file(large(), url(hub), tmp_path, progress=progress)
    assert path.read_bytes() == CONTENT
    assert progress.tasks[-1] == (f"Fetching {NAME}", len(CONTENT))
    assert progress.done[-1] == len(CONTENT)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [NAME]


def test_small_file_has_gits_checksum(hub: FakeHub, tmp_path: Path) -> None:
    content = b"{}" * 700
    digest = hashlib.sha1(b"blob 1400\0" + content).hexdigest()
    assert (
        fetch_file(RemoteFile("vocab.json", 1400, "git", digest), url(hub, "vocab.json"), tmp_path).read_bytes()
        == content
    )


def test_empty_file_asks_nobody(hub: FakeHub, tmp_path: Path) -> None:
    digest = hashlib.sha256(b"").hexdigest()
    assert fetch_file(RemoteFile("empty.txt", 0, "sha256", digest), url(hub, "empty.txt"), tmp_path).read_bytes() == b""
    assert hub.requests == []


def test_broken_connections_are_resumed_where_they_broke(hub: FakeHub, tmp_path: Path) -> None:
    hub.fail("break", NAME, after=1_200_000, times=3)
    assert fetch_file(large(), url(hub), tmp_path).read_bytes() == CONTENT
    assert hub.sent[NAME] <= len(CONTENT) + 3 * fetch.CHUNK_BYTES  # a piece under way may be lost each time
    ranges = [r.split()[-1] for r in hub.requests if "/cdn/" in r]
    assert len(ranges) == 4
    assert all(r.startswith("bytes=") for r in ranges[1:])


def test_busy_hub_is_asked_again_after_the_time_it_names(hub: FakeHub, tmp_path: Path, pauses: list[float]) -> None:
    hub.fail("status", NAME, status=429, headers={"Retry-After": "7"})
    hub.fail("status", NAME, status=503, headers={"Retry-After": "100000"})
    hub.fail("status", NAME, status=500)
    assert fetch_file(large(), url(hub), tmp_path).read_bytes() == CONTENT
    assert pauses == [7.0, fetch.MAX_PAUSE_S, fetch.PAUSES_S[2]]


def test_stalled_connection_is_given_up_and_resumed(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fetch.TIMEOUT_VARIABLE, "1")
    hub.fail("stall", NAME, after=2_500_000)
    began = time.monotonic()
    assert fetch_file(large(), url(hub), tmp_path).read_bytes() == CONTENT
    assert 1 <= time.monotonic() - began < 8
    assert len([r for r in hub.requests if "/cdn/" in r]) == 2


def test_end_that_comes_too_early_is_resumed(hub: FakeHub, tmp_path: Path) -> None:
    hub.fail("short", NAME, after=3_000_000)
    assert fetch_file(large(), url(hub), tmp_path).read_bytes() == CONTENT
    assert hub.sent[NAME] == len(CONTENT)


def test_hub_without_ranges_starts_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.fail("break", NAME, after=2_500_000)
    hub.fail("no-range", NAME)
    progress = Counting()
    assert fetch_file(large(), url(hub), tmp_path, progress=progress).read_bytes() == CONTENT
    assert (progress.tasks[-1][1], progress.done[-1]) == (len(CONTENT), len(CONTENT))


@pytest.mark.parametrize("before", [0, 2_500_000])
def test_page_of_a_portal_takes_nothing_away(hub: FakeHub, tmp_path: Path, before: int) -> None:
    """It answers with status 200 to everything; as content it cost all that was fetched."""
    hub.fail("break", NAME, after=before)
    hub.fail("portal", NAME, times=3)
    assert fetch_file(large(), url(hub), tmp_path).read_bytes() == CONTENT
    assert hub.sent[NAME] <= len(CONTENT) + fetch.CHUNK_BYTES


def test_portal_that_stays(hub: FakeHub, tmp_path: Path) -> None:
    part = tmp_path / f"{NAME}.{large().digest[:16]}.part"
    part.write_bytes(CONTENT[:1_000_000])
    hub.fail("portal", NAME, times=9)
    with pytest.raises(HubError, match=rf"it answers with 1400 bytes where {len(CONTENT)} were announced\. Check the"):
        fetch_file(large(), url(hub), tmp_path)
    assert part.read_bytes() == CONTENT[:1_000_000]


def test_web_page_is_known_by_its_type(hub: FakeHub, tmp_path: Path) -> None:
    hub.fail("portal", NAME, times=9, headers={"Content-Type": "text/html; charset=utf-8"})
    with pytest.raises(HubError, match="it answers with a web page"):
        fetch_file(large(), url(hub), tmp_path)


@pytest.mark.parametrize("ranges", [True, False])
def test_page_of_untold_length_costs_one_more_try(hub: FakeHub, tmp_path: Path, ranges: bool) -> None:
    hub.fail("page", NAME)
    if not ranges:
        hub.fail("no-range", NAME, times=9)
    assert fetch_file(large(), url(hub), tmp_path).read_bytes() == CONTENT


def test_other_file_under_the_same_name(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["owner/model"].files[NAME] = CONTENT[:-7]
    (tmp_path / f"{NAME}.{large().digest[:16]}.part").write_bytes(CONTENT[:1000])
    with pytest.raises(HubError, match=rf"it answers with {len(CONTENT) - 7} bytes where {len(CONTENT)} were"):
        fetch_file(large(), url(hub), tmp_path)
    assert fetched_bytes(large(), tmp_path) == 1000


@pytest.mark.parametrize("refusals", [1, 2])
def test_refused_range_starts_again_only_if_it_stays_refused(hub: FakeHub, tmp_path: Path, refusals: int) -> None:
    hub.fail("break", NAME, after=2_500_000)
    hub.fail("status", NAME, status=416, times=refusals)
    assert fetch_file(large(), url(hub), tmp_path).read_bytes() == CONTENT
    assert (hub.sent[NAME] > len(CONTENT) + 2_000_000) == (refusals == 2)


def test_file_with_holes_is_not_whole(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(bytes(len(CONTENT)))
    mark_of(tmp_path / NAME).write_text("")
    assert not is_fetched(large(), tmp_path)
    assert fetched_bytes(large(), tmp_path) == 0
    assert fetch_file(large(), url(hub), tmp_path).read_bytes() == CONTENT
    assert is_fetched(large(), tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [NAME]


def test_never_ending_breaks_end_with_the_next_step(hub: FakeHub, tmp_path: Path, pauses: list[float]) -> None:
    hub.fail("break", NAME, after=0, times=100)
    with pytest.raises(
        HubError,
        match=rf"^{NAME} cannot be fetched from the hub at {hub.url} \(HF_ENDPOINT\): .*"
        r"run the same command again \(it goes on where it stopped\), or name a mirror: HF_ENDPOINT=",
    ):
        fetch_file(large(), url(hub), tmp_path)
    assert pauses == list(fetch.PAUSES_S)


def test_each_break_that_brought_bytes_counts_anew(hub: FakeHub, tmp_path: Path) -> None:
    hub.fail("break", NAME, after=250_000, times=20)
    assert fetch_file(large(), url(hub), tmp_path).read_bytes() == CONTENT


def test_wrong_checksum_is_deleted_and_told(hub: FakeHub, tmp_path: Path) -> None:
    hub.fail("corrupt", NAME, times=9)
    with pytest.raises(
        HubError, match=rf"{NAME} from .* has another checksum than the sha256 {large().digest}.*deleted"
    ):
        fetch_file(large(), url(hub), tmp_path)
    assert [p for p in tmp_path.iterdir() if p.is_file()] == []
    assert len([r for r in hub.requests if "/cdn/" in r]) == 1


def test_damaged_rest_of_an_earlier_run_is_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    part = tmp_path / f"{NAME}.{large().digest[:16]}.part"
    part.write_bytes(b"x" * 1000)
    assert fetched_bytes(large(), tmp_path) == 1000
    assert fetch_file(large(), url(hub), tmp_path).read_bytes() == CONTENT
    assert not part.exists()


def test_rest_of_another_version_is_not_used(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.{'0' * 16}.part").write_bytes(CONTENT[:1000])
    fetch_file(large(), url(hub), tmp_path)
    assert hub.sent[NAME] == len(CONTENT)


@pytest.mark.parametrize("there", [len(CONTENT), len(CONTENT) + 5])
def test_rest_that_is_whole_or_too_long(hub: FakeHub, tmp_path: Path, there: int) -> None:
    (tmp_path / f"{NAME}.{large().digest[:16]}.part").write_bytes((CONTENT + b"12345")[:there])
    assert fetch_file(large(), url(hub), tmp_path).read_bytes() == CONTENT
    assert hub.sent[NAME] == (0 if there == len(CONTENT) else len(CONTENT))


def test_more_than_announced_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.fail("extra", NAME)
    with pytest.raises(HubError, match=rf"sends more than the {len(CONTENT)} bytes that it announced for {NAME}"):
        fetch_file(large(), url(hub), tmp_path)
    assert fetched_bytes(large(), tmp_path) == 0


def test_whole_file_is_not_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(CONTENT)
    assert is_fetched(large(), tmp_path)
    fetch_file(large(), url(hub), tmp_path)
    assert hub.requests == []


def test_killed_and_run_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.fail("stall", NAME, after=3 * fetch.CHUNK_BYTES + 10)
    script = (
        "import sys; from pathlib import Path; from moss_jt.fetch import RemoteFile, fetch_file\n"
        f"fetch_file(RemoteFile({NAME!r}, {len(CONTENT)}, 'sha256', {large().digest!r}), sys.argv[1], Path(sys.argv[2]))"
    )
    child = subprocess.Popen([sys.executable, "-c", script, url(hub), str(tmp_path)], env=dict(os.environ))
    try:
        deadline = time.monotonic() + 20
        while fetched_bytes(large(), tmp_path) < 3 * fetch.CHUNK_BYTES:
            assert time.monotonic() < deadline, "the child fetches nothing"
            assert child.poll() is None, "the child has ended by itself"
            time.sleep(0.02)
    finally:
        child.kill()
        child.wait()
    hub.released.set()
    there, before = fetched_bytes(large(), tmp_path), hub.sent[NAME]
    assert fetch_file(large(), url(hub), tmp_path).read_bytes() == CONTENT
    assert hub.sent[NAME] - before == len(CONTENT) - there


def test_token_is_sent_to_the_hub_only_where_there_is_one(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_file(
        RemoteFile("vocab.json", 1400, "git", hashlib.sha1(b"blob 1400\0" + b"{}" * 700).hexdigest()),
        url(hub, "vocab.json"),
        tmp_path,
    )
    assert hub.tokens == {None}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch_file(large(), url(hub), tmp_path)
    assert hub.tokens == {None, "Bearer hf_secret"}


def test_full_disk(hub: FakeHub, tmp_path: Path) -> None:
    part = tmp_path / f"{NAME}.{large().digest[:16]}.part"
    part.symlink_to("/dev/full")
    with pytest.raises(DiskError, match=rf"the disk of .*{NAME}.* is full; the file needs {len(CONTENT)} bytes"):
        fetch_file(large(), url(hub), tmp_path)


def test_folder_that_cannot_be_written(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"absent/.* cannot be written: No such file or directory"):
        fetch_file(large(), url(hub), tmp_path / "absent")


def test_nobody_listens(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        HubError, match=r"model cannot be fetched from the hub at http://127\.0\.0\.1:9 \(HF_ENDPOINT\): Connect.*"
    ):
        get_json("http://127.0.0.1:9/api/models/owner/model", subject="owner/model")


@pytest.mark.parametrize("value", ["huggingface", "ftp://x", "http://", "http://[x", "https://host:port"])
def test_endpoint_that_is_no_address(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", value)
    with pytest.raises(HubError, match=r"HF_ENDPOINT is .*; it must be an address such as https://MIRROR"):
        fetch.endpoint()


def test_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE .* is set"):
        fetch.endpoint()


def test_answer_that_is_not_json(hub: FakeHub) -> None:
    with pytest.raises(HubError, match=r"answers about owner/model with something that is not JSON.*Check HF_ENDPOINT"):
        get_json(url(hub), subject="owner/model")
