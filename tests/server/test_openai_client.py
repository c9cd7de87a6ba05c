"""OpenAI's API, asked by its official client, unmodified."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from live_server import Client, LiveServer, until
from toy_engine import TOKENIZER

from moss_jt.tokenizer import load_tokenizer

TOKENS = len(load_tokenizer(TOKENIZER).encode(" you said hello")) + 1  # and the end marker
SEARCH: Any = {
    "type": "function",
    "function": {
        "name": "web_search",
        "description": "Look something up.",
        "parameters": {
            "type": "object",
            "properties": {"q": {"type": "string", "description": "What to look for."}},
            "required": ["q"],
        },
    },
}


@pytest.fixture
def ai(open_server: LiveServer) -> Iterator[openai.OpenAI]:
    """The official client."""
    with openai.OpenAI(base_url=f"http://127.0.0.1:{open_server.port}/v1", api_key="none", max_retries=0) as made:
        yield made


def user(text: str) -> Any:
    """The messages of a question."""
    return [{"role": "user", "content": text}]


def test_chat(ai: openai.OpenAI) -> None:
    done = ai.chat.completions.create(model="toy", messages=user("hello"))
    assert done.choices[0].message.content == "you said hello"
    assert done.choices[0].finish_reason == "stop"
    assert done.model == "toy"
    assert done.usage is not None
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.usage.completion_tokens == TOKENS


def test_a_stream_is_the_same_in_pieces(ai: openai.OpenAI) -> None:
    stream = ai.chat.completions.create(
        model="toy", messages=user("hello"), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == "you said hello"
    assert len([text for text in texts if text]) > 3
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == TOKENS


def test_stop_strings_are_cut_from_the_answer(ai: openai.OpenAI) -> None:
    done = ai.chat.completions.create(model="toy", messages=user("one two three"), stop=["two"])
    assert done.choices[0].message.content == "you said one "
    assert done.choices[0].finish_reason == "stop"
    stream = ai.chat.completions.create(model="toy", messages=user("one two three"), stop="two", stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "you said one "


def test_a_stopped_stream_ends_the_work(open_server: LiveServer, ai: openai.OpenAI) -> None:
    stream = ai.chat.completions.create(model="toy", messages=user("@long"), max_tokens=3000, stream=True)
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    stream.close()
    until(lambda: open_server.service.dispatcher.running == 0, "the engine lets go of it")


def test_max_tokens_n_and_seed(ai: openai.OpenAI) -> None:
    done = ai.chat.completions.create(model="toy", messages=user("hello"), max_tokens=2, n=3, seed=-5)
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert {choice.message.content for choice in done.choices} == {"you said"}
    assert {choice.finish_reason for choice in done.choices} == {"length"}
    stream = ai.chat.completions.create(model="toy", messages=user("hello"), n=2, stream=True)
    texts = {0: "", 1: ""}
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert set(texts.values()) == {"you said hello"}


def test_logprobs(ai: openai.OpenAI) -> None:
    done = ai.chat.completions.create(model="toy", messages=user("hi"), logprobs=True, top_logprobs=2)
    scores = done.choices[0].logprobs
    assert scores is not None
    assert scores.content is not None
    assert b"".join(bytes(token.bytes or []) for token in scores.content).decode() == " you said hi"
    assert all(token.logprob == token.top_logprobs[0].logprob == -0.5 for token in scores.content)
    text = ai.completions.create(model="toy", prompt="x", logprobs=2).choices[0]
    assert text.logprobs is not None
    assert text.logprobs.tokens is not None
    assert "".join(text.logprobs.tokens) == text.text == " and so on"
    assert text.logprobs.text_offset == [len("".join(text.logprobs.tokens[:at])) for at in range(4)]


def test_the_system_prompt_and_history_are_the_clients(ai: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        *user("one"),
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "text", "text": " three"}]},
    ]
    done = ai.chat.completions.create(model="toy", messages=messages)
    assert done.choices[0].message.content == "you said two three"
    assert done.usage is not None
    assert done.usage.prompt_tokens < 100, "MOSS's own system prompt is not there"


def test_orders_that_programs_send_are_taken(client: Client) -> None:
    messages = [
        {"role": "assistant", "content": "Hello, I am MOSS."},
        {"role": "user", "content": "one"},
        {"role": "user", "content": "and two"},
        {"role": "system", "content": "Be brief."},
    ]
    reply = client.post("/v1/chat/completions", {"messages": messages})
    assert reply.json["choices"][0]["message"]["content"] == "you said one\nand two"


def test_a_history_that_comes_again_is_found_in_the_cache(ai: openai.OpenAI) -> None:
    first = ai.chat.completions.create(model="toy", messages=user("something quite long to remember"))
    messages: Any = [
        *user("something quite long to remember"),
        {"role": "assistant", "content": first.choices[0].message.content},
        *user("and more"),
    ]
    done = ai.chat.completions.create(model="toy", messages=messages)
    assert done.usage is not None
    assert done.usage.prompt_tokens_details is not None
    assert (done.usage.prompt_tokens_details.cached_tokens or 0) > 500


def test_tool_calls_and_their_results(ai: openai.OpenAI) -> None:
    messages: Any = user("@search who wrote it")
    asked = ai.chat.completions.create(model="toy", messages=messages, tools=[SEARCH])
    choice = asked.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    call: Any = choice.message.tool_calls[0]
    assert call.function.name == "web_search"
    assert json.loads(call.function.arguments) == {"q": "who wrote it"}
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "nobody knows"}]
    done = ai.chat.completions.create(model="toy", messages=messages, tools=[SEARCH])
    assert done.choices[0].finish_reason == "stop"
    assert done.choices[0].message.content == (
        "you said @search who wrote it and found Search(\"who wrote it\") =>\n<|1|>: 'nobody knows'"
    )


@pytest.mark.parametrize("closing", [{}, {"tools": [SEARCH], "tool_choice": "none"}])
def test_what_tools_said_is_told_also_where_none_may_be_called(ai: openai.OpenAI, closing: Any) -> None:
    """The form without fields was chosen, which has no place for calls and results."""
    messages: Any = user("@search who wrote it")
    message = ai.chat.completions.create(model="toy", messages=messages, tools=[SEARCH]).choices[0].message
    assert message.tool_calls is not None
    messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "nobody knows"}]
    done = ai.chat.completions.create(model="toy", messages=messages, **closing)
    assert "found Search(\"who wrote it\") =>\n<|1|>: 'nobody knows'" in (done.choices[0].message.content or "")


@pytest.mark.parametrize("stream", [False, True])
def test_calls_come_one_by_one_where_that_is_asked(client: Client, stream: bool) -> None:
    """The field was taken and passed over."""
    body = {"messages": user('@search one"), Search("two'), "tools": [SEARCH]}
    for parallel, count in ((None, 2), (True, 2), (False, 1)):
        asked = {**body, "parallel_tool_calls": parallel}
        if stream:
            with client.stream("/v1/chat/completions", asked) as events:
                deltas = [event["choices"][0]["delta"] for event in events.events()]
            calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        else:
            calls = client.post("/v1/chat/completions", asked).json["choices"][0]["message"]["tool_calls"]
        assert [json.loads(call["function"]["arguments"])["q"] for call in calls] == ["one", "two"][:count]


def test_a_call_that_was_cut_is_none(client: Client) -> None:
    """A stream gave what max_tokens had left of it as a call to answer."""
    body = {"messages": user("@search who wrote it all"), "tools": [SEARCH]}
    reasons = []
    for most in range(1, 60):
        with client.stream("/v1/chat/completions", {**body, "max_tokens": most}) as stream:
            choices = [event["choices"][0] for event in stream.events()]
        reasons.append(choices[-1]["finish_reason"])
        assert any("tool_calls" in choice["delta"] for choice in choices) is (reasons[-1] == "tool_calls"), most
    assert set(reasons) == {"length", "tool_calls"}


def test_tool_calls_in_a_stream(ai: openai.OpenAI) -> None:
    with ai.chat.completions.stream(model="toy", messages=user("@search it"), tools=[SEARCH]) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    calls = final.choices[0].message.tool_calls
    assert calls is not None
    assert json.loads(calls[0].function.arguments) == {"q": "it"}


def test_with_tools_but_no_call_the_answer_comes(ai: openai.OpenAI) -> None:
    done = ai.chat.completions.create(model="toy", messages=user("hello"), tools=[SEARCH])
    assert done.choices[0].message.content == "you said hello"
    done = ai.chat.completions.create(model="toy", messages=user("@search x"), tools=[SEARCH], tool_choice="none")
    assert done.choices[0].message.content == "you said @search x"


def test_other_functions_are_refused(ai: openai.OpenAI) -> None:
    other = {"type": "function", "function": {**SEARCH["function"], "name": "book_flight"}}
    number = json.loads(json.dumps(SEARCH).replace('"type": "string"', '"type": "number"'))
    twice = {"type": "function", "function": {**SEARCH["function"], "name": "search"}}
    wrong: list[Any] = [[other], [number], [SEARCH, twice]]
    for tools in wrong:
        with pytest.raises(openai.BadRequestError, match="tool"):
            ai.chat.completions.create(model="toy", messages=user("hello"), tools=tools)


def test_completions(ai: openai.OpenAI) -> None:
    done = ai.completions.create(model="toy", prompt="Once")
    assert (done.choices[0].text, done.choices[0].finish_reason) == (" and so on", "stop")
    several = ai.completions.create(model="toy", prompt=["a", "b", ""], n=2, max_tokens=1)
    assert [choice.text for choice in several.choices] == [" and"] * 6
    assert several.usage is not None
    assert (several.usage.prompt_tokens, several.usage.completion_tokens) == (3, 6)
    ids = ai.completions.create(model="toy", prompt=[5, 6, 7])
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3
    past = ai.completions.create(model="toy", prompt="Once", max_tokens=30, extra_body={"ignore_eos": True})
    assert (past.usage and past.usage.completion_tokens, past.choices[0].finish_reason) == (30, "length")
    stream = ai.completions.create(model="toy", prompt="Once", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == " and so on"


def test_models(ai: openai.OpenAI) -> None:
    assert [model.id for model in ai.models.list()] == ["toy"]
    assert ai.models.retrieve("toy").owned_by == "moss-jt"
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("gpt")


def test_errors_have_the_kinds_of_the_client(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ai.chat.completions.create(model="toy", messages=user("word " * 4000))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.InternalServerError, match="asked to fail") as failed:
        ai.chat.completions.create(model="toy", messages=user("@bad"))
    assert failed.value.status_code == 503
    assert ai.chat.completions.create(model="toy", messages=user("fine")).choices[0].message.content == "you said fine"


ORDERS: list[list[dict[str, Any]]] = [
    [{"role": "assistant", "content": "x"}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
    [{"role": "user", "content": "x"}, {"role": "tool", "tool_call_id": "1", "content": "y"}],
    [{"role": "system", "content": "x"}],
]


@pytest.mark.parametrize("messages", ORDERS)
def test_an_order_that_cannot_be_is_refused(client: Client, messages: list[dict[str, Any]]) -> None:
    reply = client.post("/v1/chat/completions", {"messages": messages})
    assert reply.status == 400
    assert reply.json["error"]["param"].startswith("messages")


@pytest.mark.parametrize(
    "extra",
    [
        {"presence_penalty": 1},
        {"logit_bias": {"5": 1}},
        {"response_format": {"type": "json_object"}},
        {"tool_choice": "required"},
        {"top_logprobs": 5},
        {"top_logprobs": 5, "logprobs": False},
        {"n": 0},
        {"stop": [""]},
        {"echo": True},
        {"temperature": "1"},
        {"max_tokens": 1.5},
        {"seed": True},
    ],
)
def test_what_cannot_be_honoured_is_refused(client: Client, extra: dict[str, Any]) -> None:
    reply = client.post("/v1/chat/completions", {"messages": user("x"), **extra})
    assert reply.status == 400
    assert next(iter(extra)) in reply.json["error"]["param"]
