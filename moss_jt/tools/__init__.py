"""Tools that run: search, calculator, equation solver, text to image, and anybody's own.

Usable without a model:

    from moss_jt.tools import ToolBox, moss_tools, parse_commands

    box = ToolBox(list(moss_tools().values()))
    for ran in box.run('Calculate("2^10"), Solve("x^2=15")'):
        print(ran.block)

Importing this loads neither SymPy nor Jittor; names are fetched when first used. What a chat does with tools is in
moss_jt.chat; how to add one is in docs/tools.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moss_jt.errors import ToolError
    from moss_jt.tools.backends import drawing_backend, moss_tools, search_backend
    from moss_jt.tools.citations import Citation, CitationStream, cited
    from moss_jt.tools.commands import Call, Commands, parse_commands
    from moss_jt.tools.index import LocalIndex
    from moss_jt.tools.plugins import load_plugins
    from moss_jt.tools.sandbox import Sandbox
    from moss_jt.tools.tool import Hit, Picture, Status, Tool
    from moss_jt.tools.toolbox import Limits, Ran, Source, ToolBox

_HOMES = {
    "Call": "commands",
    "Citation": "citations",
    "CitationStream": "citations",
    "Commands": "commands",
    "Hit": "tool",
    "Limits": "toolbox",
    "LocalIndex": "index",
    "Picture": "tool",
    "Ran": "toolbox",
    "Sandbox": "sandbox",
    "Source": "toolbox",
    "Status": "tool",
    "Tool": "tool",
    "ToolBox": "toolbox",
    "cited": "citations",
    "drawing_backend": "backends",
    "load_plugins": "plugins",
    "moss_tools": "backends",
    "parse_commands": "commands",
    "search_backend": "backends",
}

__all__ = [
    "Call",
    "Citation",
    "CitationStream",
    "Commands",
    "Hit",
    "Limits",
    "LocalIndex",
    "Picture",
    "Ran",
    "Sandbox",
    "Source",
    "Status",
    "Tool",
    "ToolBox",
    "ToolError",
    "cited",
    "drawing_backend",
    "load_plugins",
    "moss_tools",
    "parse_commands",
    "search_backend",
]


def __getattr__(name: str) -> Any:
    """Fetch a name from its module at first use."""
    if name == "ToolError":
        return import_module("moss_jt.errors").ToolError
    if name in _HOMES:
        return getattr(import_module(f"moss_jt.tools.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'moss_jt.tools' has no attribute {name!r}")
