"""Which back end searches and which one draws: a word, or a word with an address, from an option or the environment.

search    local | ddgs | searxng=URL | bing | bing=URL        MOSS_JT_SEARCH, key in MOSS_JT_SEARCH_KEY
draw      placeholder | a1111=URL | comfyui=URL | comfyui=URL,WORKFLOW.json | diffusers | diffusers=MODEL
                                                              MOSS_JT_DRAW
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from moss_jt import paths
from moss_jt.errors import ConfigError
from moss_jt.tools.drawing import DrawingBackend, Placeholder, drawing_tool
from moss_jt.tools.drawing_diffusers import MODEL, Diffusers
from moss_jt.tools.drawing_servers import Automatic1111, ComfyUi
from moss_jt.tools.index import LocalIndex
from moss_jt.tools.maths import calculator, solver
from moss_jt.tools.sandbox import Sandbox
from moss_jt.tools.search import SearchBackend, search_tool
from moss_jt.tools.search_web import BING, Bing, Ddgs, SearxNg
from moss_jt.tools.tool import Tool

SEARCH_VARIABLE = "MOSS_JT_SEARCH"
KEY_VARIABLE = "MOSS_JT_SEARCH_KEY"
DRAW_VARIABLE = "MOSS_JT_DRAW"
SEARCH_FORMS = ("local", "ddgs", "searxng=URL", "bing", "bing=URL")
DRAW_FORMS = ("placeholder", "a1111=URL", "comfyui=URL", "comfyui=URL,WORKFLOW.json", "diffusers", "diffusers=MODEL")


def search_backend(spec: str | None = None) -> SearchBackend:
    """The back end that a text names; None asks the environment, and is the local index there.

    Raises:
        ConfigError: the text names none.
        ToolError: its address is none.
    """
    spec = spec or os.environ.get(SEARCH_VARIABLE) or "local"
    kind, _, value = spec.partition("=")
    if spec == "local":
        return LocalIndex()
    if spec == "ddgs":
        return Ddgs()
    if kind == "searxng" and value:
        return SearxNg(value)
    if kind == "bing":
        return Bing(os.environ.get(KEY_VARIABLE, ""), value or BING)
    raise ConfigError(f"{spec!r} is no back end to search with; wanted is one of {', '.join(SEARCH_FORMS)}.")


def drawing_backend(spec: str | None = None) -> DrawingBackend:
    """The back end that a text names; None asks the environment, and is the placeholder there.

    Raises:
        ConfigError: the text names none.
        ToolError: its address is none.
    """
    spec = spec or os.environ.get(DRAW_VARIABLE) or "placeholder"
    kind, _, value = spec.partition("=")
    if spec == "placeholder":
        return Placeholder()
    if kind == "a1111" and value:
        return Automatic1111(value)
    if kind == "comfyui" and value:
        url, _, workflow = value.partition(",")
        return ComfyUi(url, paths.expand(workflow) if workflow else None)
    if kind == "diffusers":
        return Diffusers(value or MODEL)
    raise ConfigError(f"{spec!r} is no back end to draw with; wanted is one of {', '.join(DRAW_FORMS)}.")


def moss_tools(*, search: str | None = None, draw: str | None = None, box: Sandbox | None = None) -> Mapping[str, Tool]:
    """MOSS's four tools by name, with the chosen back ends; the process that computes starts when it is needed.

    Raises:
        ConfigError, ToolError: a back end is not named as above.
    """
    box = box or Sandbox()
    tools = (search_tool(search_backend(search)), calculator(box), solver(box), drawing_tool(drawing_backend(draw)))
    return {tool.name: tool for tool in tools}
