"""A Chromium for the tests of the pages, and servers for them: one that speaks by rule, one with moss-tiny."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chromium import LONGEST_MS, Chromium, Tab, why_not
from live_server import LiveServer
from toy_tools import toy_tools


@pytest.fixture(scope="module")  # not longer: while Playwright runs, its thread can have no other event loop
def chromium() -> Iterator[Chromium]:
    """The browser; a test without one skips, with the reason."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    from playwright.sync_api import expect

    expect.set_options(timeout=LONGEST_MS)
    with Chromium() as browser:
        yield browser


@pytest.fixture
def tab(chromium: Chromium) -> Iterator[Tab]:
    """A page in a profile of its own; it fails the test where something went wrong in it."""
    with chromium.tab() as tab:
        yield tab


@pytest.fixture(scope="module")
def toy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server without keys whose answers follow from the question: see toy_engine."""
    with LiveServer(tmp_path_factory.mktemp("toy")) as live:
        yield live


@pytest.fixture(scope="module")
def keyed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The same with the keys of alice and bob."""
    with LiveServer(tmp_path_factory.mktemp("keyed"), keys=("alice", "bob")) as live:
        yield live


@pytest.fixture(scope="module")
def tool_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The same with tools: see toy_tools."""
    folder = tmp_path_factory.mktemp("tools")
    with LiveServer(folder, tools=toy_tools(folder)) as live:
        yield live


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with moss-tiny, the real engine and the real calculator."""
    from moss_jt.paths import embedded_model
    from moss_jt.server.tool_runner import BoxRunner
    from moss_jt.server.worker import LoadedEngine
    from moss_jt.tools import Sandbox, ToolBox, moss_tools

    box = Sandbox()
    tools = ToolBox([moss_tools(box=box)["calc"]])
    engine = LoadedEngine(str(embedded_model()), 2, {"device": "cpu"})
    try:
        with LiveServer(tmp_path_factory.mktemp("tiny"), make_engine=engine, tools=BoxRunner(tools)) as live:
            yield live
    finally:
        tools.close()
