"""How the Streamlit page is started and ended, and what it shows before it can show conversations."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, until

from moss_jt.errors import ConfigError, ServerError
from moss_jt.web import streamlit_run
from moss_jt.web.asking import Asking
from moss_jt.web.client import Readiness, ServerClient, Wishes
from moss_jt.web.streamlit_run import SCRIPT, serve
from moss_jt.web.words import say

AppTest: Any = pytest.importorskip(
    "streamlit.testing.v1", reason="streamlit is not installed: pip install -e '.[web]'"
).AppTest
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "streamlit_app.py"
SERVE = """
import sys
from moss_jt.web.streamlit_run import serve
serve("http://127.0.0.1:9", port=0, on_listening=lambda url: print(url, flush=True))
"""


def is_there(url: str) -> bool:
    port = int(url.rpartition(":")[2])
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_it_ends_with_whoever_started_it(number: signal.Signals) -> None:
    line = [sys.executable, "-c", SERVE]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().strip()
        assert is_there(url)
        with urllib.request.urlopen(url, timeout=60) as page:
            assert b"<title>" in page.read()
        process.send_signal(number)
        assert process.wait(60) == (0 if number is signal.SIGINT else -signal.SIGKILL)
        until(lambda: not is_there(url), "Streamlit ends, too")
        assert process.stderr.read() == ""


def test_a_taken_port_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"the page cannot listen at 127\.0\.0\.1, port {port}: .* --port"):
            serve("http://127.0.0.1:9", port=port)


def test_streamlit_sends_nothing_home_and_knows_no_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMLIT_BROWSER_GATHER_USAGE_STATS", "true")
    found = streamlit_run._variables("http://127.0.0.1:9", "moss-key", "127.0.0.1", 8501)
    code = (
        "from streamlit import config; from streamlit.web import cli; import json\n"
        "cli.bootstrap.run = lambda *_, **__: print(json.dumps("
        "[config.get_option(n) for n in ('browser.gatherUsageStats', 'server.address', 'server.allowedHosts')]))\n"
        f"cli.main(['run', {str(SCRIPT)!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=found, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == '[false, "127.0.0.1", ["127.0.0.1", "::1", "localhost"]]\n', done.stderr
    assert (found["MOSS_JT_SERVER"], found["MOSS_JT_KEY"]) == ("http://127.0.0.1:9", "moss-key")


@pytest.fixture(autouse=True)
def own_main(monkeypatch: pytest.MonkeyPatch) -> None:
    """An app in this process becomes the program; processes that later tests start must not run it."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


def page(monkeypatch: pytest.MonkeyPatch, server: str, script: Path = SCRIPT, key: str = "") -> Any:
    monkeypatch.setenv("MOSS_JT_SERVER", server)
    monkeypatch.setenv("MOSS_JT_KEY", key)
    return AppTest.from_file(str(script), default_timeout=60).run()


def test_a_server_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    app = page(monkeypatch, "http://127.0.0.1:9")
    assert "cannot be reached" in app.error[0].value
    assert not app.chat_input and not app.exception


def test_while_the_model_is_loaded_it_says_how_far(monkeypatch: pytest.MonkeyPatch, toy_server: LiveServer) -> None:
    monkeypatch.setattr(ServerClient, "readiness", lambda _: Readiness(False, "Loading", 0.4))
    app = page(monkeypatch, f"http://127.0.0.1:{toy_server.port}")
    assert app.chat_input[0].disabled and not app.exception
    (bar,) = app.get("progress")
    assert "Loading" in bar.proto.text and bar.proto.value == 40


def test_sliders_begin_where_the_model_is_best_asked(monkeypatch: pytest.MonkeyPatch, toy_server: LiveServer) -> None:
    figures = ServerClient.figures
    own = Wishes(temperature=0.0, repetition_penalty=1.0)
    monkeypatch.setattr(ServerClient, "figures", lambda client: replace(figures(client), wishes=own))
    app = page(monkeypatch, f"http://127.0.0.1:{toy_server.port}")
    temperature = app.sidebar.slider(key="temperature")
    assert temperature.value == 0 and app.sidebar.slider(key="repetition_penalty").value == 1
    temperature.set_value(0.5).run()
    assert app.sidebar.slider(key="temperature").value == 0.5, "what was chosen stays"
    next(button for button in app.sidebar.button if button.label == say("reset", "en")).click().run()
    assert app.sidebar.slider(key="temperature").value == 0 and not app.exception


def test_the_example_shows_the_same_page(monkeypatch: pytest.MonkeyPatch, toy_server: LiveServer) -> None:
    app = page(monkeypatch, f"http://127.0.0.1:{toy_server.port}", EXAMPLE)
    assert not app.exception and not app.chat_input[0].disabled
    assert [button.label for button in app.sidebar.button] == [say("new", "en"), say("reset", "en")]


def test_visitors_log_in_each_with_their_own_key(monkeypatch: pytest.MonkeyPatch, keyed_server: LiveServer) -> None:
    keyed_server.client("alice").say("of alice")
    keyed_server.client("bob").say("of bob")
    app = page(monkeypatch, f"http://127.0.0.1:{keyed_server.port}")
    assert not app.chat_input
    for wrong in ("moss-wrong", "钥匙"):
        app.text_input[0].input(wrong)
        app.button[0].click().run()
        assert not app.chat_input and app.error and not app.exception
    app.text_input[0].input(f" {keyed_server.keys['alice']} ")
    app.button[0].click().run()
    assert not app.chat_input[0].disabled and not app.exception
    labels = [button.label for button in app.sidebar.button]
    assert "of alice" in labels and "of bob" not in labels
    assert "of alice" not in [button.label for button in page(monkeypatch, os.environ["MOSS_JT_SERVER"]).button]


def test_a_key_of_the_page_is_used_by_all_who_see_it(monkeypatch: pytest.MonkeyPatch, keyed_server: LiveServer) -> None:
    keyed_server.client("alice").say("said by alice")
    keyed_server.client("bob").say("said by bob")
    app = page(monkeypatch, f"http://127.0.0.1:{keyed_server.port}", key=keyed_server.keys["bob"])
    labels = [button.label for button in app.sidebar.button]
    assert "said by bob" in labels and "said by alice" not in labels and not app.text_input


def test_the_sliders_keep_their_places_while_the_server_is_away(
    monkeypatch: pytest.MonkeyPatch, toy_server: LiveServer
) -> None:
    app = page(monkeypatch, f"http://127.0.0.1:{toy_server.port}")
    app.slider(key="temperature").set_value(0.25).run()

    def fail(_: ServerClient) -> None:
        raise ServerError("it is away.")

    with monkeypatch.context() as patch:
        patch.setattr(ServerClient, "figures", fail)
        assert "it is away" in app.run().error[0].value
    app.run()
    assert not app.exception and not app.error
    assert app.slider(key="temperature").value == 0.25


def test_a_conversation_that_never_began_is_begun_anew(monkeypatch: pytest.MonkeyPatch, toy_server: LiveServer) -> None:
    app = page(monkeypatch, f"http://127.0.0.1:{toy_server.port}")

    def await_button(key: str) -> None:
        until(lambda: key in [button.key for button in app.run().button], key)
        assert not app.exception

    monkeypatch.setattr(Asking, "_is_stored", lambda *_: False)  # as where the server dies in the middle
    app.chat_input[0].set_value("gone @hold").run()
    until(lambda: any("you said gone" in text.value for text in app.run().markdown), "the answer")
    app.button(key="stop").click().run()
    await_button("retry")
    assert [text.value for text in app.text] == ["gone @hold"]
    app.chat_input[0].set_value("hello").run()
    await_button("edit")
    assert [text.value for text in app.text] == ["hello"]
    assert [button.label for button in app.sidebar.button][1] == "hello"
