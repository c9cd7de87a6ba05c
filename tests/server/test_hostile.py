"""Clients that mean harm, or are broken: an error for them, and nothing for the others."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import Client, LiveServer, until
from pydantic import ValidationError

from moss_jt.server.schemas import ChatRequest, CompletionRequest, MossRequest

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with short times."""
    folder = tmp_path_factory.mktemp("strict")
    with LiveServer(folder, head_s=0.3, body_s=0.3, send_s=0.3, connections=20) as live:
        yield live


@pytest.fixture(autouse=True)
def still_serves(strict: LiveServer) -> Iterator[None]:
    """After each of these the server answers others, and nothing is left of it."""
    yield
    until(lambda: not strict.server.server_state.connections, "all connections are closed")
    assert strict.client().say("hello")["response"] == "you said hello"
    assert strict.service.dispatcher.waiting == 0


def talk(port: int, *pieces: bytes) -> bytes:
    """Send bytes, and read to the end."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces:
                line.sendall(piece)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := line.recv(1 << 16):
                received += chunk
        return received


def head(length: object, *more: str) -> bytes:
    """The first lines of a POST."""
    lines = ["POST / HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {length}", *more]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def test_a_head_that_never_ends_is_cut(strict: LiveServer) -> None:
    assert talk(strict.port, b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: ") == b""


def test_silence_is_cut(strict: LiveServer) -> None:
    assert talk(strict.port) == b""


def test_a_body_that_never_ends_is_told_so(strict: LiveServer) -> None:
    assert b" 408 " in talk(strict.port, head(100), b'{"prompt"').split(b"\r\n")[0]


def test_100_mb_are_refused_before_they_are_sent(strict: LiveServer) -> None:
    answer = talk(strict.port, head(100 << 20))
    assert b" 413 " in answer.split(b"\r\n")[0]
    assert b"connection: close" in answer.lower()


def test_100_mb_without_a_length_are_refused_and_not_kept(strict: LiveServer) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = (
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"%x\r\n" % (1 << 16) + b" " * (1 << 16) + b"\r\n"
    answer = talk(strict.port, start, *[chunk] * 1600)
    assert not answer or b" 413 " in answer.split(b"\r\n")[0]  # it may be cut while it still sends
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10  # KiB


def test_a_head_of_100_mb_is_cut(strict: LiveServer) -> None:
    answer = talk(strict.port, b"GET / HTTP/1.1\r\n", *[b"X-A: " + b"a" * 60000 + b"\r\n"] * 1600)
    assert not answer or b" 400 " in answer.split(b"\r\n")[0]


def test_many_silent_connections_leave_room_again(strict: LiveServer) -> None:
    lines = [socket.create_connection(("127.0.0.1", strict.port), timeout=30) for _ in range(40)]
    for line in lines:
        with contextlib.suppress(ConnectionResetError):
            assert line.recv(1) == b""
        line.close()


def test_one_who_never_reads_is_cut(strict: LiveServer) -> None:
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        line.connect(("127.0.0.1", strict.port))
        line.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 500)  # more than any buffer takes
        until(lambda: bool(strict.server.server_state.connections), "it is connected")
        until(lambda: not strict.server.server_state.connections, "it is cut")


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"{", "not_json"),
        (b"\xff\xfe", "not_utf8"),
        (b'{"prompt": "\xe4\xbd"}', "not_utf8"),
        (b"[" * 100_000, "too_deep"),
        (b'{"prompt": ' + b'{"a":' * 100_000, "too_deep"),
        (b'{"prompt": "x", "temperature": NaN}', "not_json"),
        (b'{"prompt": "x", "temperature": Infinity}', "not_json"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "not_json"),
        (b'{"prompt": "\\ud800"}', "invalid_value"),
        (b'{"prompt": "x", "\\ud800": 1}', "invalid_value"),
        (b'"text"', "invalid_value"),
        (b"[]", "invalid_value"),
        (b"null", "invalid_value"),
        (b"", "invalid_value"),
    ],
)
@pytest.mark.parametrize("path", ["/", CHAT, "/v1/completions"])
def test_bodies_that_are_none(strict: LiveServer, path: str, raw: bytes, code: str) -> None:
    reply = strict.client().ask("POST", path, raw=raw)
    assert (reply.status, reply.code) == (400, code)


MANY = 20_000
FIELDS = dict.fromkeys(map(str, range(MANY)), "")
ASKED = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * MANY}]}),
        (ChatRequest, {"messages": [1] * 4000}),
        (ChatRequest, {"messages": [ASKED], "logit_bias": FIELDS}),
        (ChatRequest, {"messages": [ASKED], "tools": [{"function": {"parameters": {"properties": FIELDS}}}]}),
        (ChatRequest, FIELDS),
        (CompletionRequest, {"prompt": [-1] * MANY}),
        (MossRequest, FIELDS),
    ],
)
def test_many_faults_are_not_all_counted(
    strict: LiveServer, kind: type[ChatRequest | CompletionRequest | MossRequest], body: dict[str, object]
) -> None:
    """A megabyte of them was half a million errors: seconds, and most of a GiB."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 30
    path = {ChatRequest: CHAT, CompletionRequest: "/v1/completions", MossRequest: "/"}[kind]
    reply = strict.client().post(path, body)
    assert (reply.status, reply.code) == (400, "invalid_value")


def test_without_a_key_no_body_is_read(keyed_server: LiveServer) -> None:
    answer = talk(keyed_server.port, head(100))
    assert b" 401 " in answer.split(b"\r\n")[0]
    assert b"connection: close" in answer.lower()


def test_other_kinds_of_body(strict: LiveServer) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        reply = strict.client().ask("POST", "/", raw=b'{"prompt": "x"}', headers={"Content-Type": kind})
        assert (reply.status, reply.code) == (415, "not_json")


def test_a_page_of_another_site_is_refused(strict: LiveServer) -> None:
    client = strict.client()
    for headers in ({"Origin": "https://example.org"}, {"Origin": "null"}, {"Host": "example.org"}):
        reply = client.ask("POST", "/", {"prompt": "x"}, headers=headers)
        assert (reply.status, reply.code) == (403, "foreign_origin"), headers
    for headers in ({"Origin": "http://localhost:7860"}, {"Host": f"localhost:{strict.port}"}):
        assert client.ask("POST", "/", {"prompt": "x"}, headers=headers).status == 200


def test_null_characters_and_escapes_are_text(strict: LiveServer) -> None:
    text = "a\0b\x1b[31m<script>alert(1)</script>\u202e'; DROP TABLE turns; --"
    reply = strict.client().say(text)
    assert reply["history"] == [[text, "you said " + text]]
    exported = strict.client().get(f"/v1/conversations/{reply['uid']}").json
    assert exported["turns"][0]["human"] == text


@pytest.mark.parametrize("uid", ["%00", "..%2F..", "x" * 65, "%ff", "*", "' OR 1=1 --".replace(" ", "%20")])
def test_uids_that_are_none(strict: LiveServer, uid: str) -> None:
    for method in ("GET", "DELETE"):
        assert strict.client().ask(method, f"/v1/conversations/{uid}").status in (400, 404)


@pytest.mark.parametrize("value", ["Bearer ", "Basic eDp5", "Bearer \xff\xfe", "Bearer " + "x" * 20_000, "x"])
def test_keys_that_are_none(keyed_server: LiveServer, value: str) -> None:
    assert Client(keyed_server.port).ask("GET", "/v1/models", headers={"Authorization": value}).status == 401


def test_a_client_that_resets_in_the_middle_stops_its_answer(strict: LiveServer) -> None:
    body = json.dumps({"prompt": "@long", "max_new_tokens": 3000}).encode()
    line = socket.create_connection(("127.0.0.1", strict.port), timeout=30)
    line.sendall(head(len(body)) + body)
    until(lambda: strict.service.dispatcher.running == 1, "it runs")
    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.close()
    until(lambda: strict.service.dispatcher.running == 0, "it is ended")


def test_what_is_sent_is_not_logged_unless_asked(
    strict: LiveServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "moss_jt")
    strict.client().say("a private matter")
    strict.client().ask("POST", "/", raw=b'{"prompt": "another private matter", "x": 1}')
    assert not [record for record in caplog.records if "private" in str(vars(record))]
    with LiveServer(tmp_path, log_texts=True) as live:
        live.client().say("a public matter")
    fields = [vars(record)["fields"] for record in caplog.records if "public" in str(vars(record))]
    assert json.loads(fields[0]["sent_request"]) == {"prompt": "a public matter"}
    assert fields[0]["answers"] == ["you said a public matter"]
