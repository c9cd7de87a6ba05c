"""A tool of anybody's: the example of examples/unit_tool as pip would install it, and tools that are broken."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moss_jt.errors import ToolError
from moss_jt.tools import ToolBox, load_plugins
from moss_jt.tools.plugins import GROUP

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "unit_tool"


def install(folder: Path, points: str, modules: dict[str, str]) -> None:
    """Put modules and their entry points where Python looks for installed packages."""
    for name, code in modules.items():
        (folder / f"{name}.py").write_text(code)
    info = folder / "example-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{points}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on Python's path; what is imported from it is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def example(site: Path) -> Path:
    found = re.search(
        rf'\[project\.entry-points\."{re.escape(GROUP)}"\]\n(.+)', (EXAMPLE / "pyproject.toml").read_text()
    )
    assert found
    install(site, found[1].replace('"', ""), {"unit_tool": (EXAMPLE / "unit_tool.py").read_text()})
    return site


def test_the_example_is_found_and_runs(example: Path) -> None:
    found = load_plugins()
    assert dict(found.faults) == {}
    box = ToolBox([found.tools["units"]])
    (ran,) = box.run('Convert("3", "mile", "km")')
    assert ran.block == 'Convert("3", "mile", "km") => \'4.828032 km\''
    for wrong in ('Convert("3", "mile", "ell")', 'Convert("many", "m", "km")', 'Convert("3")'):
        (ran,) = box.run(wrong)
        assert ran.block == f"{wrong} => 'No result.'" and ran.error
    assert box.lines[0] == found.tools["units"].line


def test_the_example_is_about_twenty_lines() -> None:
    code = [line for line in (EXAMPLE / "unit_tool.py").read_text().splitlines() if line.strip()]
    assert len(code) <= 22


def test_the_documentation_shows_the_example_as_it_is() -> None:
    page = (EXAMPLE.parent.parent / "docs" / "tools.md").read_text("utf-8")
    assert (EXAMPLE / "unit_tool.py").read_text().partition('"""\n\n')[2].strip() in page
    assert 'units = "unit_tool:tool"' in page and 'units = "unit_tool:tool"' in (EXAMPLE / "pyproject.toml").read_text()


def test_it_is_told_what_units_there_are(example: Path) -> None:
    with pytest.raises(ToolError, match="units are m, km, cm"):
        load_plugins().tools["units"].run("1", "ell", "m")


def test_broken_tools_are_told_and_the_others_work(site: Path) -> None:
    good = "from moss_jt.tools import Tool\ndef make(): return Tool('echo', 'Echo', 'Echo(text)', str)\n"
    bad = "from moss_jt.tools import Tool\ntool = Tool('calc', 'Mine', 'Mine(x)', str)\nnumber = lambda: 7\n"
    points = "echo = good:make\nmine = bad:tool\nseven = bad:number\ngone = missing:tool\nnot = bad:nothing"
    install(site, points, {"good": good, "bad": bad})
    found = load_plugins()
    assert list(found.tools) == ["echo"]
    assert found.faults == {
        "mine": "there is a tool named calc already",
        "seven": "bad:number gives a int, not a moss_jt.tools.Tool",
        "gone": "ModuleNotFoundError: No module named 'missing'",
        "not": "AttributeError: module 'bad' has no attribute 'nothing'",
    }
