"""A question that is being asked, in a thread of its own: a page looks at it whenever it likes.

So the page stays free while a large model thinks for minutes, an answer goes on when its page is drawn anew, and it
can be stopped at any time.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace

from moss_jt.errors import MossError
from moss_jt.web.client import Answer, Delta, Finished, Results, ServerClient, Started, Thoughts, Turn, Wishes

UNSEEN_S = 180.0  # browsers draw pages behind others once a minute


@dataclass(frozen=True)
class Asked:
    """A question and what has come of it.

    Attributes:
        uid: of the conversation; None until a new one has begun.
        turn: the question, and as much of its answer as there is.
        begun: the model has begun, it does not only wait.
        finished: the end, None before it.
        error: why there is no answer, "" unless so; the server then has nothing of this turn.
    """

    uid: str | None
    turn: Turn
    begun: bool = False
    finished: Finished | None = None
    error: str = ""

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.finished is not None or bool(self.error)


class Asking:
    """Asks a question; the thread ends with the answer, or when nobody has looked at it for long.

    Args:
        client: of the server; it stays the caller's.
        uid: of the conversation, None for a new one.
        instead_of: the number of the last turn, from 0, that the question replaces; None where it is one more.
    """

    def __init__(
        self, client: ServerClient, text: str, *, uid: str | None, wishes: Wishes, instead_of: int | None = None
    ) -> None:
        self._client = client
        self._instead_of = instead_of
        self._answer: Answer = client.ask(text, uid=uid, wishes=wishes)
        self._lock = threading.Lock()
        self._asked = Asked(uid, Turn(text, ""))
        self._pieces: list[str] = []
        self._seen = time.monotonic()
        threading.Thread(target=self._run, name="moss-jt answer", daemon=True).start()

    def look(self) -> Asked:
        """What has come until now."""
        with self._lock:
            self._seen = time.monotonic()
            return replace(self._asked, turn=replace(self._asked.turn, answer="".join(self._pieces)))

    def stop(self) -> None:
        """End the answer; what has come is kept by the server."""
        self._answer.stop()

    def _run(self) -> None:
        try:
            if self._instead_of is not None and self._asked.uid is not None:
                self._client.take_back(self._asked.uid, number=self._instead_of)
            with self._answer as events:
                for event in events:
                    self._note(event)
        except MossError as error:
            with self._lock:
                self._asked = replace(self._asked, error=str(error))

    def _note(self, event: Started | Thoughts | Results | Delta | Finished) -> None:
        with self._lock:
            asked, turn = self._asked, self._asked.turn
            if isinstance(event, Delta):
                self._pieces.append(event.text)
            elif isinstance(event, Started):
                self._asked = replace(asked, uid=event.uid, begun=True)
            elif isinstance(event, Thoughts):
                self._asked = replace(asked, turn=replace(turn, thoughts=event.text, commands=event.commands))
            elif isinstance(event, Results):
                found = replace(turn, results=event.text, sources=event.sources, pictures=event.pictures)
                self._asked = replace(asked, turn=found)
            else:
                self._asked = replace(asked, uid=event.uid, turn=replace(turn, reason=event.reason), finished=event)
            unseen_s = time.monotonic() - self._seen
        if unseen_s > UNSEEN_S and not isinstance(event, Finished):
            self.stop()
