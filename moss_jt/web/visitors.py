"""Who looks at the main page: by which key they ask the server, and which answer they wait for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from moss_jt.errors import ServerError
from moss_jt.web.client import Answer, ServerClient


@dataclass(frozen=True)
class Visitor:
    """Somebody who looks at the page, in one tab of a browser.

    Attributes:
        client: how they ask the server.
        session: of the tab.
        answers: what all tabs wait for, by session.
    """

    client: ServerClient
    session: str
    answers: dict[str, Answer]

    @property
    def waits(self) -> bool:
        """Whether an answer comes to them."""
        return self.session in self.answers

    def begin(self, answer: Answer) -> Answer:
        """An answer comes to them."""
        self.answers[self.session] = answer
        return answer

    def end(self) -> None:
        """It has come, or nobody reads it any more."""
        answer = self.answers.pop(self.session, None)
        if answer is not None:
            answer.close()

    def stop(self) -> None:
        """End what comes to them; who reads it is told at once."""
        answer = self.answers.get(self.session)
        if answer is not None:
            answer.stop()


class Visitors:
    """Those who look at a page.

    Args:
        url: of the server.
        key: that all of them use; None where the server has no keys, or each logs in with their own.

    Attributes:
        on_replaced: called with the name of a key before another of this name counts: who came in by the old one, which
            was removed, must come in again.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self._url = url
        self._common = ServerClient(url, key)
        self._own: dict[str, tuple[str, ServerClient]] = {}  # name of a key -> the key, and who logged in with it
        self._answers: dict[str, Answer] = {}
        self.on_replaced: Callable[[str], None] = lambda _: None

    def login(self, name: str, key: str) -> bool:
        """Let somebody in who has a key of the server and knows its name."""
        key = key.strip()
        with contextlib.ExitStack() as stack:
            try:
                client = stack.enter_context(ServerClient(self._url, key))
                known = client.figures().user
            except (ServerError, UnicodeEncodeError):  # a key is plain letters
                return False
            if not known or known != name.strip():
                return False
            before = self._own.get(known)
            if before is not None and before[0] == key:
                return True
            stack.pop_all()  # it stays open
        if before is not None:
            self.on_replaced(known)
        self._own[known] = (key, client)
        if before is not None:
            before[1].close()
        return True

    def visitor(self, name: str | None, session: str) -> Visitor:
        """One of them, by name where they logged in."""
        return Visitor(self._common if name is None else self._own[name][1], session, self._answers)

    def close(self) -> None:
        """End all answers and connections, when the page ends."""
        for answer in list(self._answers.values()):
            answer.stop()
        for client in (self._common, *(client for _, client in self._own.values())):
            client.close()
