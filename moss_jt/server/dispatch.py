"""Who is next: requests wait here, fairly between users, until the engine has room for them.

The engine is given as many requests as it answers at once and no more, so that the order is decided
here: the user with the fewest running answers is next, and among equals the one who was served
longest ago. A request of a process that died is run again where nothing of it had been passed on.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Literal

from moss_jt.messages import Event, FinishedEvent, Request
from moss_jt.server.link import (
    Cancel,
    Failed,
    Fatal,
    Forget,
    FromWorker,
    Happened,
    Loading,
    LogLine,
    MakeEngine,
    ModelInfo,
    Ready,
    State,
    Stats,
    Submit,
)
from moss_jt.server.process import ModelProcess
from moss_jt.server.refusals import Refusal
from moss_jt.server.settings import ServerSettings

_log = logging.getLogger(__name__)
TRIES = 2  # a request that a process died with is given to one more, and no further


@dataclass(frozen=True)
class Again:
    """The request begins anew in another process: forget what came so far."""


@dataclass(eq=False)
class Ticket:
    """A request on its way.

    Attributes:
        user: whose turn it takes.
        passed_on: something of it has gone to the client, so that it cannot begin anew.
        ended: it was ended from here; what it has is all that comes.
    """

    number: int
    user: str
    request: Request
    most: int | None
    state: Literal["waiting", "running", "over"] = "waiting"
    passed_on: bool = False
    ended: bool = False
    tries: int = 0
    submitted: float = field(default_factory=time.monotonic)
    inbox: asyncio.Queue[Event | Again | Refusal] = field(default_factory=asyncio.Queue)
    expiry: asyncio.TimerHandle | None = None

    async def events(self) -> AsyncIterator[Event | Again]:
        """What happens, up to the FinishedEvent.

        Raises:
            Refusal: it could not be done.
        """
        while True:
            event = await self.inbox.get()
            if isinstance(event, Refusal):
                raise event
            yield event
            if isinstance(event, FinishedEvent):
                return


class Dispatcher:
    """Takes requests, gives tickets.

    Args:
        settings: how many may run and wait.
        make_engine: for the process of the model.

    Attributes:
        state: "loading" at the start and after a death; "failed" where the first load was refused.
        model: what is loaded, kept over a death.
        loading: what is being done, while it is.
        failure: why the model cannot be loaded.
        stats: the engine's last figures.
        on_happened: called with each pass; for those who count.
        on_change: called when the state changes.
    """

    def __init__(self, settings: ServerSettings, make_engine: MakeEngine) -> None:
        self._settings = settings
        self._process = ModelProcess(make_engine, self._on_message, self._on_death)
        self._numbers = itertools.count()
        self._waiting: OrderedDict[str, deque[Ticket]] = OrderedDict()  # by user, who was served longest ago first
        self._running: dict[int, Ticket] = {}
        self._draining = False
        self._ended = False
        self._seconds = 5.0  # of an answer, a running mean
        self.state: State = "loading"
        self.model: ModelInfo | None = None
        self.loading = Loading("", 0.0)
        self.failure = ""
        self.stats: Stats = {}
        self.on_happened: Callable[[Happened], None] = lambda _: None
        self.on_change: Callable[[], None] = lambda: None

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        """Requests that the engine has."""
        return len(self._running)

    @property
    def restarts(self) -> int:
        """How often the process of the model was started again."""
        return self._process.restarts

    @property
    def worker_pid(self) -> int | None:
        """Of the process of the model."""
        return self._process.pid

    def start(self) -> None:
        """Start the process of the model."""
        self._process.start()

    def stop(self) -> None:
        """End it."""
        self.state = "stopped"
        self._process.stop()

    def submit(
        self, user: str, request: Request, *, most: int | None = None, known: bool = True, continues: bool = False
    ) -> Ticket:
        """Take a request.

        Args:
            user: who shares the engine fairly with the others.
            request: what to answer.
            most: of this user's requests that may run at once; None for all.
            known: the user is one of several with keys, and may fill only a part of the queue.
            continues: it goes on with an answer that was begun: nobody of this user is before it, and it is taken also
                where the queue is full, or the server takes no more requests but lets answers finish.

        Raises:
            Refusal: 429, too many wait; 503, the server ends, or there is no model yet.
        """
        self._check_open(continues=continues)
        mine = len(self._waiting.get(user, ()))
        limit = self._most_waiting(known=known)
        if not continues and self._is_full(mine, limit):
            raise Refusal(
                429,
                f"{self.waiting} requests wait, {mine} of them yours; at most {self._settings.queue} and {limit} may. "
                "Come again later.",
                "queue_full",
                retry_after_s=self.wait_estimate_s(),
            )
        ticket = Ticket(next(self._numbers), user, request, most)
        ticket.expiry = asyncio.get_running_loop().call_later(self._settings.wait_s, self._expire, ticket)
        queue = self._waiting.setdefault(user, deque())
        if continues:
            queue.appendleft(ticket)
        else:
            queue.append(ticket)
        self._pump()
        return ticket

    def capacity(self, *, most: int | None, known: bool) -> int:
        """How many requests of one user can run and wait where nobody else asks; the arguments are those of submit."""
        running, waiting = self._settings.parallel, self._most_waiting(known=known)
        if most is None or most >= running:
            return running + waiting
        return most + max(1, waiting)  # while the engine has room, one waits whatever the queue holds

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants it any more; nothing happens to one that is over."""
        if ticket.state == "waiting":
            self._unqueue(ticket)
            self._close(ticket)
        elif ticket.state == "running":
            ticket.ended = True
            self._process.send(Cancel(ticket.number))  # it keeps its place until the engine has let go of it

    def forget(self, conversation: str) -> None:
        """Give back the cache of a conversation."""
        self._process.send(Forget(conversation))

    def drain(self) -> None:
        """Take no more requests."""
        self._draining = True

    def end_all(self) -> None:
        """End what runs with what it has, and refuse what waits."""
        self._draining = self._ended = True
        for ticket in [t for tickets in self._waiting.values() for t in tickets]:
            self._unqueue(ticket)
            self._refuse(ticket, _ending())
        for ticket in self._running.values():
            ticket.ended = True
            self._process.send(Cancel(ticket.number))

    def wait_estimate_s(self) -> float:
        """Seconds until a new request would run, roughly."""
        return min(60.0, 1.0 + self._seconds * self.waiting / self._settings.parallel)

    def _check_open(self, *, continues: bool) -> None:
        if self._ended or (self._draining and not continues):
            raise _ending()
        if self.model is None or self.state == "failed":
            raise Refusal(503, "the model is still being loaded. Come again later.", "loading", retry_after_s=5)

    def _most_waiting(self, *, known: bool) -> int:
        """Requests of one user that may wait."""
        return min(self._settings.queue, self._settings.queue_per_user) if known else self._settings.queue

    def _is_full(self, mine: int, limit: int) -> bool:
        free = self.state == "ready" and len(self._running) < self._settings.parallel and not self.waiting
        return not free and (self.waiting >= self._settings.queue or mine >= limit)

    def _pump(self) -> None:
        """Give the engine what it has room for."""
        while self.state == "ready" and len(self._running) < self._settings.parallel:
            ticket = self._next()
            if ticket is None:
                return
            ticket.state = "running"
            ticket.tries += 1
            ticket.submitted = time.monotonic()
            if ticket.expiry is not None:
                ticket.expiry.cancel()
            self._running[ticket.number] = ticket
            self._process.send(Submit(ticket.number, ticket.request))

    def _next(self) -> Ticket | None:
        """Take the next one out of the queue."""
        counts = dict.fromkeys(self._waiting, 0)
        for ticket in self._running.values():
            if ticket.user in counts:
                counts[ticket.user] += 1
        allowed = [u for u, queue in self._waiting.items() if queue[0].most is None or counts[u] < queue[0].most]
        if not allowed:
            return None
        user = min(allowed, key=counts.__getitem__)  # the first of equals was served longest ago
        ticket = self._waiting[user].popleft()
        self._waiting.move_to_end(user)
        if not self._waiting[user]:
            del self._waiting[user]
        return ticket

    def _unqueue(self, ticket: Ticket) -> None:
        queue = self._waiting.get(ticket.user)
        if queue is not None and ticket in queue:
            queue.remove(ticket)
            if not queue:
                del self._waiting[ticket.user]

    def _expire(self, ticket: Ticket) -> None:
        """A request has waited too long."""
        if ticket.state == "waiting":
            self._unqueue(ticket)
            limit = f"{self._settings.wait_s:g}"
            self._refuse(
                ticket,
                Refusal(
                    503,
                    f"the request waited {limit} s for its turn. Come again later.",
                    "waited_too_long",
                    retry_after_s=self.wait_estimate_s(),
                ),
            )

    def _refuse(self, ticket: Ticket, refusal: Refusal) -> None:
        self._close(ticket)
        ticket.inbox.put_nowait(refusal)

    def _close(self, ticket: Ticket) -> None:
        ticket.state = "over"
        self._running.pop(ticket.number, None)
        if ticket.expiry is not None:
            ticket.expiry.cancel()

    def _on_message(self, message: FromWorker) -> None:
        if isinstance(message, Happened):
            self._take_events(message)
        elif isinstance(message, Failed):
            ticket = self._running.get(message.number)
            if ticket is not None:
                status, code = (400, "invalid_value") if message.mine else (503, "model_error")
                self._refuse(ticket, Refusal(status, message.message, code, retry_after_s=None if message.mine else 5))
            self._pump()
        elif isinstance(message, LogLine):
            logging.getLogger(message.name).log(message.level, "%s", message.message)
        elif isinstance(message, Ready):
            self.model = message.model
            self._process.settled()
            self._become("ready")
            self._pump()
        elif isinstance(message, Loading):
            if message.task and message.task != self.loading.task:
                _log.info("%s", message.task)
            self.loading = message
        elif isinstance(message, Fatal):
            self.failure = message.message
            _log.error("the model cannot be loaded: %s", message.message)
            if self.model is None:
                self._process.stop()  # what never worked is not tried again
            self._become("failed")

    def _take_events(self, message: Happened) -> None:
        if message.stats is not None:
            self.stats = message.stats
        for number, event in message.events:
            ticket = self._running.get(number)
            if ticket is None:
                continue
            ticket.inbox.put_nowait(event)
            if isinstance(event, FinishedEvent):
                self._seconds += (time.monotonic() - ticket.submitted - self._seconds) / 8
                self._close(ticket)
        self.on_happened(message)
        self._pump()

    def _become(self, state: State) -> None:
        self.state = state
        self.on_change()

    def _on_death(self) -> None:
        """What ran is put back at the head of the queue, or told that it is lost."""
        if self.state != "failed" or self.model is not None:
            self._become("loading")
        for ticket in sorted(self._running.values(), key=lambda t: -t.number):
            self._running.pop(ticket.number)
            if ticket.passed_on or ticket.ended or ticket.tries >= TRIES:
                lost = "the process of the model ended while it answered; it is being started again. Ask again."
                self._refuse(ticket, Refusal(503, lost, "model_restarted", retry_after_s=5))
                continue
            while not ticket.inbox.empty():
                ticket.inbox.get_nowait()
            ticket.inbox.put_nowait(Again())
            ticket.state = "waiting"
            self._waiting.setdefault(ticket.user, deque()).appendleft(ticket)
            ticket.expiry = asyncio.get_running_loop().call_later(self._settings.wait_s, self._expire, ticket)


def _ending() -> Refusal:
    return Refusal(503, "the server is ending. Come again later.", "ending", retry_after_s=10)
