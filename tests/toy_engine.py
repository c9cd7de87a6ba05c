"""An engine for tests of the server: many requests at once, answers that follow from their own prompt.

It answers "<|Human|>: X" with "you said X". Words in X make it behave otherwise: "@long" has an answer without end,
"@die" kills its process once the answer has begun, "@die-first" before anything is said, "@bad" is an error of the
request, "@crash" a mistake in the engine; "@search" and "@draw" in a turn with tools call Search and Text2Image with
the rest of X. For those who look at a page: after "@hold" the answer never ends and nothing more comes, "@count" is
answered with a number that is another each time, "@settings" with how the answer is chosen, "@results" with the field
of that name.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from moss_jt.config import MossConfig
from moss_jt.errors import ConfigError, KernelError
from moss_jt.messages import Event, FinishedEvent, PrefillEvent, Reason, Request, TokenEvent, TokenScores
from moss_jt.progress import Progress
from moss_jt.server.link import ModelInfo
from moss_jt.tokenizer import Tokenizer, load_tokenizer

TOKENIZER = Path(__file__).parent / "golden" / "tokenizer" / "c-addedtoken-specials"
CALLS = {"@search": "Search", "@draw": "Text2Image"}
SETTINGS = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed")
PACE_S = 0.002  # of a step with an answer without end: as a network would take


@dataclass
class _Task:
    request: Request
    script: list[int]
    reused: int
    human: str
    made: list[int] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    cancelled: bool = False


class ToyEngine:
    """Speaks by rule.

    Args:
        context: tokens of a prompt and its answer.
    """

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.tasks: dict[int, _Task] = {}
        self.kept: dict[str, tuple[int, ...]] = {}
        self.number = 0

    @property
    def busy(self) -> bool:
        return bool(self.tasks)

    def submit(self, request: Request) -> int:
        if len(request.ids) > self.context:
            raise ConfigError("the prompt is too long for the toy.")
        human = self._last_said(request.ids)
        kept = self.kept.get(request.conversation or "", ())
        same = next((i for i, (a, b) in enumerate(zip(kept, request.ids, strict=False)) if a != b), len(kept))
        reused = min(same, len(request.ids) - 1)
        self.number += 1
        self.tasks[self.number] = _Task(request, self._script(request, human), reused, human)
        return self.number

    def _last_said(self, ids: tuple[int, ...]) -> str:
        """What stands between the last tag of a user and its end marker, found by ids as the model would."""
        end = self.tokenizer.marker("<eoh>")
        if end not in ids:
            return ""
        stop = len(ids) - 1 - ids[::-1].index(end)
        markers = set(self.tokenizer.markers.values())
        start = next((at + 1 for at in range(stop - 1, -1, -1) if ids[at] in markers), 0)
        return self.tokenizer.decode(ids[start:stop]).partition("<|Human|>: ")[2]

    def _script(self, request: Request, human: str) -> list[int]:
        encode, marker = self.tokenizer.encode, self.tokenizer.marker
        if self._thinks(request):
            word = next((word for word in CALLS if word in human), None)
            calls = f'{CALLS[word]}("{human.replace(word, "").strip()}")' if word else "None"
            return [
                *encode(" I think"),
                marker("<eot>"),
                *encode(f"\n<|Commands|>: {calls}", inside=True),
                marker("<eoc>"),
            ]
        results = self.tokenizer.decode(request.ids).rpartition("<|Results|>:")[2].partition("<eor>")[0]
        found = f" and found {results.strip()}" if "=>" in results else ""
        words = f" you said {human}{found}" if human else " and so on"
        if "@count" in human:
            words = f" this is number {self.number}"
        if "@results" in human:
            words = f" {results!r}"
        if "@settings" in human:
            words = " " + ", ".join(f"{name} {getattr(request.config, name)}" for name in SETTINGS)
        return [*encode(words), marker("<eom>")]

    def _thinks(self, request: Request) -> bool:
        """Whether this is the first pass of a turn with tools."""
        return self.tokenizer.marker("<eoc>") in request.config.stop_ids

    def cancel(self, request: int) -> None:
        if request in self.tasks:
            self.tasks[request].cancelled = True

    def forget(self, conversation: str) -> None:
        self.kept.pop(conversation, None)

    def stats(self) -> dict[str, float | int | str]:
        return {"resident_bytes": 1 << 20, "streamed_bytes": 2 << 20, "cached_bytes": 3 << 20, "cached_tokens": 7}

    def step(self) -> list[Event]:
        events: list[Event] = []
        for number, task in list(self.tasks.items()):
            if "@bad" in task.human and not task.cancelled:
                raise KernelError("the toy was asked to fail.", request=number)
            if "@die-first" in task.human or ("@die" in task.human and len(task.made) > 3):
                os.kill(os.getpid(), signal.SIGKILL)
            if "@crash" in task.human:
                raise RuntimeError("the toy has a mistake")
            if not task.made:
                total = len(task.request.ids)
                events.append(PrefillEvent(number, total, total, task.reused))
            events += self._advance(number, task)
        if any("@long" in task.human or "@hold" in task.human for task in self.tasks.values()):
            time.sleep(PACE_S)
        return events

    def _advance(self, number: int, task: _Task) -> list[Event]:
        if task.cancelled:
            return [self._finish(number, task, "cancelled")]
        at = len(task.made)
        if "@hold" in task.human and at == len(task.script) - 1 and not self._thinks(task.request):
            return []
        endless = "@long" in task.human and at >= len(task.script) - 1
        token = task.script[at % (len(task.script) - 1)] if endless else task.script[min(at, len(task.script) - 1)]
        count = task.request.top_logprobs
        scores = None if count is None else TokenScores(-0.5, tuple((token + i, -0.5 - i) for i in range(count)))
        task.made.append(token)
        events: list[Event] = [TokenEvent(number, token, -0.25, scores)]
        reason = self._reason(task)
        return events if reason is None else [*events, self._finish(number, task, reason)]

    def _reason(self, task: _Task) -> Reason | None:
        config = task.request.config
        text = self.tokenizer.decode(task.made)
        if task.made[-1] in config.stop_ids or any(stop in text for stop in config.stop_strings):
            return "stop"
        if config.max_time is not None and time.monotonic() - task.began > config.max_time:
            return "time"
        full = len(task.made) >= config.max_new_tokens or len(task.request.ids) + len(task.made) >= self.context
        return "length" if full else None

    def _finish(self, number: int, task: _Task, reason: Reason) -> FinishedEvent:
        if task.request.conversation is not None:
            self.kept[task.request.conversation] = (*task.request.ids, *task.made)
        del self.tasks[number]
        return FinishedEvent(number, reason, len(task.request.ids), task.reused, len(task.made), 0.5, 1.0)


@dataclass(frozen=True)
class MakeToy:
    """Makes the toy in the process of the worker."""

    context: int = 4096

    def __call__(self, progress: Progress) -> tuple[ToyEngine, ModelInfo]:
        tokenizer = load_tokenizer(TOKENIZER)
        config = MossConfig(vocab_size=1043, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, template="readme")
        progress.begin("Loading", 1, "B")
        return ToyEngine(tokenizer, self.context), ModelInfo(TOKENIZER, config, self.context, "cpu", "fast")
