"""Schemathesis reads our OpenAPI and tries what it can think of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from live_server import LiveServer

TESTS = Path(__file__).parent.parent


def find_nothing(live: LiveServer, folder: Path, *, seconds: int, headers: list[str], chosen: list[str]) -> None:
    """Run it; it must find nothing, and the server must be as good as before."""
    line = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(TESTS / "schemathesis.toml"), "run"]
    line += [f"http://127.0.0.1:{live.port}/openapi.json", "--no-color", f"--max-time={seconds}", *chosen]
    for header in headers:
        line += ["-H", header]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=seconds + 120, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Tested: 12" in done.stdout, "every operation was tried"
    assert live.service.dispatcher.restarts == 0
    assert live.service.dispatcher.running == live.service.dispatcher.waiting == 0


def test_nothing_is_found_without_keys(tmp_path: Path) -> None:
    with LiveServer(tmp_path) as live:
        find_nothing(live, tmp_path, seconds=8, headers=[], chosen=["--max-examples=10", "--seed=1"])


def test_nothing_is_found_with_keys(tmp_path: Path) -> None:
    with LiveServer(tmp_path, keys=("alice",)) as live:
        headers = [f"Authorization: Bearer {live.keys['alice']}"]
        chosen = ["--max-examples=5", "--seed=1", "--phases=coverage"]
        find_nothing(live, tmp_path, seconds=8, headers=headers, chosen=chosen)


@pytest.mark.slow
def test_nothing_is_found_in_ten_minutes(tmp_path: Path) -> None:
    with LiveServer(tmp_path) as live:
        find_nothing(live, tmp_path, seconds=600, headers=[], chosen=["--max-examples=100000"])
