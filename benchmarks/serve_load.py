"""Many clients at once on a server: is every answer its own, are there errors, how long between tokens, does memory grow.

    python benchmarks/serve_load.py [--model DIR] [--clients 64] [--seconds 600] [--save]

Each client talks in a conversation of its own over MOSS's API, and now and then over OpenAI's chat (streamed) and
completions. Its history must hold its own texts and its own answers and nobody else's, after each turn and at the
end; and answers to a seed are asked again alone at the end and must be the same. A 429 is no error: the client
waits as it is told. Without --model it is moss-tiny. Exit code 1 where an answer was wrong or lost, where
there was an error, or where memory grew by more than 5 % over the second half. One JSON line comes last.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving import Serving

from moss_jt.record import keep

CHAT = "/v1/chat/completions"
USERS = 16
GROWTH = 1.05
ALONE = 24  # answers that are asked again at the end


@dataclass
class Tally:
    """What all clients found."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    answers: dict[str, int] = field(default_factory=lambda: {"moss": 0, "chat": 0, "completions": 0})
    tokens: int = 0
    refused: int = 0
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    seeded: list[tuple[dict[str, Any], str]] = field(default_factory=list)


class Client(threading.Thread):
    """One who talks until the time is over."""

    def __init__(self, number: int, serving: Serving, tally: Tally, until: float) -> None:
        super().__init__()
        self.number = number
        self.user = number % USERS
        self.serving, self.tally, self.until = serving, tally, until
        self.random = random.Random(number)
        self.uid: str | None = None
        self.history: list[list[str]] = []

    def run(self) -> None:
        """Talk; whatever goes wrong is an error of the run."""
        turn = 0
        while time.monotonic() < self.until:
            turn += 1
            try:
                self.random.choice([self.moss, self.moss, self.chat, self.completions])(turn)
            except (OSError, ValueError, KeyError) as error:
                self.fail(f"client {self.number}: {error!r}")

    def fail(self, words: str) -> None:
        """Note an error."""
        with self.tally.lock:
            self.tally.errors.append(words[:300])

    def text(self, turn: int) -> str:
        """Words that only this client says."""
        return f"client {self.number} says {turn}: {self.random.getrandbits(40):x}"

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Ask; wait where told so; None where it is an error, which is noted."""
        while True:
            with self.serving.open("POST", path, body, self.user) as reply:
                answer = json.loads(reply.read())
                if reply.status == 200:
                    return answer
                if not self.told_to_wait(reply.status, reply.getheader("Retry-After")):
                    self.fail(f"{path}: {reply.status} {answer}")
                    return None

    def told_to_wait(self, status: int, pause: str | None) -> bool:
        """Whether it was a 429; waits then."""
        if status != 429:
            return False
        with self.tally.lock:
            self.tally.refused += 1
        time.sleep(min(float(pause or 1), max(0.0, self.until - time.monotonic())))
        return True

    def moss(self, turn: int) -> None:
        """A turn of the conversation."""
        if len(self.history) > 20:  # take a new one
            self.uid, self.history = None, []
        prompt = self.text(turn)
        body = {"prompt": prompt, "max_new_tokens": 16, **({"uid": self.uid} if self.uid else {})}
        answer = self.post("/", body)
        if answer is None:
            return
        expected = [*self.history, [prompt, answer["response"]]]
        if answer["history"] != expected or (self.uid is not None and answer["uid"] != self.uid):
            with self.tally.lock:
                self.tally.foreign.append(f"client {self.number}: {answer['history'][-2:]} for {expected[-2:]}"[:400])
        self.uid, self.history = answer["uid"], expected
        self.count("moss", 16)

    def chat(self, turn: int) -> None:
        """A streamed answer, timed token by token."""
        message = {"role": "user", "content": self.text(turn)}
        body = {"messages": [message], "max_tokens": 24, "seed": self.random.getrandbits(31)}
        began, last, text, count = time.monotonic(), 0.0, "", 0
        with self.serving.open("POST", CHAT, {**body, "stream": True}, self.user) as reply:
            if reply.status != 200:
                if not self.told_to_wait(reply.status, reply.getheader("Retry-After")):
                    self.fail(f"{CHAT}: {reply.status} {reply.read()!r}")
                return
            for line in reply:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    self.fail(str(event))
                    return
                piece = event["choices"][0]["delta"].get("content")
                if not piece:
                    continue
                now = time.monotonic()
                with self.tally.lock:
                    (self.tally.gaps if last else self.tally.firsts).append(now - (last or began))
                text, last, count = text + piece, now, count + 1
        self.count("chat", count)
        with self.tally.lock:
            self.tally.seeded.append((body, text))

    def completions(self, turn: int) -> None:
        """A continuation in one piece."""
        answer = self.post("/v1/completions", {"prompt": self.text(turn), "max_tokens": 16})
        if answer is not None:
            self.count("completions", answer["usage"]["completion_tokens"])

    def count(self, api: str, tokens: int) -> None:
        """Note an answer."""
        with self.tally.lock:
            self.tally.answers[api] += 1
            self.tally.tokens += tokens


def check_at_the_end(serving: Serving, clients: list[Client], tally: Tally) -> None:
    """Every history as its client knows it, and seeded answers once more, alone."""
    for client in clients:
        if client.uid is None:
            continue
        _, found = serving.ask("GET", f"/v1/conversations/{client.uid}", None, client.user)
        if [[turn["human"], turn["answer"]] for turn in found["turns"]] != client.history:
            tally.foreign.append(f"client {client.number}: the history at the end is not its own")
        status, _ = serving.ask("GET", f"/v1/conversations/{client.uid}", None, (client.user + 1) % USERS)
        if status != 404:
            tally.foreign.append(f"client {client.number}: another could read the conversation")
    for body, text in random.Random(0).sample(tally.seeded, min(ALONE, len(tally.seeded))):
        _, answer = serving.ask("POST", CHAT, body, 0)
        if answer["choices"][0]["message"]["content"] != text:
            tally.foreign.append(f"{body['messages']}: {text!r} among others, alone {answer['choices'][0]['message']}")


def watch(serving: Serving, until: float) -> list[dict[str, int]]:
    """Memory, once a second."""
    found = []
    while time.monotonic() < until:
        found.append(serving.memory())
        time.sleep(1)
    return found


def percentile(values: list[float], share: float) -> float:
    """The value below which a share of all lies."""
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 4) if values else 0.0


def growth(samples: list[dict[str, int]], part: str) -> float:
    """Memory over the last quarter of the time against that over the third quarter before it ends: of the second."""
    values = [sample[part] for sample in samples]
    quarter = max(1, len(values) // 4)
    middle = statistics.median(values[quarter * 2 : quarter * 3] or values)
    return round(statistics.median(values[-quarter:]) / middle, 4)


def main() -> int:
    """Load a server, then print the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder or name; else moss-tiny")
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--save", action="store_true", help="keep the line under benchmarks/results/")
    chosen = parser.parse_args()
    options = ["--memory", chosen.memory, "--parallel", str(chosen.parallel)]
    options += ["--model", chosen.model] if chosen.model else []
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder, Serving(Path(folder), USERS, options) as serving:
        began = time.monotonic()
        clients = [Client(number, serving, tally, began + chosen.seconds) for number in range(chosen.clients)]
        for client in clients:
            client.start()
        samples = watch(serving, began + chosen.seconds)
        for client in clients:
            client.join()
        seconds = time.monotonic() - began
        check_at_the_end(serving, clients, tally)
    grown = {part: growth(samples, part) for part in ("server", "model")}
    results = {
        "model": chosen.model or "moss-tiny",
        "clients": chosen.clients,
        "seconds": round(seconds, 1),
        "answers": tally.answers,
        "tokens_per_s": round(tally.tokens / seconds, 1),
        "refused_429": tally.refused,
        "errors": len(tally.errors),
        "foreign": len(tally.foreign),
        "alone_again": min(ALONE, len(tally.seeded)),
        "first_token_s": {"p50": percentile(tally.firsts, 0.5), "p95": percentile(tally.firsts, 0.95)},
        "between_tokens_s": {"p50": percentile(tally.gaps, 0.5), "p95": percentile(tally.gaps, 0.95)},
        "memory_mib": {part: samples[-1][part] >> 20 for part in grown},
        "memory_growth": grown,
    }
    for words in [*tally.errors[:5], *tally.foreign[:5]]:
        print(words, file=sys.stderr)
    print(keep("serve_load", results, save=chosen.save))
    return int(bool(tally.errors or tally.foreign or max(grown.values()) > GROWTH))


if __name__ == "__main__":
    sys.exit(main())
