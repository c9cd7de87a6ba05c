"""A question that is being asked, in a thread of its own: a page looks at it whenever it likes.

So the page stays free while a large model thinks for minutes, an answer goes on when its page is drawn anew, and it
can be stopped at any time.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import Any

from moss_jt.errors import MossError, ServerError
from moss_jt.web.client import (
    Answer,
    Delta,
    Finished,
    Results,
    ServerClient,
    Started,
    Thoughts,
    Turn,
    Wishes,
    unforeseen,
)

UNSEEN_S = 180.0  # browsers draw pages that lie behind others once a minute
STORED_S = 10.0
PAUSE_S = 0.05
NOT_FOUND = 404


@dataclass(frozen=True)
class Asked:
    """A question and what has come of it.

    Attributes:
        number: of the turn in its conversation, from 0.
        uid: of the conversation; None until a new one has begun.
        turn: the question, and as much of its answer as there is.
        begun: the model has begun; before that the question waits.
        over: nothing more will come.
        kept: the server has the turn; where it is over without, only the page still knows the question.
        tokens_per_s: 0 where it is not known.
        error: why there is no answer, "" unless so.
    """

    number: int
    uid: str | None
    turn: Turn
    begun: bool = False
    over: bool = False
    kept: bool = False
    tokens_per_s: float = 0.0
    error: str = ""


class Asking:
    """Asks a question; its thread ends with the answer, and ends the answer when nobody has looked at it for long.

    Args:
        client: of the server; it stays the caller's.
        uid: of the conversation, None for a new one.
        number: of the turn, from 0: as many as the conversation has.
        instead: the question takes the place of the last turn, whose number it has, once the server keeps it.
    """

    def __init__(
        self, client: ServerClient, text: str, *, uid: str | None, number: int, wishes: Wishes, instead: bool = False
    ) -> None:
        self._client = client
        replaces = number if instead and uid is not None else None
        self._answer: Answer = client.ask(text, uid=uid, wishes=wishes, replaces=replaces)
        self._lock = threading.Lock()
        self._asked = Asked(number, uid, Turn(text, ""))
        self._pieces: list[str] = []
        self._seen = time.monotonic()
        threading.Thread(target=self._run, name="moss-jt answer", daemon=True).start()

    def look(self) -> Asked:
        """What has come until now."""
        with self._lock:
            self._seen = time.monotonic()
            return replace(self._asked, turn=replace(self._asked.turn, answer="".join(self._pieces)))

    def stop(self) -> None:
        """End the answer; what has come of it is kept by the server."""
        self._answer.stop()

    def _run(self) -> None:
        try:
            with self._answer as events:
                for event in events:
                    if isinstance(event, Finished):
                        self._finish(event)
                    else:
                        self._note(event)
        except MossError as error:
            self._change(over=True, error=str(error))
        except Exception as error:  # a page that looks here would wait for ever
            self._change(over=True, error=str(unforeseen(error)))

    def _note(self, event: Started | Thoughts | Results | Delta) -> None:
        turn = self._asked.turn
        if isinstance(event, Delta):
            with self._lock:
                self._pieces.append(event.text)
        elif isinstance(event, Started):
            self._change(uid=event.uid, begun=True)
        elif isinstance(event, Thoughts):
            self._change(turn=replace(turn, thoughts=event.text, commands=event.commands))
        else:
            found = replace(turn, results=event.text, sources=event.sources, pictures=event.pictures)
            self._change(turn=found)
        if time.monotonic() - self._seen > UNSEEN_S:
            self.stop()

    def _finish(self, event: Finished) -> None:
        kept = event.reason != "cancelled" or (bool(event.answer) and self._is_stored(event.answer))
        turn = replace(self._asked.turn, reason=event.reason)
        self._change(turn=turn, over=True, kept=kept, tokens_per_s=event.tokens_per_s)

    def _is_stored(self, told: str) -> bool:
        """Wait for the server to notice that an answer was stopped, and to keep what had come."""
        deadline = time.monotonic() + STORED_S
        while self._asked.uid is not None and time.monotonic() < deadline:
            try:
                turns = self._client.conversation(self._asked.uid).turns[self._asked.number :]
                if turns and turns[0].human == self._asked.turn.human and turns[0].answer.startswith(told):
                    return True  # and not the one whose place it takes
            except ServerError as error:
                if error.status != NOT_FOUND:  # a new conversation begins with its first turn
                    raise
            time.sleep(PAUSE_S)
        return False

    def _change(self, **values: Any) -> None:
        with self._lock:
            self._asked = replace(self._asked, **values)
