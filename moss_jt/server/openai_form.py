"""Answers in the form of OpenAI's API: objects, chunks, log-probabilities, reasons, usage."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moss_jt.messages import TokenEvent
from moss_jt.server.answers import Delta, Done, Part, Reason, Restarted, Thoughts, Usage
from moss_jt.server.calls import Call, Function

if TYPE_CHECKING:
    from moss_jt.tokenizer import Tokenizer

Values = dict[str, Any]

_REASONS: dict[Reason, str] = {
    "stop": "stop",
    "length": "length",
    "time": "length",
    "cancelled": "stop",
    "calls": "tool_calls",
}


@dataclass
class Choice:
    """One answer, gathered.

    Attributes:
        tokens: of the answer, where their log-probabilities were asked for.
    """

    text: str = ""
    tokens: list[TokenEvent] = field(default_factory=list)
    thoughts: Thoughts | None = None
    reason: Reason = "stop"
    usage: Usage = field(default_factory=Usage)

    def take(self, part: Part) -> None:
        """Enter what came."""
        if isinstance(part, Restarted):
            self.text, self.tokens = "", []  # the pass begins anew; thoughts are of one that is over
        elif isinstance(part, Delta):
            self.text += part.text
            self.tokens += part.tokens
        elif isinstance(part, Thoughts):
            self.thoughts = part
        elif isinstance(part, Done):
            self.reason, self.usage = part.reason, part.usage


class Form:
    """Writes one answer of a route.

    Args:
        kind: "chat.completion" or "text_completion".
        model: the name of the model.
        tokenizer: for the texts of tokens.
        stop_ids: tokens that are no part of an answer.
        functions: of the client.
    """

    def __init__(
        self,
        kind: str,
        model: str,
        tokenizer: Tokenizer,
        *,
        stop_ids: Iterable[int] = (),
        functions: Sequence[Function] = (),
    ) -> None:
        self._chat = kind == "chat.completion"
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._functions = {function.tool: function for function in reversed(functions)}
        prefix = "chatcmpl" if self._chat else "cmpl"
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._kind = kind

    def whole(self, choices: Sequence[Choice], *, each: int, logprobs: bool) -> Values:
        """The answer in one piece."""
        write = self._chat_choice if self._chat else self._text_choice
        written = [
            {
                "index": number,
                **write(choice),
                "logprobs": self.logprobs(choice.tokens) if logprobs else None,
                "finish_reason": _REASONS[choice.reason],
            }
            for number, choice in enumerate(choices)
        ]
        return {**self._head, "object": self._kind, "choices": written, "usage": usage_of(choices, each)}

    def chunk(
        self, number: int, delta: Values, *, reason: Reason | None = None, logprobs: Values | None = None
    ) -> Values:
        """A piece of a stream; of a completion, `delta` holds its text."""
        body = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        choice = {
            "index": number,
            **body,
            "logprobs": logprobs,
            "finish_reason": None if reason is None else _REASONS[reason],
        }
        return {**self._head, "object": self._chunk_kind, "choices": [choice]}

    def usage_chunk(self, choices: Sequence[Choice], *, each: int) -> Values:
        """The last piece, where it was asked for."""
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": usage_of(choices, each)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else self._kind

    def thoughts_delta(self, thoughts: Thoughts) -> Values:
        """Thoughts, and calls for the client to answer, as a piece of a stream."""
        delta: Values = {"reasoning_content": thoughts.text} if thoughts.text else {}
        if thoughts.calls:
            calls = self._calls(thoughts.calls)
            delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
        return delta

    def logprobs(self, tokens: Sequence[TokenEvent], *, offset: int = 0) -> Values:
        """What the model thought of the tokens; `offset` characters of the text came before."""
        shown = [token for token in tokens if token.scores is not None and token.id not in self._stop_ids]
        if self._chat:
            return {"content": [self._token(token) for token in shown], "refusal": None}
        texts = [self._text(token.id) for token in shown]
        starts = [offset + sum(map(len, texts[:at])) for at in range(len(texts))]
        scores = [token.scores for token in shown if token.scores is not None]
        return {
            "tokens": texts,
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [{self._text(i): value for i, value in score.best} for score in scores],
            "text_offset": starts,
        }

    def _chat_choice(self, choice: Choice) -> Values:
        calls = choice.thoughts.calls if choice.thoughts is not None and choice.reason == "calls" else ()
        message: Values = {"role": "assistant", "content": choice.text if not calls else None, "refusal": None}
        if choice.thoughts is not None:
            message["reasoning_content"] = choice.thoughts.text
        if calls:
            message["tool_calls"] = self._calls(calls)
        return {"message": message}

    def _text_choice(self, choice: Choice) -> Values:
        return {"text": choice.text}

    def _calls(self, calls: Sequence[Call]) -> list[Values]:
        return [
            {
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {
                    "name": self._functions[call.tool].name,
                    "arguments": self._functions[call.tool].arguments(call),
                },
            }
            for call in calls
        ]

    def _token(self, token: TokenEvent) -> Values:
        assert token.scores is not None, "asked above"
        best = [self._scored(i, value) for i, value in token.scores.best]
        return {**self._scored(token.id, token.scores.logprob), "top_logprobs": best}

    def _scored(self, token_id: int, logprob: float) -> Values:
        return {
            "token": self._text(token_id),
            "logprob": logprob,
            "bytes": list(self._tokenizer.piece(token_id)),
        }

    def _text(self, token_id: int) -> str:
        return self._tokenizer.piece(token_id).decode("utf-8", "replace")


def usage_of(choices: Sequence[Choice], each: int) -> Values:
    """Tokens of prompts, `each` of which has so many answers, and of all answers."""
    firsts = [choice.usage for choice in choices[::each]]
    prompt, new = sum(usage.prompt_tokens for usage in firsts), sum(choice.usage.new_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(usage.reused_tokens for usage in firsts)},
    }
