"""Tools of anybody's: what the entry points of the group `moss_jt.tools` name.

A package that says

    [project.entry-points."moss_jt.tools"]
    units = "my_package:tool"

adds the tool, a moss_jt.tools.Tool or a function that gives one. One that cannot be loaded is told of, not raised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points

from moss_jt.template import TOOLS
from moss_jt.tools.tool import Tool

GROUP = "moss_jt.tools"


@dataclass(frozen=True)
class Plugins:
    """What the entry points gave.

    Attributes:
        tools: by name.
        faults: entry point -> why there is no tool.
    """

    tools: Mapping[str, Tool] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)


def load_plugins() -> Plugins:
    """Load every installed tool."""
    tools: dict[str, Tool] = {}
    faults: dict[str, str] = {}
    for point in entry_points(group=GROUP):
        try:
            found = point.load()
            tool = found if isinstance(found, Tool) else found()
        except Exception as error:  # of somebody's package: the others still work
            faults[point.name] = f"{type(error).__name__}: {error}"
            continue
        if not isinstance(tool, Tool):
            faults[point.name] = f"{point.value} gives a {type(tool).__name__}, not a moss_jt.tools.Tool"
        elif tool.name in TOOLS or tool.name in tools:
            faults[point.name] = f"there is a tool named {tool.name} already"
        else:
            tools[tool.name] = tool
    return Plugins(tools, faults)
