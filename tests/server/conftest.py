"""Servers with the toy engine, shared by the tests of a file that change nothing of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live_server import Client, LiveServer


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server without keys."""
    with LiveServer(tmp_path_factory.mktemp("open")) as live:
        yield live


@pytest.fixture
def client(open_server: LiveServer) -> Client:
    """Somebody who asks it."""
    return open_server.client()


@pytest.fixture(scope="module")
def keyed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with the keys of alice and bob."""
    with LiveServer(tmp_path_factory.mktemp("keyed"), keys=("alice", "bob")) as live:
        yield live
