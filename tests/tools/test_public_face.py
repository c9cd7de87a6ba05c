"""`import moss_jt.tools` without a model: light, and with the names that the documentation uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import moss_jt.tools

ROOT = Path(__file__).parent.parent.parent
HEAVY = ("sympy", "mpmath", "numpy", "jittor", "sqlite3", "urllib.request", "click")


def test_names_are_there() -> None:
    for name in moss_jt.tools.__all__:
        assert getattr(moss_jt.tools, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        moss_jt.tools.nothing  # noqa: B018


def test_importing_and_parsing_load_nothing_heavy() -> None:
    code = (
        "import sys; from moss_jt.tools import ToolBox, Tool, parse_commands, Sandbox; "
        "assert parse_commands('Calculate(\"1\")').calls; "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
