"""/v1/chat/completions, /v1/completions and /v1/models."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from moss_jt.config import GenerationConfig
from moss_jt.messages import Request as EngineRequest
from moss_jt.server.answers import (
    Asker,
    Delta,
    Done,
    Part,
    PlainReader,
    Question,
    Tally,
    Thoughts,
    answer,
    one_pass,
)
from moss_jt.server.calls import Function, read_call
from moss_jt.server.openai_form import Choice, Form, usage_of
from moss_jt.server.prompts import Message, Prompt, chat_prompt, check_length
from moss_jt.server.refusals import Refusal, wrong
from moss_jt.server.routing import ERRORS, STREAMS, notes_of, service_of, user_of
from moss_jt.server.schemas import (
    AnyMessage,
    AssistantMessage,
    ChatRequest,
    Common,
    CompletionRequest,
    Content,
    Sampling,
    Tool,
    ToolMessage,
)
from moss_jt.server.service import Service, Speaker
from moss_jt.server.streams import DONE, event_stream, merge, sse, until_gone
from moss_jt.server.users import User
from moss_jt.template import Template

DEFAULT_CHAT_TOKENS = 512
DEFAULT_TEXT_TOKENS = 16  # OpenAI's own

router = APIRouter(prefix="/v1", responses=ERRORS)


@dataclass(frozen=True)
class Plan:
    """What a route has made of a request: how each of its answers is got, and how all are written.

    Attributes:
        tallies: what each answer costs.
        each: answers to one prompt.
    """

    sources: Sequence[AsyncGenerator[Part, None]]
    tallies: Sequence[Tally]
    form: Form
    logprobs: bool
    each: int


@router.get("/models", summary="The model that is served", tags=["openai"])
async def list_models(request: Request) -> dict[str, Any]:
    """One model, the one that this server has."""
    await user_of(request)
    return {"object": "list", "data": [_model_object(service_of(request).speaker)]}


@router.get("/models/{model:path}", summary="A model", tags=["openai"])
async def get_model(request: Request, model: str) -> dict[str, Any]:
    """The model of this name."""
    await user_of(request)
    speaker = service_of(request).speaker
    if model != speaker.name:
        raise Refusal(404, f"there is no model {model[:80]!r} here; there is {speaker.name!r}.", "model_not_found")
    return _model_object(speaker)


def _model_object(speaker: Speaker) -> dict[str, Any]:
    return {
        "id": speaker.name,
        "object": "model",
        "created": 0,
        "owned_by": "moss-jt",
        "context_size": speaker.context_size,
    }


@router.post(
    "/chat/completions", summary="Answer a conversation", tags=["openai"], response_model=None, responses=STREAMS
)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """OpenAI's chat; the conversation comes with the request, and nothing of it is kept."""
    user, service = await user_of(request, asks=True), service_of(request)
    plan = await _plan_chat(service, user, body)
    return await _respond(request, user, body, plan)


@router.post("/completions", summary="Continue a text", tags=["openai"], response_model=None, responses=STREAMS)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """OpenAI's older route: the text goes to the model as it is, without tags."""
    user, service = await user_of(request, asks=True), service_of(request)
    plan = await _plan_text(service, user, body)
    return await _respond(request, user, body, plan)


async def _plan_chat(service: Service, user: User, body: ChatRequest) -> Plan:
    speaker = service.speaker
    asker = user.asker(streams=bool(body.stream))
    _check_number(service, asker, body, prompts=1)
    if body.top_logprobs and not body.logprobs:
        raise wrong(
            f"top_logprobs is {body.top_logprobs}, and logprobs is not true. Set it, or leave both out.",
            "top_logprobs",
        )
    functions = _functions(body.tools or []) if body.tool_choice != "none" else ()
    enabled = list(service.tools.enabled) if service.tools is not None and body.tool_choice != "none" else []
    messages = [_message(message) for message in body.messages]
    called = any(message.calls for message in messages)  # only the five fields can say so
    template = speaker.template(tools=bool(functions or enabled or called))
    prompt = await service.encode(
        chat_prompt,
        speaker.tokenizer,
        template,
        messages,
        functions=functions,
        enabled=enabled,
        context_size=speaker.context_size,
    )
    room = _room(speaker, len(prompt.ids))
    wanted = body.max_completion_tokens or body.max_tokens or DEFAULT_CHAT_TOKENS
    config = sampling_config(service, body, min(wanted, room), stop=body.stops)
    question = Question(
        prompt,
        config,
        speaker.context_size,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        functions=functions,
        runner=service.tools if enabled and not functions else None,
        most_calls=1 if body.parallel_tool_calls is False else None,
    )
    questions = [_nth(question, number) for number in range(body.n or 1)]
    sources = [_chat_source(service, asker, one, template, first=number == 0) for number, one in enumerate(questions)]
    stop_ids = template.stop_ids(speaker.tokenizer)
    form = Form("chat.completion", speaker.name, speaker.tokenizer, stop_ids=stop_ids, functions=functions)
    return Plan(sources, [one.tally for one in questions], form, bool(body.logprobs), body.n or 1)


def _check_number(service: Service, asker: Asker, body: Common, *, prompts: int) -> None:
    """Refuse more answers than can run and wait together, before any begins: they would be refused at any time.

    Raises:
        Refusal: 400.
    """
    wanted, most = prompts * (body.n or 1), service.dispatcher.capacity(most=asker.most, known=asker.known)
    if wanted > most:
        raise wrong(
            f"n is {body.n or 1} and there {'is 1 prompt' if prompts == 1 else f'are {prompts} prompts'}: {wanted} "
            f"answers; of one user {most} can run and wait here. Ask for fewer at once.",
            "n",
        )


def _nth(question: Question, number: int) -> Question:
    """The same question for another choice: with a seed of its own."""
    return replace(question, config=replace(question.config, seed=_seed(question.config, number)), tally=Tally())


def _seed(config: GenerationConfig, number: int) -> int:
    assert config.seed is not None, "sampling_config gives one"
    return (config.seed + number) & ((1 << 63) - 1)


async def _chat_source(
    service: Service, asker: Asker, question: Question, template: Template, *, first: bool
) -> AsyncGenerator[Part, None]:
    """One answer, under the name of a cache that holds most of its prompt; of several choices, the first has it."""
    name = None
    if first or question.prompt.thinking:
        name = service.warm.take(asker.user, question.prompt.ids)
        question = replace(question, conversation=name)
    ids = question.prompt.ids
    source = answer(service.dispatcher, asker, question, service.speaker.tokenizer, template)
    try:
        async with aclosing(source) as parts:
            async for part in parts:
                if isinstance(part, Done):
                    ids = (*ids, *(part.passes[0] if part.passes else ()))
                yield part
    finally:
        if name is not None:
            service.warm.give_back(name, ids)


async def _plan_text(service: Service, user: User, body: CompletionRequest) -> Plan:
    speaker = service.speaker
    asker = user.asker(streams=bool(body.stream))
    several = isinstance(body.prompt, list) and isinstance(body.prompt[0], str)
    _check_number(service, asker, body, prompts=len(body.prompt) if several else 1)
    prompts = await service.encode(_text_prompts, speaker, body)
    stop_ids = () if body.ignore_eos else plain_stop_ids(speaker)
    questions: list[Question] = []
    for prompt in prompts:
        length = min(body.max_tokens or DEFAULT_TEXT_TOKENS, _room(speaker, len(prompt.ids)))
        config = replace(sampling_config(service, body, length, stop=body.stops), stop_ids=stop_ids)
        for number in range(body.n or 1):
            question = _nth(Question(prompt, config, speaker.context_size, top_logprobs=body.logprobs), number)
            questions.append(question)
    sources = [_text_source(service, speaker, asker, question) for question in questions]
    form = Form("text_completion", speaker.name, speaker.tokenizer, stop_ids=stop_ids)
    return Plan(sources, [one.tally for one in questions], form, body.logprobs is not None, body.n or 1)


def _text_source(service: Service, speaker: Speaker, asker: Asker, question: Question) -> AsyncGenerator[Part, None]:
    config = question.config
    request = EngineRequest(question.prompt.ids, config, top_logprobs=question.top_logprobs)
    return one_pass(service.dispatcher, asker, request, lambda: PlainReader(speaker.tokenizer, config), question.tally)


def _text_prompts(speaker: Speaker, body: CompletionRequest) -> list[Prompt]:
    """The prompts as ids; an empty one begins with what begins every text."""
    given = body.prompt
    if isinstance(given, str):
        given = [given]
    if isinstance(given[0], int):
        return [Prompt(tuple(i for i in given if isinstance(i, int)))]
    texts = [text for text in given if isinstance(text, str)]
    check_length(sum(map(len, texts)), speaker.context_size)
    begin = speaker.tokenizer.bos_id if speaker.tokenizer.bos_id is not None else speaker.tokenizer.eos_id
    found = []
    for text in texts:
        ids = speaker.tokenizer.encode(text) or ([begin] if begin is not None else [])
        if not ids:
            raise wrong("the prompt is empty. Give at least one character.", "prompt")
        found.append(Prompt(tuple(ids)))
    return found


def plain_stop_ids(speaker: Speaker) -> tuple[int, ...]:
    """What ends a continuation: the end of a text, and of an answer."""
    tokenizer = speaker.tokenizer
    named = (tokenizer.eos_id, tokenizer.markers.get("<eom>"))
    return tuple(dict.fromkeys(i for i in named if i is not None))


def _room(speaker: Speaker, length: int) -> int:
    """Tokens that are left for an answer."""
    room = speaker.context_size - length
    if room < 1:
        raise wrong(
            f"the prompt has {length} tokens; the context of {speaker.name} holds {speaker.context_size} with the "
            "answer. Shorten it.",
            "messages",
            "context_length_exceeded",
        )
    return room


def sampling_config(service: Service, body: Sampling, length: int, *, stop: tuple[str, ...] = ()) -> GenerationConfig:
    """How to choose; what was not asked has the model's own value, but for the seed, which is drawn here.

    So a request that begins anew in another process gives the same again.
    """
    given = {
        "temperature": body.temperature,
        "top_p": None if body.top_p is None else max(body.top_p, 1e-6),  # 0: only the best
        "top_k": body.top_k,
        "repetition_penalty": body.repetition_penalty,
    }
    return GenerationConfig.for_model(
        service.speaker.model.config,
        **{name: value for name, value in given.items() if value is not None},
        max_new_tokens=min(length, service.settings.max_new_tokens),
        max_time=service.settings.answer_s,
        seed=secrets.randbits(63) if body.seed is None else body.seed & ((1 << 63) - 1),
        stop_strings=stop,
    )


def _functions(tools: Sequence[Tool]) -> tuple[Function, ...]:
    """The client's functions, one for a tool of MOSS."""
    found: dict[str, Function] = {}
    for tool in tools:
        function = Function(tool.function.name, next(iter(tool.function.parameters.properties)))
        if function.tool in found:
            raise wrong(
                f"{function.name} and {found[function.tool].name} stand for the same tool of MOSS. Leave one out.",
                "tools",
            )
        found[function.tool] = function
    return tuple(found.values())


def _message(message: AnyMessage) -> Message:
    """A message, checked, as the prompt's maker takes it."""
    if isinstance(message, AssistantMessage):
        calls = tuple(
            (call.id, read_call(call.function.name, call.function.arguments)) for call in message.tool_calls or []
        )
        text = "" if message.content is None else _text(message.content)
        return Message("assistant", text, calls, message.reasoning_content)
    if isinstance(message, ToolMessage):
        return Message("tool", _text(message.content), call_id=message.tool_call_id)
    return Message("user" if message.role == "user" else "system", _text(message.content))


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


async def _respond(request: Request, user: User, body: Common, plan: Plan) -> Response:
    """Answer in one piece, or as a stream."""
    if body.stream:
        source = _stream(request, user, plan, usage=bool(body.stream_options and body.stream_options.include_usage))
        return await event_stream(request, source)
    choices = await until_gone(request, _gather(request, user, plan))
    return JSONResponse(plan.form.whole(choices, each=plan.each, logprobs=plan.logprobs))


async def _gather(request: Request, user: User, plan: Plan) -> list[Choice]:
    choices = [Choice() for _ in plan.sources]
    async with _accounted(request, user, choices, plan), aclosing(merge(plan.sources)) as parts:
        async for number, part in parts:
            choices[number].take(part)
    return choices


async def _stream(request: Request, user: User, plan: Plan, *, usage: bool) -> AsyncGenerator[bytes, None]:
    """The events of a stream."""
    choices = [Choice() for _ in plan.sources]
    begun: set[int] = set()
    offsets = [0] * len(choices)
    async with _accounted(request, user, choices, plan), aclosing(merge(plan.sources)) as parts:
        async for number, part in parts:
            choices[number].take(part)
            if number not in begun:
                begun.add(number)
                yield sse(plan.form.chunk(number, {"role": "assistant", "content": ""}))
            if isinstance(part, Delta):
                scores = plan.form.logprobs(part.tokens, offset=offsets[number]) if plan.logprobs else None
                offsets[number] += len(part.text)
                if part.text or scores:
                    yield sse(plan.form.chunk(number, {"content": part.text}, logprobs=scores))
            elif isinstance(part, Thoughts) and (delta := plan.form.thoughts_delta(part)):
                yield sse(plan.form.chunk(number, delta))
            elif isinstance(part, Done):
                yield sse(plan.form.chunk(number, {}, reason=part.reason))
    if usage:
        yield sse(plan.form.usage_chunk(choices, each=plan.each))
    yield DONE


@asynccontextmanager
async def _accounted(request: Request, user: User, choices: Sequence[Choice], plan: Plan) -> AsyncIterator[None]:
    """Enter what was used, for the key and for the log, however the answers end."""
    try:
        yield
    finally:
        await asyncio.shield(_account(request, user, choices, plan))


async def _account(request: Request, user: User, choices: Sequence[Choice], plan: Plan) -> None:
    for choice, tally in zip(choices, plan.tallies, strict=True):
        if not choice.usage.prompt_tokens:  # it was broken off
            choice.usage = tally.usage
    usage = usage_of(choices, plan.each)
    notes_of(request).update(prompt_tokens=usage["prompt_tokens"], new_tokens=usage["completion_tokens"])
    if service_of(request).settings.log_texts:
        notes_of(request)["answers"] = [choice.text for choice in choices]
    await service_of(request).users.charge(user, usage["total_tokens"])
