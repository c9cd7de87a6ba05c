"""Schemathesis reads our OpenAPI and tries what it can think of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from live_server import LiveServer

TESTS = Path(__file__).parent.parent


def find_nothing(live: LiveServer, folder: Path, *chosen: str, limit_s: int = 300) -> None:
    """Run it; it must find nothing, and the server must be as good as before."""
    line = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(TESTS / "schemathesis.toml"), "run"]
    line += [f"http://127.0.0.1:{live.port}/openapi.json", "--no-color", *chosen]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=limit_s, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Tested: 14" in done.stdout, "every operation was tried"
    assert live.service.dispatcher.restarts == 0
    assert live.service.dispatcher.running == live.service.dispatcher.waiting == 0


def test_nothing_is_found_without_keys(tmp_path: Path) -> None:
    with LiveServer(tmp_path) as live:
        find_nothing(live, tmp_path, "--phases=fuzzing", "--max-examples=8", "--seed=1")


def test_nothing_is_found_with_keys(tmp_path: Path) -> None:
    with LiveServer(tmp_path, keys=("alice",)) as live:
        key = f"Authorization: Bearer {live.keys['alice']}"
        find_nothing(live, tmp_path, "--phases=fuzzing", "--max-examples=2", "--seed=1", "-H", key)


@pytest.mark.slow
def test_nothing_is_found_in_ten_minutes(tmp_path: Path) -> None:
    with LiveServer(tmp_path) as live:
        find_nothing(live, tmp_path, "--max-time=600", "--max-examples=100000", limit_s=900)
