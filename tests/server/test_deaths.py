"""kill -9 of the model's process and of the server, in the middle of answers."""

from __future__ import annotations

import http.client
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from live_server import LONGEST_S, Client, LiveServer, until

TESTS = Path(__file__).parent.parent
CHAT = "/v1/chat/completions"


def chat(text: str, **more: Any) -> dict[str, Any]:
    """The body of a question."""
    return {"messages": [{"role": "user", "content": text}], **more}


def kill_worker(live: LiveServer) -> None:
    """kill -9."""
    pid = live.service.dispatcher.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_what_nobody_had_seen_is_asked_again(tmp_path: Path) -> None:
    with LiveServer(tmp_path) as live:
        replies: list[Any] = []
        thread = threading.Thread(
            target=lambda: replies.append(live.client().post(CHAT, chat("@long", max_tokens=400)))
        )
        thread.start()
        until(lambda: live.service.dispatcher.running == 1, "it runs")
        kill_worker(live)
        thread.join()
        assert replies[0].status == 200
        assert replies[0].json["usage"]["completion_tokens"] == 400
        assert replies[0].json["choices"][0]["message"]["content"].startswith("you said @long")
        assert live.service.dispatcher.restarts == 1


def test_what_was_seen_ends_with_an_error_and_is_kept(tmp_path: Path) -> None:
    with LiveServer(tmp_path) as live:
        client = live.client()
        uid = client.say("before")["uid"]
        with client.stream("/", {"prompt": "@long", "uid": uid, "max_new_tokens": 1000}) as stream:
            seen, last = "", {}
            for event in stream.events():
                if not seen and event.get("text"):
                    kill_worker(live)
                seen += event.get("text", "")
                last = event
        assert last["error"]["code"] == "model_restarted"
        turns = client.get(f"/v1/conversations/{uid}").json["turns"]
        assert [turn["answer"] for turn in turns] == ["you said before", seen]
        assert client.say("after", uid)["response"] == "you said after"
        with client.stream(CHAT, chat("@die")) as stream:
            assert list(stream.events())[-1]["error"]["code"] == "model_restarted"


def test_a_request_that_kills_gets_no_third_process(tmp_path: Path) -> None:
    with LiveServer(tmp_path) as live:
        reply = live.client().post(CHAT, chat("@die-first"))
        assert (reply.status, reply.code) == (503, "model_restarted")
        assert live.service.dispatcher.restarts == 2
        assert live.client().say("hello")["response"] == "you said hello"


def test_a_mistake_in_the_engine_is_told_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with LiveServer(tmp_path) as live:
        assert live.client().post(CHAT, chat("@crash")).code == "model_restarted"
        assert live.client().say("hello")["response"] == "you said hello"
    assert "RuntimeError: the toy has a mistake" in caplog.text


def command_of(pid: str) -> bytes:
    """The command line of a process; nothing where it has just ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


class Program:
    """A server as a process of its own."""

    def __init__(self, folder: Path) -> None:
        paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "serve_toy.py"), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert self.process.stdout is not None
        url = self.process.stdout.readline().strip()
        assert url, "the server has not come up"
        self.client = Client(int(url.rpartition(":")[2]))
        until(lambda: self.client.get("/readyz").status == 200, "it is ready")

    def workers(self) -> list[int]:
        """The process of the model, where there is one at this moment."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children if b"spawn_main" in command_of(child)]

    def kill(self) -> None:
        """kill -9; what it has started must end by itself."""
        workers = self.workers()
        assert workers
        self.process.kill()
        self.process.wait(LONGEST_S)
        until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), "its worker ends")

    def end(self) -> None:
        """SIGTERM, as a supervisor does."""
        self.process.terminate()
        assert self.process.wait(LONGEST_S) == 0

    def close(self) -> None:
        """Leave nothing behind, whatever happened."""
        self.process.kill()
        self.process.wait(LONGEST_S)
        if self.process.stdout is not None:
            self.process.stdout.close()


class Talkers:
    """Clients that talk until the server dies or they are to stop, and remember what they were told."""

    def __init__(self, client: Client, count: int) -> None:
        self.client = client
        self.told: dict[str, list[list[str]]] = {}
        self.lock = threading.Lock()
        self.answers = 0
        self.enough = False
        self.threads = [threading.Thread(target=self.talk, args=(number,)) for number in range(count)]
        for thread in self.threads:
            thread.start()

    def talk(self, number: int) -> None:
        uid: str | None = None
        try:
            for turn in range(10_000):
                if self.enough:
                    return
                text = f"client {number} turn {turn} " + ("@long" if turn % 3 else "")
                body = {"prompt": text, "max_new_tokens": 60, **({"uid": uid} if uid else {})}
                reply = self.client.post("/", body)
                if reply.status != 200:
                    assert reply.status == 503, reply.body
                    continue
                uid = str(reply.json["uid"])
                with self.lock:
                    self.told[uid] = reply.json["history"]
                    self.answers += 1
        except (OSError, http.client.HTTPException):  # the server is dead, perhaps in the middle of an answer
            pass

    def join(self) -> None:
        for thread in self.threads:
            thread.join()


def check(folder: Path, client: Client, told: dict[str, list[list[str]]]) -> None:
    """Everything that a client was told is there, and the file is whole."""
    for uid, history in told.items():
        turns = client.get(f"/v1/conversations/{uid}").json["turns"]
        kept = [[turn["human"], turn["answer"]] for turn in turns]
        assert kept[: len(history)] == history, "a finished turn is lost or changed"
        assert len(kept) <= len(history) + 1, "only the turn that was about to be told may be more"
        assert all(answer.startswith(f"you said {human.rstrip()[:10]}") for human, answer in kept)
    with sqlite3.connect(folder / "moss.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.close()


def kill_servers(folder: Path, times: int) -> None:
    """Kill a server again and again while clients talk to it."""
    moments = random.Random(7)
    told: dict[str, list[list[str]]] = {}
    for _ in range(times):
        with closing(Program(folder)) as program:
            talkers = Talkers(program.client, 4)
            wanted = moments.randrange(2, 12)
            until(lambda t=talkers, w=wanted: t.answers >= w, "they have talked")  # type: ignore[misc]
            program.kill()
            talkers.join()
            told.update(talkers.told)
    with closing(Program(folder)) as program:
        check(folder, program.client, told)
        program.end()


def kill_workers(folder: Path, times: int) -> None:
    """Kill the worker of one server again and again."""
    moments = random.Random(8)
    with closing(Program(folder)) as program:
        talkers = Talkers(program.client, 4)
        killed: set[int] = set()
        for _ in range(times):
            wanted = talkers.answers + moments.randrange(2, 8)
            until(lambda w=wanted: talkers.answers >= w and bool(program.workers()), "they have talked")  # type: ignore[misc]
            for worker in program.workers():
                os.kill(worker, signal.SIGKILL)
                killed.add(worker)
        until(lambda a=talkers.answers: talkers.answers > a + 3, "they talk again")  # type: ignore[misc]
        assert len(killed) == times, "each time another process was there"
        talkers.enough = True
        talkers.join()
        check(folder, program.client, talkers.told)
        program.end()


def test_kill_9_of_the_server(tmp_path: Path) -> None:
    kill_servers(tmp_path, 2)


def test_kill_9_of_the_worker(tmp_path: Path) -> None:
    kill_workers(tmp_path, 2)


@pytest.mark.slow
def test_kill_9_of_the_server_50_times(tmp_path: Path) -> None:
    kill_servers(tmp_path, 50)


@pytest.mark.slow
def test_kill_9_of_the_worker_50_times(tmp_path: Path) -> None:
    kill_workers(tmp_path, 50)
