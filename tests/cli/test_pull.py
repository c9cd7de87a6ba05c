"""`moss-jt pull` as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from fake_hub import FakeHub

from moss_jt import paths, stored

FP = "fnlp/moss-tiny-sft"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, golden: Path) -> Iterator[FakeHub]:
    with FakeHub() as server:
        server.use(monkeypatch, tmp_path / "hf")
        server.add(FP, golden / "tiny-fp" / "bin-2shards", golden / "tokenizer" / "c-addedtoken-specials")
        yield server


def moss_jt(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moss_jt.cli", *args]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)


def test_pull_with_yes(hub: FakeHub) -> None:
    done = moss_jt("pull", FP, "--yes", "--delete-source", "--dtype", "fp32")
    path = paths.models_dir() / "fnlp--moss-tiny-sft"
    assert (done.returncode, done.stdout) == (0, f"{path}\n"), done.stderr
    for words in (
        f"Model:    {FP}, version {hub.repos[FP].commit[:12]}",
        "Download: 0.5 MB in 9 files",
        "needed at most, ",
        "Licence:  the hub says: agpl-3.0",
        "AGPL-3.0; the data they were tuned on is under CC BY-NC 4.0",
        "may be wrong",
        "at most 128 tokens",
        f"{FP} is ready: moss-jt chat --model {FP}",
    ):
        assert words in done.stderr
    again = moss_jt("pull", FP, "--json")
    assert json.loads(again.stdout) == {"name": FP, "path": str(path), "fetched": False}
    assert f"{FP} is stored already" not in again.stdout
    other = moss_jt("pull", FP, "--dtype", "fp16")
    assert other.returncode == 1
    assert f"{FP} is stored already, with weights in float32. Leave --dtype away" in other.stderr
    assert moss_jt("pull", FP, "--dtype", "fp32").returncode == 0


def test_nobody_to_ask(hub: FakeHub) -> None:
    done = moss_jt("pull", FP, stdin="y\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert "nobody can answer here: standard input is not a terminal. Add --yes." in done.stderr.splitlines()[-1]
    assert stored.list_models() == []


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 1)])
def test_asking_at_a_terminal(hub: FakeHub, answer: str, code: int) -> None:
    child = pexpect.spawn(
        sys.executable, ["-m", "moss_jt.cli", "pull", FP], timeout=40, encoding="utf-8", env=dict(os.environ)
    )
    child.expect(r"Accept the licence and fetch it\? \[y/N\]")
    child.sendline(answer)
    child.expect("is ready: moss-jt chat" if code == 0 else "was not accepted; nothing was fetched")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == code
    assert [model.state for model in stored.list_models()] == (["complete"] if code == 0 else [])


def test_broken_off_then_resumed_without_asking_again(hub: FakeHub) -> None:
    shard = "pytorch_model-00002-of-00002.bin"
    hub.fail("status", shard, status=404)
    first = moss_jt("pull", FP, "--yes")
    assert first.returncode == 1
    assert first.stderr.splitlines()[-1].startswith(f"moss-jt: {shard}: ")
    second = moss_jt("pull", FP)
    assert second.returncode == 0, second.stderr
    assert " are here already)" in second.stderr


def test_ctrl_c_keeps_what_has_arrived(hub: FakeHub) -> None:
    shard = "pytorch_model-00002-of-00002.bin"
    hub.fail("stall", shard, after=10_000)
    arguments = ["-m", "moss_jt.cli", "pull", FP, "--yes"]
    child = pexpect.spawn(sys.executable, arguments, timeout=30, encoding="utf-8", env=dict(os.environ))
    child.expect("Limits:")
    deadline = time.monotonic() + 20
    while hub.sent[shard] < 10_000:
        assert time.monotonic() < deadline, "the second shard was never asked for"
        time.sleep(0.02)
    child.sendintr()
    child.expect("Interrupted")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    hub.released.set()
    before = hub.sent["pytorch_model-00001-of-00002.bin"]
    again = moss_jt("pull", FP)
    assert again.returncode == 0, again.stderr
    assert hub.sent["pytorch_model-00001-of-00002.bin"] == before


def test_errors_are_one_line(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for args, words in (
        (["owner/none"], "knows no such model"),
        (["../up"], "is not the name of a model"),
        ([FP, "--revision", "v9"], "knows no such revision"),
    ):
        done = moss_jt("pull", *args, "--yes")
        assert done.returncode == 1
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert words in done.stderr
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set" in moss_jt("pull", FP).stderr


def test_chinese(hub: FakeHub) -> None:
    done = moss_jt("pull", FP, "--yes", "--lang", "zh")
    assert done.returncode == 0, done.stderr
    assert "权重采用 AGPL-3.0 许可" in done.stderr
    assert f"{FP} 已就绪" in done.stderr
