"""Who asks: by key, or anybody while there is none; and how much each may ask."""

from __future__ import annotations

import time
from dataclasses import dataclass

from moss_jt.server.answers import Asker
from moss_jt.server.database import Database
from moss_jt.server.keys import Key, count_usage, find_key, has_keys, tokens_today
from moss_jt.server.refusals import Refusal

NOBODY = ""  # the owner of conversations where there are no keys: their uid alone opens them


@dataclass(frozen=True)
class User:
    """Somebody who asks.

    Attributes:
        owner: whose conversations are theirs.
        key: None where there are no keys.
        address: of the client.
    """

    owner: str
    key: Key | None
    address: str

    def asker(self, *, streams: bool) -> Asker:
        """For the queue and the caches: users with keys share by key, others by address; a later key is another's."""
        if self.key is None:
            return Asker(f"at {self.address}", known=False, streams=streams)
        return Asker(f"key {self.owner} {self.key.created}", self.key.parallel, streams=streams)


class Users:
    """Tells users apart and holds them to their limits.

    Args:
        database: where the keys are.
        needs_keys: nobody gets in without one; else that is so as soon as there is one, and stays so.
    """

    def __init__(self, database: Database, *, needs_keys: bool) -> None:
        self._database = database
        self._needs_keys = needs_keys or database.now(has_keys)
        self._buckets: dict[str, tuple[float, float]] = {}  # owner -> (requests left, when)

    @property
    def needs_keys(self) -> bool:
        """Whether a key is asked for."""
        return self._needs_keys

    async def identify(self, authorization: str | None, address: str) -> User:
        """Tell who asks.

        Raises:
            Refusal: 401, a key is needed and this is none.
        """
        self._needs_keys = self._needs_keys or await self._database.run(has_keys)
        if not self._needs_keys:
            return User(NOBODY, None, address)
        scheme, _, secret = (authorization or "").partition(" ")
        key = await self._database.run(find_key, secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise Refusal(
                401, "a key of this server is needed: send the header Authorization: Bearer KEY.", "invalid_api_key"
            )
        return User(key.name, key, address)

    async def admit(self, user: User) -> None:
        """Count a request against the limits of its key.

        Raises:
            Refusal: 429, too many in a minute, or too many tokens today.
        """
        key = user.key
        if key is None:
            return
        if key.tokens_per_day is not None:
            used = await self._database.run(tokens_today, key.name)
            if used >= key.tokens_per_day:
                raise Refusal(
                    429,
                    f"{used} tokens were used today; this key has {key.tokens_per_day} a day (UTC).",
                    "tokens_per_day",
                    retry_after_s=86400 - time.time() % 86400,
                )
        if key.requests_per_minute is not None:
            self._take_one(key.name, key.requests_per_minute)

    async def charge(self, user: User, tokens: int) -> None:
        """Enter what a request used, also where it was broken off."""
        if user.key is not None and tokens:
            await self._database.run(count_usage, user.key, tokens)

    def _take_one(self, name: str, per_minute: int) -> None:
        now = time.monotonic()
        left, then = self._buckets.get(name, (float(per_minute), now))
        left = min(per_minute, left + (now - then) * per_minute / 60)
        if left < 1:
            self._buckets[name] = (left, now)
            raise Refusal(
                429,
                f"this key may ask {per_minute} times a minute. Come again later.",
                "requests_per_minute",
                retry_after_s=(1 - left) * 60 / per_minute,
            )
        self._buckets[name] = (left - 1, now)
