"""HTTP for tools: JSON and bytes from a server that the user named, with limits; urllib only."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from moss_jt.errors import ToolError

MAX_BYTES = 32 << 20
_AGENT = "moss-jt"


def check_url(url: str) -> str:
    """The address of a server without a slash at its end.

    Raises:
        ToolError: it is not one of http or https.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ToolError(f"{url!r} is no address of a server; wanted is one like http://127.0.0.1:8080.")
    return url.rstrip("/")


def with_query(url: str, values: Mapping[str, str | int]) -> str:
    """An address with values behind the question mark."""
    return f"{url}{'&' if '?' in url else '?'}{urllib.parse.urlencode(values)}"


def fetch(url: str, *, timeout: float, headers: Mapping[str, str] | None = None, send: object | None = None) -> bytes:
    """The bytes at an address.

    Args:
        url: http or https.
        timeout: seconds that the server may be silent.
        headers: to send along.
        send: a value to POST as JSON.

    Raises:
        ToolError: the server cannot be reached, refuses, or sends too much.
    """
    body = None if send is None else json.dumps(send).encode("utf-8")
    every = {"User-Agent": _AGENT, **(headers or {}), **({} if body is None else {"Content-Type": "application/json"})}
    request = urllib.request.Request(check_url(url), data=body, headers=every)
    place = urllib.parse.urlsplit(url).netloc
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            content: bytes = response.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        with error:
            raise ToolError(f"{place} refuses: {error.code} {error.reason}.") from error
    except (OSError, ValueError, EOFError) as error:  # OSError: also no route, no certificate, a timeout
        reason = getattr(error, "reason", None) or error
        raise ToolError(f"{place} cannot be reached: {reason}.") from error
    if len(content) > MAX_BYTES:
        raise ToolError(f"{place} sends more than {MAX_BYTES >> 20} MiB.")
    return content


def fetch_json(
    url: str, *, timeout: float, headers: Mapping[str, str] | None = None, send: object | None = None
) -> Any:
    """The JSON at an address; see `fetch`."""
    content = fetch(url, timeout=timeout, headers=headers, send=send)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ToolError(f"{urllib.parse.urlsplit(url).netloc} does not answer with JSON: {error}.") from error
