"""Which cache a prompt may continue: chats whose history comes with each request find the one that holds it.

A cache is only ever found by the user who filled it: how fast an answer comes must not tell what others asked.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

SHORTEST = 16  # tokens in common that are worth a look


@dataclass
class _Cache:
    user: str
    ids: tuple[int, ...]
    lent: bool = False


class WarmCaches:
    """The names under which the engine keeps what it has computed for requests without a conversation.

    Args:
        most: names that are remembered.
        forget: called with a name that is given up.
    """

    def __init__(self, most: int, forget: Callable[[str], None]) -> None:
        self._most = most
        self._forget = forget
        self._caches: OrderedDict[str, _Cache] = OrderedDict()
        self._numbers = itertools.count()

    def take(self, user: str, ids: tuple[int, ...]) -> str:
        """The name to compute a prompt under: that of the user's idle cache with most of it, else a new one."""
        best, length = "", SHORTEST - 1
        for name, cache in self._caches.items():
            if cache.user == user and not cache.lent and (common := _common(cache.ids, ids)) > length:
                best, length = name, common
        if not best:
            best = f"warm-{next(self._numbers)}"
            self._caches[best] = _Cache(user, ())
        self._caches[best].lent = True
        self._trim()
        return best

    def give_back(self, name: str, ids: tuple[int, ...]) -> None:
        """The request is over; its cache holds a beginning of these ids."""
        self._caches[name].ids = ids
        self._caches[name].lent = False
        self._caches.move_to_end(name)
        self._trim()

    def clear(self) -> None:
        """The process of the model has died: what was idle holds nothing any more."""
        for cache in self._caches.values():
            cache.ids = ()

    def _trim(self) -> None:
        """Give up the oldest idle ones beyond the limit."""
        idle = [name for name, cache in self._caches.items() if not cache.lent]
        for name in idle[: max(0, len(self._caches) - self._most)]:
            del self._caches[name]
            self._forget(name)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many leading ids two sequences share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
