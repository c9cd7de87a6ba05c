"""`moss-jt models list|path|rm`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pexpect
import pytest
from click.testing import CliRunner, Result

from moss_jt import paths
from moss_jt.cli.models import command
from moss_jt.converters.hf2jittor import hf2jittor
from moss_jt.errors import ConfigError, HubError


@pytest.fixture
def models(golden: Path) -> Path:
    """An int4 model "tiny" and a partial "fnlp/moss"."""
    hf2jittor(golden / "tiny-int4" / "g32", paths.models_dir() / "tiny")
    (paths.models_dir() / "fnlp--moss.pull").mkdir()
    return paths.models_dir()


def run(*args: str) -> Result:
    return CliRunner().invoke(command, args, catch_exceptions=False)


def test_list(models: Path) -> None:
    used = time.mktime((2026, 1, 2, 3, 4, 0, 0, 0, -1))
    os.utime(models / "tiny", (used, used))
    head, first, second = run("list").stdout.splitlines()
    assert head.split() == ["NAME", "BITS", "SIZE", "STATE", "LAST", "USED"]
    assert first.split()[:2] == ["fnlp/moss", "?"]
    assert "partial" in first
    assert second.split()[:2] == ["tiny", "4"]
    assert second.endswith("complete  2026-01-02 03:04")
    assert head.index("STATE") == first.index("partial") == second.index("complete")


def test_list_as_json(models: Path) -> None:
    listed = json.loads(run("list", "--json").stdout)
    assert [(m["name"], m["state"], m["bits"]) for m in listed] == [
        ("fnlp/moss", "partial", None),
        ("tiny", "complete", 4),
    ]
    assert listed[1]["path"] == str(models / "tiny")
    assert listed[1]["size_bytes"] > 100_000


def test_list_of_nothing() -> None:
    done = run("list")
    assert (done.stdout, done.exit_code) == ("", 0)
    assert "No model is stored. Fetch one with: moss-jt pull OWNER/NAME" in done.stderr
    assert json.loads(run("list", "--json").stdout) == []


def test_path(models: Path) -> None:
    assert run("path", "tiny").stdout == f"{models / 'tiny'}\n"
    with pytest.raises(HubError, match="fnlp/moss is stored only in part"):
        run("path", "fnlp/moss")


def test_rm_with_yes(models: Path) -> None:
    done = run("rm", "tiny", "--yes")
    assert done.stdout == ""
    assert done.stderr.startswith("Removed tiny; ")
    assert not (models / "tiny").exists()
    assert (models / "fnlp--moss.pull").exists()
    with pytest.raises(HubError, match="tiny is not stored"):
        run("rm", "tiny", "--yes")


def test_rm_asks_nobody_where_nobody_is(models: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'Remove tiny \(.*\) from .*models\?', and nobody can answer here.*Add --yes"
    ):
        run("rm", "tiny")
    assert (models / "tiny").exists()


@pytest.mark.parametrize("answer", ["n", "", "y"])
def test_rm_asks_at_a_terminal(models: Path, answer: str) -> None:
    arguments = ["-m", "moss_jt.cli", "models", "rm", "tiny"]
    child = pexpect.spawn(sys.executable, arguments, timeout=30, encoding="utf-8", env=dict(os.environ))
    child.expect(r"Remove tiny \(.*\) from .*models\? \[y/N\]")
    child.sendline(answer)
    child.expect("Removed tiny" if answer == "y" else "Nothing was removed")
    child.expect(pexpect.EOF)
    assert (models / "tiny").exists() == (answer != "y")
