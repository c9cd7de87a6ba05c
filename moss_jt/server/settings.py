"""What may be set of a server; checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from moss_jt import paths
from moss_jt.errors import ConfigError

PORT = 19324  # MOSS's own


def default_database() -> Path:
    """Where keys and conversations are kept unless told otherwise."""
    return paths.home() / "server" / "moss.db"


@dataclass(frozen=True)
class ServerSettings:
    """How to serve.

    Attributes:
        database: file of the keys and conversations.
        host: address to listen at; other than this machine's own needs keys.
        port: 0 takes a free one.
        name: of the model, as /v1/models tells it; "" takes that of its folder.
        parallel: answers that are computed at once.
        queue: requests that may wait, over all users.
        queue_per_user: and of one key.
        wait_s: longest wait.
        answer_s: longest answer, from the moment when the engine has it.
        max_new_tokens: longest answer that may be asked for.
        body_bytes: largest request.
        body_s: longest time for a request to arrive.
        head_s: and for its first lines.
        send_s: how long a client may take no bytes of an answer.
        connections: open at once.
        conversations: that one user may keep.
        grace_s: at the end, time for answers to finish by themselves.
        log_texts: write prompts and answers to the log.
    """

    database: Path
    host: str = "127.0.0.1"
    port: int = PORT
    name: str = ""
    parallel: int = 8
    queue: int = 64
    queue_per_user: int = 32
    wait_s: float = 300
    answer_s: float = 600
    max_new_tokens: int = 2048
    body_bytes: int = 1 << 20
    body_s: float = 20
    head_s: float = 10
    send_s: float = 30
    connections: int = 512
    conversations: int = 10_000
    grace_s: float = 30
    log_texts: bool = False

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type in ("int", "float") and entry.name not in ("port", "queue", "grace_s") and not value > 0:
                raise ConfigError(f"{entry.name} is {value}; it must be above 0.")
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port is {self.port}; it must be from 0 to 65535.")
        if self.queue < 0 or self.grace_s < 0:
            raise ConfigError(f"queue is {self.queue} and grace_s {self.grace_s}; both must be 0 or more.")
