"""Tools that hang: only who asked for them waits."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from finding_tools import FindingTools
from live_server import LONGEST_S, Asked, LiveServer, until

from moss_jt.server.calls import ToolResults
from moss_jt.server.tool_threads import ToolThreads

MANY = 8  # more than asyncio has threads on a small machine


class Hanging(FindingTools):
    """Tools that hang where they are told to, until the test is over."""

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()
        self.hanging = 0

    def run(self, commands: str) -> ToolResults | None:
        if "hang" in commands:
            self.hanging += 1
            assert self.over.wait(2 * LONGEST_S)
            self.hanging -= 1
        if "fail" in commands:
            raise ZeroDivisionError
        return super().run(commands)


@pytest.fixture
def tools() -> Iterator[Hanging]:
    made = Hanging()
    yield made
    made.over.set()


def test_tools_of_one_that_hang_leave_the_others_theirs(tmp_path: Path, tools: Hanging) -> None:
    with LiveServer(tmp_path, tools=tools, parallel=MANY, keys=("alice", "bob")) as live:
        alice, bob = live.client("alice"), live.client("bob")
        asked = [Asked(lambda: alice.post("/", {"prompt": "@search hang"})) for _ in range(MANY)]
        until(lambda: tools.hanging == MANY, "all hang")
        assert "and found" in bob.say("@search rain")["response"]
        tools.over.set()
        assert all(one.reply().status == 200 for one in asked)


def test_a_server_ends_though_tools_hang(tmp_path: Path, tools: Hanging) -> None:
    """It waited for their threads, and heard no signal meanwhile."""
    with LiveServer(tmp_path, tools=tools) as live:
        line = http.client.HTTPConnection("127.0.0.1", live.port)
        line.request("POST", "/", json.dumps({"prompt": "@search hang"}), {"Content-Type": "application/json"})
        until(lambda: tools.hanging == 1, "it hangs")
        line.close()
        live.stop()
        assert tools.hanging == 1


def test_so_many_at_once_and_the_others_wait(tools: Hanging) -> None:
    async def run() -> None:
        threads = ToolThreads(tools, most=2)
        gone, *asked = [asyncio.ensure_future(threads.run("a", "hang")) for _ in range(5)]
        while tools.hanging < 2:
            await asyncio.sleep(0.001)
        gone.cancel()
        waits = asked.pop()
        waits.cancel()
        assert await threads.run("b", "None") is None
        assert tools.hanging == 2, "who has gone keeps its place until its tools end"
        tools.over.set()
        assert all(await asyncio.gather(*asked))
        with pytest.raises(ZeroDivisionError):
            await threads.run("a", "fail")
        assert not threads._places, "nothing is kept of who has left"

    asyncio.run(run())
