"""`moss-jt web`: who may reach the page, and page and server as one program that begins and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from live_server import Client, LiveServer, until

from moss_jt.cli import web
from moss_jt.cli.web_server import order, own_server
from moss_jt.errors import ConfigError, MossError, ServerError
from moss_jt.paths import embedded_model
from moss_jt.server.database import Database

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LiveServer]]:
    """One without keys, one with a key."""
    folders = [tmp_path_factory.mktemp(name) for name in ("open", "keyed")]
    with LiveServer(folders[0]) as live, LiveServer(folders[1], keys=("alice",)) as keyed:
        yield {"open": live, "keyed": keyed}


def access(server: LiveServer, key: str | None, host: str = "127.0.0.1") -> bool:
    return web.check_access(f"http://127.0.0.1:{server.port}", key, host=host)


def test_on_this_machine_one_logs_in_where_the_server_has_keys(servers: dict[str, LiveServer]) -> None:
    keyed = servers["keyed"]
    assert access(servers["open"], None) is False
    assert access(keyed, None) is True
    assert access(keyed, keyed.keys["alice"]) is False
    with pytest.raises(ServerError, match="a key of this server is needed"):
        access(keyed, "moss-wrong")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_others_must_log_in(servers: dict[str, LiveServer], host: str) -> None:
    keyed = servers["keyed"]
    assert access(keyed, None, host) is True
    with pytest.raises(ConfigError, match=r"there are no keys\. Make one first: moss-jt keys add NAME"):
        access(servers["open"], None, host)
    with pytest.raises(ConfigError, match="all be one visitor"):
        access(keyed, keyed.keys["alice"], host)


def test_a_name_that_means_nothing(servers: dict[str, LiveServer]) -> None:
    with pytest.raises(ConfigError, match="is not known"):
        access(servers["open"], None, "no-such-host.invalid")


def test_a_server_that_is_named_has_its_own_model() -> None:
    line = ["--server", "http://127.0.0.1:9", "--model", "x"]
    with pytest.raises(ConfigError, match="leave these options out"):
        CliRunner().invoke(web.command, line, catch_exceptions=False)


def test_a_server_that_is_not_there_is_told() -> None:
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        CliRunner().invoke(web.command, ["--server", "http://127.0.0.1:9"], catch_exceptions=False)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(web._MODULES, "gradio", ("no_such_module",))
    with pytest.raises(ConfigError, match=r"no_such_module is not installed, .* pip install '\.\[web\]'"):
        web.require_extra("gradio")


def test_why_a_server_cannot_start_is_told(tmp_path: Path) -> None:
    path = tmp_path / "moss.db"
    database = Database(path)
    try:
        wanted = order(embedded_model(), {}, parallel=1, database=path)
        with pytest.raises(MossError, match="is in use by another server"), own_server(wanted, lambda _: None):
            pass
    finally:
        database.close()


class Running:
    """The program, in a session of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.log = folder / "log"
        options = options or ("--database", str(folder / "moss.db"))
        line = [sys.executable, "-m", "moss_jt.cli", "web", "--port", "0", *options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                line, stderr=log, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True
            )
        until(lambda: "page is at" in self.told or self.process.poll() is not None, "there is a page")
        assert self.process.poll() is None, self.told
        url = next(word for word in self.told.split() if word.startswith("http://"))
        self.page = Client(int(url.rpartition(":")[2]))

    @property
    def told(self) -> str:
        return self.log.read_text()

    def is_gone(self) -> bool:
        """Whether no process of the session is left."""
        return self.process.pid not in set(sessions())


def sessions() -> Iterator[int]:
    """Of every process on this machine that has not ended."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ends just now
            state, _, _, session, *_ = path.read_text().rpartition(")")[2].split()
            if state != "Z":
                yield int(session)


def test_page_and_server_begin_with_one_command_and_end_with_ctrl_c(tmp_path: Path) -> None:
    running = Running(tmp_path)
    assert b"moss-send" in running.page.get("/").body
    assert len([session for session in sessions() if session == running.process.pid]) > 1, "page and server"
    with socket.create_connection(("127.0.0.1", running.page.port)) as tab:  # it stays open
        tab.sendall(b"GET /gradio_api/heartbeat/x HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert tab.recv(12) == b"HTTP/1.1 200"
        os.killpg(running.process.pid, signal.SIGINT)  # as a terminal does
        assert running.process.wait(60) == 0, running.told
    assert "Traceback" not in running.told
    until(running.is_gone, "the server has ended, too")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_other_page_begins_and_ends_in_the_same_way(
    servers: dict[str, LiveServer], tmp_path: Path, number: signal.Signals
) -> None:
    pytest.importorskip("streamlit", reason="streamlit is not installed: pip install -e '.[web]'")
    running = Running(tmp_path, "--ui", "streamlit", "--server", f"http://127.0.0.1:{servers['open'].port}")
    assert b"<title>Streamlit</title>" in running.page.get("/").body
    os.killpg(running.process.pid, number)
    running.process.wait(60)
    assert "Traceback" not in running.told

    def is_gone() -> bool:
        try:
            running.page.get("/healthz")
        except ConnectionError:
            return True
        return False

    until(is_gone, "Streamlit has ended, too")


def test_a_server_ends_with_a_page_that_is_killed(tmp_path: Path) -> None:
    running = Running(tmp_path)
    running.process.kill()
    running.process.wait(60)
    until(running.is_gone, "the server has ended, too")
