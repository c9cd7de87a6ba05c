"""An engine that speaks a script: the tokens are given, the bookkeeping is as in moss_jt.engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from moss_jt.messages import Event, FinishedEvent, PrefillEvent, Reason, Request, TokenEvent


class FakeEngine:
    """Answers each request with the next script.

    Attributes:
        requests: everything submitted.
        computed: per request, how many prompt tokens were not reused.
        interrupts: {(request, token number): raise KeyboardInterrupt in the step before that token}.
        cached: conversation -> tokens whose keys and values are kept.
    """

    def __init__(self, scripts: Iterable[Iterable[int]] = (), *, context_size: int = 2048, last: int = 0) -> None:
        self.scripts = deque(tuple(script) for script in scripts)
        self.context_size = context_size
        self.last = last  # given when a script has run out: an end marker
        self.requests: list[Request] = []
        self.computed: list[int] = []
        self.interrupts: set[tuple[int, int]] = set()
        self.cancelled: list[int] = []
        self.forgotten: list[str] = []
        self.cached: dict[str, list[int]] = {}
        self._script: deque[int] = deque()
        self._tokens: list[int] | None = None

    def submit(self, request: Request) -> int:
        """Take a request; one at a time."""
        assert self._tokens is None, "the request before is still running"
        assert len(request.ids) <= self.context_size
        self.requests.append(request)
        self._script = deque(self.scripts.popleft() if self.scripts else ())
        self._tokens = list(request.ids)
        kept = self.cached.get(request.conversation or "", [])
        common = next((i for i, (a, b) in enumerate(zip(kept, request.ids, strict=False)) if a != b), len(kept))
        self.computed.append(len(request.ids) - min(common, len(request.ids) - 1))
        return len(self.requests) - 1

    def step(self) -> list[Event]:
        """Give the next token of the running request."""
        if self._tokens is None:
            return []
        number, request = len(self.requests) - 1, self.requests[-1]
        made = len(self._tokens) - len(request.ids)
        if (number, made) in self.interrupts:
            self.interrupts.discard((number, made))
            raise KeyboardInterrupt
        events: list[Event] = []
        if not made:
            total = len(request.ids)
            events.append(PrefillEvent(number, total, total, total - self.computed[-1]))
        token = self._script.popleft() if self._script else self.last
        self._tokens.append(token)
        events.append(TokenEvent(number, token, -1.0))
        reason = self._reason(request, token)
        if reason is not None:
            events.append(self._finish(reason))
        return events

    def cancel(self, request: int) -> None:
        """End a request; what was computed is kept."""
        self.cancelled.append(request)
        if self._tokens is not None:
            self._finish("cancelled")

    def forget(self, conversation: str) -> None:
        """Drop what is kept."""
        self.forgotten.append(conversation)
        self.cached.pop(conversation, None)

    def stats(self) -> dict[str, float | int | str]:
        """As the real one, in part."""
        return {"device": "cpu", "compute": "fast", "cached_bytes": 1 << 20}

    def _reason(self, request: Request, token: int) -> Reason | None:
        assert self._tokens is not None
        if token in request.config.stop_ids:
            return "stop"
        made = len(self._tokens) - len(request.ids)
        full = made >= request.config.max_new_tokens or len(self._tokens) >= self.context_size
        return "length" if full else None

    def _finish(self, reason: Reason) -> FinishedEvent:
        assert self._tokens is not None
        number, request = len(self.requests) - 1, self.requests[-1]
        made = len(self._tokens) - len(request.ids)
        if request.conversation is not None:
            self.cached[request.conversation] = self._tokens[:-1] if made else self._tokens
        self._tokens = None
        reused = len(request.ids) - self.computed[-1]
        return FinishedEvent(number, reason, len(request.ids), reused, made, 0.5, 1.0)
