"""`moss-jt serve` as a user runs it: real Jittor, a real network of random weights, MOSS's two calls, a signal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner
from conftest import SHARED_CORE
from live_server import LONGEST_S, Client, until

from moss_jt.cli import serve
from moss_jt.converters.synth import preset_config, synthesize
from moss_jt.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
ASK = '{"prompt": "你是谁？", "max_new_tokens": 12, "temperature": 0}'


class Served:
    """The program, with its log."""

    def __init__(self, folder: Path, *options: str) -> None:
        model = folder / "tiny"
        if not model.exists():
            synthesize(preset_config("tiny"), model)
        self.log = folder / "log"
        line = [sys.executable, "-m", "moss_jt.cli", "serve", "--model", str(model), "--memory", "2GiB", "--port", "0"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*line, "--database", str(folder / "moss.db"), "--parallel", "3", *options],
                stderr=log,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        until(lambda: "Listening at" in self.log.read_text() or self.process.poll() is not None, "it listens")
        assert self.process.poll() is None, self.log.read_text()
        url = next(word for word in self.log.read_text().split() if word.startswith("http://")).rstrip(";")
        self.url = url
        self.client = Client(int(url.rpartition(":")[2]))
        until(lambda: self.client.get("/readyz").status == 200, "the model is loaded")

    def records(self) -> list[dict[str, Any]]:
        """The lines of the log that are JSON."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def curl(self, body: str) -> Any:
        """MOSS's documented call."""
        line = ["curl", "-sS", "-X", "POST", self.url, "-H", "Content-Type: application/json", "-d", body]
        return json.loads(subprocess.run(line, capture_output=True, timeout=LONGEST_S, check=True).stdout)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for the tests of this file; Jittor's core is that of the user's home."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "home").mkdir()
    (folder / "home" / "jittor").symlink_to(SHARED_CORE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOSS_JT_HOME", str(folder / "home"))
        made = Served(folder)
        yield made
        made.process.send_signal(signal.SIGINT)
        assert made.process.wait(LONGEST_S) == 0, made.log.read_text()
    bad = [record["message"] for record in made.records() if record["level"] not in ("info", "warning")]
    assert all("ended with code -9" in message for message in bad), "nothing but the kill below is an error"
    routes = [record["route"] for record in made.records() if record["logger"] == "moss_jt.server.access"]
    assert "/" in routes


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_two_calls_of_moss(served: Served) -> None:
    first = served.curl(ASK)
    assert first.keys() == {"response", "history", "status", "time", "uid"}
    assert first["status"] == 200
    assert first["history"] == [["你是谁？", first["response"]]]
    second = served.curl(json.dumps({**json.loads(ASK), "uid": first["uid"]}))
    assert second["uid"] == first["uid"]
    assert second["history"] == [["你是谁？", first["response"]], ["你是谁？", second["response"]]]
    assert served.curl(json.dumps({**json.loads(ASK), "uid": "unknown"}))["error"]["code"] == "unknown_uid"


def test_the_second_turn_finds_the_first_in_the_cache(served: Served) -> None:
    uid = served.client.say("one", max_new_tokens=5)["uid"]
    with served.client.stream("/", {"prompt": "two", "uid": uid, "max_new_tokens": 5}) as stream:
        *_, end = stream.events()
    usage = end["usage"]
    assert usage["prompt_tokens"] - usage["reused_tokens"] < 60 < usage["reused_tokens"]


def test_the_official_client(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as ai:
        ask: Any = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "seed": 5}
        done = ai.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
        assert done.usage is not None
        assert done.usage.completion_tokens <= 8
        stream = ai.chat.completions.create(**ask, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == done.choices[0].message.content, "the same seed, the same answer"
        scores = done.choices[0].logprobs
        assert scores is not None
        assert scores.content
        for token in scores.content:
            best = [one.logprob for one in token.top_logprobs]
            assert best == sorted(best, reverse=True)
            assert token.logprob <= best[0] < 0
        stop = ai.chat.completions.create(**{**ask, "max_tokens": 40, "stop": [text[2:4]]})
        assert stop.choices[0].message.content == text[: text.index(text[2:4])]
        tools: Any = [
            {
                "type": "function",
                "function": {
                    "name": "search",
                    "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
                },
            }
        ]
        called = ai.chat.completions.create(**ask, tools=tools)
        assert called.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_answers_at_once_are_those_of_each_alone(served: Served) -> None:
    bodies = [{"prompt": f"number {n}", "seed": n, "max_new_tokens": 10} for n in range(6)]
    alone = [served.client.post("/", body).json["response"] for body in bodies]
    with ThreadPoolExecutor(6) as pool:
        together = [reply.json["response"] for reply in pool.map(lambda b: served.client.post("/", b), bodies)]
    assert together == alone


def test_the_server_itself_has_no_jittor(served: Served) -> None:
    pid = served.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert "jit_utils" not in Path(f"/proc/{pid}/maps").read_text()
    assert any("jit_utils" in Path(f"/proc/{child}/maps").read_text() for child in children)


def test_figures(served: Served) -> None:
    served.client.say("x", max_new_tokens=2)
    text = served.client.get("/metrics").body.decode()
    values = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}
    assert values['moss_memory_bytes{tier="resident"}'] > 1e6
    assert values['moss_tokens_total{kind="new"}'] > 0
    assert values["moss_ready"] == 1
    assert values["moss_decode_tokens_per_second"] > 0


def test_a_worker_that_is_killed_comes_again(served: Served) -> None:
    pid = served.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    (worker,) = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    uid = served.client.say("before", max_new_tokens=3)["uid"]
    os.kill(int(worker), signal.SIGKILL)
    assert len(served.client.say("after", uid, max_new_tokens=3)["history"]) == 2


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"fastapi is not installed.*sh run.sh serve brings it"):
        CliRunner().invoke(serve.command, [], catch_exceptions=False)
