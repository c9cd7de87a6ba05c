"""Service: what the routes share. No HTTP here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from moss_jt.errors import MossError
from moss_jt.server.calls import ToolRunner
from moss_jt.server.database import Database
from moss_jt.server.dispatch import Dispatcher
from moss_jt.server.link import MakeEngine, ModelInfo
from moss_jt.server.metrics import Metrics
from moss_jt.server.refusals import Refusal
from moss_jt.server.settings import ServerSettings
from moss_jt.server.tool_threads import ToolThreads
from moss_jt.server.users import Users
from moss_jt.server.warm import WarmCaches
from moss_jt.template import Template, choose_template

if TYPE_CHECKING:
    from moss_jt.tokenizer import Tokenizer

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Speaker:
    """A loaded model, as far as text is concerned.

    Attributes:
        name: as clients are told it.
        plain: how a conversation without tools is written.
    """

    name: str
    model: ModelInfo
    tokenizer: Tokenizer
    plain: Template

    @property
    def context_size(self) -> int:
        """Tokens of a prompt and its answer together."""
        return self.model.context_size

    def template(self, *, tools: bool) -> Template:
        """How a conversation is written."""
        return Template("fields") if tools else self.plain


class Turnstiles:
    """One at a time for each name, and not too many who wait.

    Args:
        most: that may wait at one.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._locks: dict[str, tuple[asyncio.Lock, list[int]]] = {}

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[None]:
        """Wait for one's turn and have it.

        Raises:
            Refusal: 429, too many wait there.
        """
        lock, count = self._locks.setdefault(name, (asyncio.Lock(), [0]))
        if count[0] > self._most:
            raise Refusal(429, f"{count[0]} requests wait at this conversation.", "queue_full", retry_after_s=5)
        count[0] += 1
        try:
            async with lock:
                yield
        finally:
            count[0] -= 1
            if not count[0]:
                self._locks.pop(name, None)


class Service:
    """Everything behind the routes.

    Args:
        settings: how to serve.
        database: keys and conversations.
        make_engine: for the process of the model.
        needs_keys: see Users.
        tools: that run here; None for none.

    Attributes:
        on_failure: called with the reason where the model cannot be loaded at all.
    """

    def __init__(
        self,
        settings: ServerSettings,
        database: Database,
        make_engine: MakeEngine,
        *,
        needs_keys: bool = False,
        tools: ToolRunner | None = None,
    ) -> None:
        self.settings = settings
        self.database = database
        self.tools = None if tools is None else ToolThreads(tools, settings.parallel)
        self.users = Users(database, needs_keys=needs_keys)
        self.dispatcher = Dispatcher(settings, make_engine)
        self.warm = WarmCaches(settings.parallel, self.dispatcher.forget)
        self.turnstiles = Turnstiles(settings.queue_per_user)
        self.metrics = Metrics(self.dispatcher)
        self.on_failure: Callable[[str], None] = lambda _: None
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._speaker: Speaker | None = None
        self._reading: asyncio.Task[None] | None = None
        self.dispatcher.on_change = self._changed

    @property
    def ready(self) -> bool:
        """Whether a request would be answered now."""
        return self.dispatcher.state == "ready" and self._speaker is not None

    @property
    def speaker(self) -> Speaker:
        """The model.

        Raises:
            Refusal: 503, it is still being loaded.
        """
        if self._speaker is None:
            raise Refusal(503, "the model is still being loaded. Come again later.", "loading", retry_after_s=5)
        return self._speaker

    async def encode(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do something with texts in the thread of the tokenizer."""
        return await asyncio.get_running_loop().run_in_executor(self._encoder, lambda: work(*args, **kwargs))

    def start(self) -> None:
        """Start the process of the model."""
        self.dispatcher.start()

    def stop(self) -> None:
        """End it, and close the database."""
        self.dispatcher.stop()
        self._encoder.shutdown()
        self.database.close()

    def _changed(self) -> None:
        if self.dispatcher.state == "ready":
            if self._speaker is None:
                self._reading = asyncio.get_running_loop().create_task(self._read_tokenizer())
        elif self.dispatcher.state == "failed" and self._speaker is None:
            self.on_failure(self.dispatcher.failure)
        else:
            self.warm.clear()

    async def _read_tokenizer(self) -> None:
        from moss_jt.tokenizer import load_tokenizer

        model = self.dispatcher.model
        assert model is not None, "a model that is ready is known"
        try:
            tokenizer = await self.encode(load_tokenizer, model.folder)
            plain = choose_template("auto", model.config, tools=False)
            plain.stop_ids(tokenizer)  # a tokenizer without end markers cannot hold a conversation
        except MossError as error:
            self.on_failure(str(error))
            return
        name = self.settings.name or model.folder.name
        self._speaker = Speaker(name, model, tokenizer, plain)
        _log.info("%s is ready: context %d tokens, on %s.", name, model.context_size, model.device)
