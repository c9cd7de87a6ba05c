"""docs/cli.md says what `--help` says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_docs_of_the_command_line_are_current() -> None:
    """In a process of its own: help texts take the language in which their module was imported."""
    line = [sys.executable, str(ROOT / "docs" / "make_cli.py"), "--check"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_docs_hold_every_command() -> None:
    from moss_jt.cli.main import COMMANDS

    text = (ROOT / "docs" / "cli.md").read_text("utf-8")
    assert all(f"\n## moss-jt {name}\n" in text for name in COMMANDS)
