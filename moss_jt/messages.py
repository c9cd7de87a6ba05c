"""What goes into an engine and what comes out: plain data that can cross to another process.

A Request goes in by `Engine.submit`; events come out of `Engine.step` until a FinishedEvent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moss_jt.config import GenerationConfig

Reason = Literal["stop", "length", "time", "cancelled"]


@dataclass(frozen=True)
class Request:
    """Tokens to continue.

    Attributes:
        ids: the whole prompt so far.
        config: how to choose and when to stop.
        conversation: keep the cache under this name afterwards; what the prompt has in common with
            what is cached there is not computed again.
        top_logprobs: tell with each token what the model itself thought of it and of this many best; None for nothing.
        shared: so many leading ids are nobody's secret, as a system prompt that all have: where another conversation has
            them in its cache they are taken over and not computed.
    """

    ids: tuple[int, ...]
    config: GenerationConfig
    conversation: str | None = None
    top_logprobs: int | None = None
    shared: int = 0


@dataclass(frozen=True)
class PrefillEvent:
    """`done` of the `total` prompt tokens are computed; `reused` of them came from the cache."""

    request: int
    done: int
    total: int
    reused: int


@dataclass(frozen=True)
class TokenScores:
    """Logarithms of the model's own probabilities: before penalty, temperature, top-k and top-p.

    Attributes:
        logprob: of the token that came out.
        best: (id, logarithm) of the best tokens, the best first.
    """

    logprob: float
    best: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenEvent:
    """A new token, and the logarithm of the probability that it was drawn with; `scores` where they were asked for."""

    request: int
    id: int
    logprob: float
    scores: TokenScores | None = None


@dataclass(frozen=True)
class FinishedEvent:
    """A request is over.

    Attributes:
        reused_tokens: of the prompt, found in the cache.
        prefill_s: from `submit` to the first token (to the end, where there was none), waiting included.
        decode_s: from the first token to the end.
    """

    request: int
    reason: Reason
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    prefill_s: float
    decode_s: float


Event = PrefillEvent | TokenEvent | FinishedEvent
