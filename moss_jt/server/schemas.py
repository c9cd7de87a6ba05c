"""The requests of OpenAI's API that are understood, as types that check themselves.

A field that would change the answer and is not understood is refused; one that changes nothing is passed over.
Only the first fault is told, and a list or an object is not searched for more: half a million faults of one
request would be half a million errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from moss_jt.server.calls import MOST_CALLS

MOST_CHOICES = 8
MOST_PROMPTS = 8
MOST_FIELDS = 64  # of a request, known or not


def _whole(value: object) -> object:
    """To JSON, 3.0 is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _few(value: object, most: int) -> object:
    """Refuse an object with more fields before each of them is looked at."""
    if isinstance(value, dict) and len(value) > most:
        raise PydanticCustomError(
            "too_long",
            "the object has {found} fields and may have {most}; leave some out",
            {"found": len(value), "most": most},
        )
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Text = Annotated[str, StringConstraints(max_length=1 << 20)]
Short = Annotated[str, StringConstraints(max_length=256)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Zero = Annotated[float, Field(ge=0, le=0)]
FunctionName = Literal[
    "search",
    "Search",
    "web_search",
    "calc",
    "calculate",
    "Calculate",
    "calculator",
    "solve",
    "Solve",
    "equation_solver",
    "draw",
    "Text2Image",
    "text2image",
    "text_to_image",
]


class Strict(BaseModel):
    """No field but those named, no number as text."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, value: object) -> object:
        return _few(value, MOST_FIELDS)


class Lenient(BaseModel):
    """Fields that are not named are passed over."""

    model_config = ConfigDict(extra="ignore", strict=True)


class Sampling(Strict):
    """How to choose and when to stop; what is left out has the model's own value."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=0, le=1 << 20, description="0 keeps all tokens.")] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    seed: Annotated[Whole, Field(ge=-(1 << 63), lt=1 << 63)] | None = None


class TextPart(Lenient):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[TextPart], Field(fail_fast=True)]


class SystemMessage(Lenient):
    """Takes the place of MOSS's own system prompt."""

    role: Literal["system", "developer"]
    content: Content


class UserMessage(Lenient):
    """What the user says."""

    role: Literal["user"]
    content: Content


class CalledFunction(Lenient):
    """What was called, and with what."""

    name: FunctionName
    arguments: Text


class ToolCall(Lenient):
    """A call that the assistant made."""

    id: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Lenient):
    """What MOSS said."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_CALLS)] | None = None


class ToolMessage(Lenient):
    """What a function of the client gave."""

    role: Literal["tool"]
    tool_call_id: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    content: Content


AnyMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class TextProperty(Lenient):
    """The one argument of a function: a text."""

    type: Literal["string"]


class OneText(Lenient):
    """The arguments of a function."""

    type: Literal["object"]
    properties: Annotated[
        dict[Short, TextProperty], Field(min_length=1, max_length=1), BeforeValidator(lambda value: _few(value, 1))
    ]


class FunctionTool(Lenient):
    """A function of the client, named like one of MOSS's tools."""

    name: FunctionName
    description: Text | None = None
    parameters: OneText


class Tool(Lenient):
    """A tool of the client."""

    type: Literal["function"]
    function: FunctionTool


class TextFormat(Strict):
    """Answers are text."""

    type: Literal["text"]


class StreamOptions(Lenient):
    """Of a stream."""

    include_usage: bool = False


class Common(Sampling):
    """What both routes of OpenAI's API take."""

    model: Short = ""
    max_tokens: Annotated[Whole, Field(ge=1, le=1 << 20)] | None = None
    n: Annotated[Whole, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: (
        Annotated[dict[str, float], Field(max_length=0), BeforeValidator(lambda value: _few(value, 0))] | None
    ) = None
    user: Short | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[AnyMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: Annotated[Whole, Field(ge=1, le=1 << 20)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=16)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | Annotated[
            list[Annotated[Whole, Field(ge=0, lt=1 << 31)]], Field(min_length=1, max_length=1 << 16, fail_fast=True)
        ]
    )
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    ignore_eos: bool = Field(default=False, description="Go on behind end markers, up to max_tokens.")


class MossRequest(Sampling):
    """POST /, as MOSS's demo takes it, and what is new."""

    prompt: Annotated[str, StringConstraints(min_length=1, max_length=1 << 20)]
    uid: Annotated[str, StringConstraints(max_length=64)] | None = Field(
        default=None, description="Of a conversation to continue; left out, a new one begins."
    )
    max_length: Annotated[Whole, Field(ge=1, le=1 << 20)] | None = Field(
        default=None, description="Tokens of prompt and answer together; 2048."
    )
    max_new_tokens: Annotated[Whole, Field(ge=1, le=1 << 20)] | None = Field(
        default=None, description="Longest answer; 512."
    )
    stream: bool = Field(default=False, description="Answer with server-sent events.")
    replace_turn: Annotated[Whole, Field(ge=0, le=1 << 31)] | None = Field(
        default=None,
        description="Number of the last turn, from 0: this one takes its place. Until this is kept, the old one stays.",
    )


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Every error."""

    error: ErrorDetail
