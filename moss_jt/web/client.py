"""ServerClient: a server of moss-jt, asked over HTTP; what it tells, as plain values.

    with ServerClient("http://127.0.0.1:19324") as client:
        for event in client.ask("Hello", uid=None, wishes=Wishes()):
            ...                                     # Started, Thoughts, Results, Delta, and Finished at the end

One client may be used by many threads at once; an Answer by one, but for `stop`, which any may call.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from moss_jt.config import GenerationConfig
from moss_jt.errors import ServerError

_log = logging.getLogger(__name__)
CONNECT_S = 10.0
SHORT_S = 60.0  # for what needs no model
SILENCE_S = 900.0  # before an answer begins it may wait in a queue; then something comes at least every 15 s


@dataclass(frozen=True)
class Wishes:
    """How an answer is chosen; without any, MOSS's own values. `Figures.wishes` are those of the model.

    Attributes:
        top_k: 0 keeps all.
        seed: None draws one.
    """

    temperature: float = GenerationConfig.temperature
    top_p: float = GenerationConfig.top_p
    top_k: int = GenerationConfig.top_k
    repetition_penalty: float = GenerationConfig.repetition_penalty
    max_new_tokens: int = GenerationConfig.max_new_tokens
    seed: int | None = None


@dataclass(frozen=True)
class Source:
    """What a number in an answer, `<sup><|n|></sup>`, points to; `url` is "" if it is nowhere."""

    number: int
    title: str
    url: str


@dataclass(frozen=True)
class Picture:
    """A picture that was drawn: its name, for `ServerClient.picture`, and what is to be known about it."""

    name: str
    note: str


@dataclass(frozen=True)
class PictureFile:
    """A picture: the bytes, and their type, as "image/png"."""

    content: bytes
    type: str


@dataclass(frozen=True)
class Started:
    """The model has begun; `uid` is the conversation's, also where it is new."""

    uid: str


@dataclass(frozen=True)
class Thoughts:
    """What the model thought, and the calls of tools that it wrote."""

    text: str
    commands: str


@dataclass(frozen=True)
class Results:
    """What the tools gave; None if nothing was called. The pictures can be had once the answer is over."""

    text: str | None
    sources: tuple[Source, ...] = ()
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Delta:
    """More text of the answer."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The answer is over.

    Attributes:
        uid: of the conversation; None where it was stopped before it began.
        reason: "stop", "length", "time", or "cancelled" after `Answer.stop`. What had come until then is kept by the
            server, but for a turn of which no answer had come.
        answer: the whole text; that which had come, where it was stopped.
        tokens_per_s: 0 where it is not known.
    """

    uid: str | None
    reason: str
    answer: str
    new_tokens: int = 0
    tokens_per_s: float = 0.0


Event = Started | Thoughts | Results | Delta | Finished


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    human: str
    answer: str
    reason: str = "stop"
    thoughts: str | None = None
    commands: str | None = None
    results: str | None = None
    sources: tuple[Source, ...] = ()
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """A conversation that the server keeps; the oldest turn is first."""

    uid: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Listed:
    """A line of a list of conversations; times are seconds since 1970."""

    uid: str
    title: str
    turns: int
    created: float
    updated: float


@dataclass(frozen=True)
class Readiness:
    """Whether requests are answered; if not, what is being done, and how much of it is done, from 0 to 1."""

    ready: bool
    task: str = ""
    share: float = 0.0


@dataclass(frozen=True)
class Figures:
    """A server at this moment.

    Attributes:
        model: its name; "" while it is being loaded.
        context_size: tokens of a prompt and its answer; 0 while the model is being loaded.
        longest_answer: tokens that may be asked for.
        wishes: how the model is asked where nobody says; MOSS's own values while it is being loaded.
        tools: names of those that the server runs.
        user: the name of the key in use; "" where there are none.
        lists: it lists one's conversations: there are keys.
        tokens_per_s: of passes that only answer; 0 before the first.
        waiting, running: requests.
        memory: bytes by tier: resident, streamed, kv, device, limit, vram_limit; those that do not apply are 0.
    """

    model: str
    context_size: int
    longest_answer: int
    wishes: Wishes
    tools: tuple[str, ...]
    user: str
    lists: bool
    tokens_per_s: float
    waiting: int
    running: int
    memory: Mapping[str, int] = field(default_factory=dict)


class Answer(Iterator[Event]):
    """An answer as it comes.

    Closing it, or leaving a `with` block of it, ends the work on the server; what had come is kept there as a turn.
    """

    def __init__(self, client: httpx.Client, body: Mapping[str, Any]) -> None:
        self._client = client
        self._body = body
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._stopped = False
        self._events = self._read()

    def __next__(self) -> Event:
        return next(self._events)

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stop(self) -> None:
        """End the answer; whoever reads it gets a Finished with the reason "cancelled" at once."""
        with self._lock:
            self._stopped = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # it has ended by itself
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # ssl's own drops what a reader still uses

    def close(self) -> None:
        """End the answer, unless it is over; not while another thread reads it."""
        self._events.close()
        self._client.close()

    def _read(self) -> Generator[Event, None, None]:
        uid, told = self._body.get("uid"), list[str]()
        try:
            with self._client.stream("POST", "/", json=self._body, extensions={"trace": self._traced}) as reply:
                _check(reply)
                for line in _lines(reply.iter_text()):
                    event = _event(line)
                    if isinstance(event, Started):
                        uid = event.uid
                    elif isinstance(event, Delta):
                        told.append(event.text)
                    if event is not None:
                        yield event
                    if isinstance(event, Finished):
                        return
            raise ServerError("the answer broke off: the server has ended. Ask again once it runs.")
        except (httpx.HTTPError, ServerError, ValueError) as error:
            if not self._stopped:
                raise _told(error, self._client.base_url) from error
            yield Finished(uid, "cancelled", "".join(told))
        finally:
            self._client.close()

    def _traced(self, name: str, info: Mapping[str, Any]) -> None:
        """Take the socket of the connection, which alone can wake up a thread that waits for it; TLS has its own."""
        if name in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            with self._lock:
                self._socket = info["return_value"].get_extra_info("socket")
            if self._stopped:
                self.stop()


class ServerClient:
    """Asks a server.

    Args:
        url: as "http://127.0.0.1:19324".
        key: of the server; None where it has none.

    Every method raises ServerError with the server's own words where it refuses, or says that it cannot be reached.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self._url = _checked(url)
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._tls = ssl.create_default_context() if self._url.startswith("https:") else False
        self._client = self._make(SHORT_S)

    @property
    def has_key(self) -> bool:
        """Whether it asks with a key, so that the server can list conversations."""
        return bool(self._headers)

    def __enter__(self) -> ServerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, but those of answers that still come."""
        self._client.close()

    def ask(self, text: str, *, uid: str | None, wishes: Wishes, replaces: int | None = None) -> Answer:
        """Say something in a conversation; nothing is sent before the first event is asked for.

        Args:
            uid: of the conversation; None begins one.
            replaces: number of the last turn, from 0, whose place this one takes once the server keeps it; where the
                last one is another, that is a ServerError with the status 409.
        """
        body: dict[str, Any] = {"prompt": text, "stream": True}
        body |= {name: value for name, value in asdict(wishes).items() if value is not None}
        if uid is not None:
            body["uid"] = uid
        if replaces is not None:
            body["replace_turn"] = replaces
        return Answer(self._make(SILENCE_S), body)  # of its own, so that to stop it concerns nobody else

    def conversation(self, uid: str) -> Conversation:
        """Every turn of a conversation."""
        found = self._get(_path(uid))
        return Conversation(uid, tuple(map(_turn, found["turns"])))

    def export(self, uid: str) -> str:
        """A conversation as JSON, for a file."""
        return json.dumps(self._get(_path(uid)), ensure_ascii=False, indent=1)

    def conversations(self) -> list[Listed]:
        """One's conversations, the last used first; those of a page of the server's list. It needs a key."""
        return [_make(Listed, one) for one in self._get("/v1/conversations")["data"]]

    def picture(self, uid: str, name: str) -> PictureFile:
        """A picture of a turn that is over."""
        reply = self._send("GET", f"{_path(uid)}/pictures/{quote(name, safe='')}")
        return PictureFile(reply.content, reply.headers.get("content-type", "").partition(";")[0].strip())

    def delete(self, uid: str) -> None:
        """Delete a conversation for good."""
        self._send("DELETE", _path(uid))

    def take_back(self, uid: str, *, number: int | None = None) -> str:
        """Forget the last turn, to ask in other words or to have it answered anew; give its question.

        Args:
            number: the turn that is meant, from 0; where the last one is another, nothing is done, and that is
                a ServerError with the status 409.
        """
        wanted = "" if number is None else f"?number={number}"
        return str(self._send("DELETE", f"{_path(uid)}/turns/last{wanted}").json()["human"])

    def readiness(self) -> Readiness:
        """Whether the model is loaded, or how far that is."""
        reply = self._send("GET", "/readyz", accepted=(503,))
        if reply.status_code == 200:
            return Readiness(True)
        found = reply.json()
        return Readiness(False, str(found.get("loading", "")), float(found.get("share", 0.0)))

    def figures(self) -> Figures:
        """Speed, memory, queue, and what may be asked for."""
        found = self._get("/v1/figures")
        wishes = _make(Wishes, found.get("sampling") or {})
        made: Figures = _make(Figures, {**found, "tools": tuple(found["tools"]), "wishes": wishes})
        return made

    def _get(self, path: str) -> Any:
        reply = self._send("GET", path)
        try:
            return reply.json()
        except ValueError as error:
            raise _not_ours(reply) from error

    def _send(self, method: str, path: str, accepted: tuple[int, ...] = ()) -> httpx.Response:
        try:
            reply = self._client.request(method, path)
        except httpx.HTTPError as error:
            raise _unreachable(self._client.base_url, error) from error
        if reply.status_code not in accepted:
            _check(reply)
        return reply

    def _make(self, read_s: float) -> httpx.Client:
        timeout = httpx.Timeout(SHORT_S, connect=CONNECT_S, read=read_s)
        return httpx.Client(
            base_url=self._url, headers=self._headers, timeout=timeout, verify=self._tls, trust_env=False
        )


def _checked(url: str) -> str:
    """An address without a slash at its end.

    Raises:
        ServerError: it is none.
    """
    try:
        parts = urlsplit(url.strip())
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        httpx.URL(url.strip())
    except (ValueError, httpx.InvalidURL):
        usable = False
    if not usable:
        raise ServerError(f"{url!r} is no address of a server. One is written as in http://127.0.0.1:19324")
    return url.strip().rstrip("/")


def _path(uid: str) -> str:
    return f"/v1/conversations/{quote(uid, safe='')}"


def _make(kind: Any, values: Mapping[str, Any]) -> Any:
    """A value of what a server sent; what a newer server tells besides is passed over."""
    return kind(**{name: values[name] for name in kind.__dataclass_fields__ if name in values})


def _turn(values: Mapping[str, Any]) -> Turn:
    made: Turn = _make(Turn, {**values, **_found(values)})
    return made


def _found(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "sources": tuple(_make(Source, one) for one in values.get("sources", ())),
        "pictures": tuple(_make(Picture, one) for one in values.get("pictures", ())),
    }


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """The lines of a stream, which end with LF or CRLF; those of httpx also end at U+2028, within a text."""
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        yield from (line.removesuffix("\r") for line in lines)
    yield rest


def _event(line: str) -> Event | None:
    """The event of a line of a stream; None for lines that are none, and for kinds that are not known.

    Raises:
        ServerError: the line tells an error.
        ValueError: it is no JSON.
    """
    data = line.removeprefix("data: ")
    if data in (line, "[DONE]"):
        return None
    values = json.loads(data)
    if "error" in values:
        raise ServerError(values["error"]["message"], code=values["error"]["code"])
    make = _EVENTS.get(values["type"])
    return None if make is None else make(values)


def _finished(values: Mapping[str, Any]) -> Event:
    usage = values["usage"]
    return Finished(values["uid"], values["reason"], values["response"], usage["new_tokens"], usage["tokens_per_s"])


_EVENTS: dict[str, Callable[[Mapping[str, Any]], Event]] = {
    "start": lambda values: Started(values["uid"]),
    "thoughts": lambda values: Thoughts(values["text"], values["commands"]),
    "results": lambda values: Results(values["text"], **_found(values)),
    "delta": lambda values: Delta(values["text"]),
    "end": _finished,
}


def _check(reply: httpx.Response) -> None:
    """Raise a ServerError where a reply is one."""
    if reply.status_code < 400:
        return
    try:
        error = json.loads(reply.read())["error"]
        message, code = str(error["message"]), error["code"]
    except (ValueError, KeyError, TypeError):
        raise _not_ours(reply) from None
    raise ServerError(message, status=reply.status_code, code=code)


def _not_ours(reply: httpx.Response) -> ServerError:
    words = f"{reply.url} answered {reply.status_code} in words of its own; is it a server of moss-jt?"
    return ServerError(words, status=reply.status_code)


def unforeseen(error: Exception) -> ServerError:
    """What a page tells of an error that is nobody's but ours; the log has the whole of it."""
    _log.error("an answer could not be read", exc_info=error)
    return ServerError(f"the answer could not be read: {error!r}. The log of the page says more; ask again.")


def _told(error: httpx.HTTPError | ServerError | ValueError, url: httpx.URL) -> ServerError:
    """Why there is no answer, or no more of it."""
    if isinstance(error, ServerError):
        return error
    if isinstance(error, httpx.HTTPError):
        return _unreachable(url, error)
    if isinstance(error, UnicodeEncodeError):
        return ServerError(f"{error.object[error.start]!a} in the question is half a character. Leave it out.")
    return ServerError(f"{url} sent what is no event: {error}. Is a proxy between that changes the answers?")


def _unreachable(url: httpx.URL, error: httpx.HTTPError) -> ServerError:
    reason = str(error) or type(error).__name__
    return ServerError(f"{url} cannot be reached: {reason}. Does `moss-jt serve` run there?")
