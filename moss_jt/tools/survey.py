"""Every tool and back end that there is, and what works here: for `moss-jt tools`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moss_jt.errors import ToolError
from moss_jt.language import pick
from moss_jt.tools.backends import DRAW_VARIABLE, KEY_VARIABLE, SEARCH_VARIABLE, drawing_backend, search_backend
from moss_jt.tools.drawing import Placeholder
from moss_jt.tools.drawing_diffusers import Diffusers
from moss_jt.tools.index import LocalIndex
from moss_jt.tools.maths import calculator, solver
from moss_jt.tools.plugins import load_plugins
from moss_jt.tools.sandbox import Sandbox
from moss_jt.tools.search_web import Bing, Ddgs
from moss_jt.tools.tool import Status, Tool


@dataclass(frozen=True)
class Row:
    """One back end of one tool.

    Attributes:
        tool: its name for `--tools`.
        backend: "" for a tool with one way to work.
        chosen: it is the one in use.
        status: what came of trying it.
    """

    tool: str
    backend: str
    chosen: bool
    status: Status

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        return {"tool": self.tool, "backend": self.backend, "chosen": self.chosen, **asdict(self.status)}


def survey() -> list[Row]:
    """Try everything that is set up. Servers that no option or variable names are not looked for.

    Raises:
        ConfigError, ToolError: a variable names no back end.
    """
    box = Sandbox()
    try:
        own = [Row(tool.name, "", True, tried(tool)) for tool in (calculator(box), solver(box))]
    finally:
        box.close()
    return [*_searches(), *own, *_drawings(), *_plugins()]


def tried(tool: Tool) -> Status:
    """What a tool's own check says."""
    if tool.check is None:
        return Status("ok", tool.api)
    try:
        return tool.check()
    except Exception as error:  # of somebody's tool
        return Status("fail", f"{type(error).__name__}: {error}")


def _searches() -> list[Row]:
    chosen = search_backend()
    key = os.environ.get(KEY_VARIABLE, "")
    known = {one.name: one for one in (LocalIndex(), Ddgs(), Bing(key), chosen)}
    unset = {"searxng": f"{SEARCH_VARIABLE}=searxng=URL"}
    return _rows("search", {name: one.check for name, one in known.items()}, chosen.name, unset)


def _drawings() -> list[Row]:
    chosen = drawing_backend()
    known = {one.name: one for one in (Placeholder(), Diffusers(), chosen)}
    unset = {"a1111": f"{DRAW_VARIABLE}=a1111=URL", "comfyui": f"{DRAW_VARIABLE}=comfyui=URL"}
    return _rows("draw", {name: one.check for name, one in known.items()}, chosen.name, unset)


def _rows(tool: str, checks: Mapping[str, Any], chosen: str, unset: Mapping[str, str]) -> list[Row]:
    """The back ends of a tool: those that can be tried, then those without an address."""
    rows = [Row(tool, name, name == chosen, _status(check)) for name, check in checks.items()]
    for name, variable in unset.items():
        if name not in checks:
            words = pick(f"not set: {variable}", f"未设置：{variable}")
            rows.append(Row(tool, name, False, Status("off", words)))
    return rows


def _status(check: Any) -> Status:
    try:
        found: Status = check()
    except ToolError as error:
        return Status("fail", str(error))
    return found


def _plugins() -> list[Row]:
    found = load_plugins()
    rows = [Row(tool.name, "", True, tried(tool)) for tool in found.tools.values()]
    return rows + [Row(name, "", False, Status("fail", why)) for name, why in found.faults.items()]
