"""The Streamlit page in a real browser, on servers that speak by rule and on moss-tiny."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chromium import Chromium, Tab
from live_server import LiveServer
from toy_tools import HEIGHT, WIDTH
from xss import TEXTS, assert_harmless

from moss_jt.web.words import say

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytest.importorskip("streamlit", reason="streamlit is not installed: pip install -e '.[web]'")
expect = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'"
).expect
ROOT = Path(__file__).parents[2]
NO_MARKDOWN = ("script", "image", "vector", "frame", "details", "style", "form", "breaks out", "half", "template")
SERVE = """
import sys
from moss_jt.web.streamlit_run import serve
serve(sys.argv[1], port=0, on_listening=lambda url: print(url, flush=True))
"""


@contextmanager
def streamlit(server: LiveServer) -> Iterator[str]:
    """The address of a page that asks a server; Ctrl-C ends it."""
    line = [sys.executable, "-c", SERVE, f"http://127.0.0.1:{server.port}"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0


@pytest.fixture(scope="module")
def address(chromium: Chromium, tool_server: LiveServer) -> Iterator[str]:
    """A page on the server with tools; a test without a browser skips before it is there."""
    with streamlit(tool_server) as address:
        yield address


@dataclass
class Chat:
    """The page as its user sees it."""

    page: Page

    def open(self, address: str) -> Chat:
        self.page.goto(address)
        self.field.wait_for()
        return self

    @property
    def field(self) -> Locator:
        return self.page.get_by_test_id("stChatInputTextArea")

    @property
    def questions(self) -> Locator:
        return self._messages("stChatMessageAvatarUser").get_by_test_id("stText")

    @property
    def answers(self) -> Locator:
        """Whole messages of the model: thoughts, text, sources, notes."""
        return self._messages("stChatMessageAvatarAssistant")

    def _messages(self, avatar: str) -> Locator:
        return self.page.get_by_test_id("stChatMessage").filter(has=self.page.get_by_test_id(avatar))

    def say(self, text: str) -> None:
        self.field.fill(text)
        self.field.press("Enter")

    def button(self, key: str, language: str = "en") -> Locator:
        return self.page.get_by_role("button", name=say(key, "zh" if language == "zh" else "en"), exact=True)

    def titles(self) -> Locator:
        return self.page.locator(".st-key-conversations button")

    @property
    def answer(self) -> Locator:
        """The last one."""
        return self.answers.last

    def await_answer(self, text: str | re.Pattern[str]) -> None:
        """Wait until the last answer is over and holds a text."""
        expect(self.answer).to_contain_text(text)
        self.button("retry").wait_for()


@pytest.fixture(scope="module")
def opened(chromium: Chromium, address: str) -> Iterator[tuple[Chat, Tab]]:
    """The page in a tab that stays: to load it takes seconds."""
    with chromium.tab() as tab:
        yield Chat(tab.page).open(address), tab


@pytest.fixture
def chat(opened: tuple[Chat, Tab]) -> Iterator[Chat]:
    """A new conversation."""
    chat, tab = opened
    chat.button("new").click()
    expect(chat.answers).to_have_count(0)
    expect(chat.field).to_be_enabled()
    yield chat
    tab.check()


def test_an_answer_streams_and_is_stopped(chat: Chat, tool_server: LiveServer) -> None:
    chat.say("wait for me @hold")
    expect(chat.answer).to_contain_text("you said wait for me @hold")  # and it is not over
    chat.page.get_by_text("中文", exact=True).click()
    expect(chat.answer).to_contain_text("you said wait for me @hold")
    expect(chat.field).to_be_disabled()
    chat.button("stop", "zh").click()
    expect(chat.answer).to_contain_text(say("stopped", "zh"))
    chat.page.get_by_text("English", exact=True).click()
    expect(chat.answer).to_contain_text(say("stopped", "en"))
    chat.say("and on")
    chat.await_answer("you said and on")
    expect(chat.questions).to_have_text(["wait for me @hold", "and on"])
    stored = stored_turns(chat, tool_server)
    assert [(turn["human"], turn["reason"]) for turn in stored] == [
        ("wait for me @hold", "cancelled"),
        ("and on", "stop"),
    ]
    assert stored[0]["answer"] == "you said wait for me @hold"


def stored_turns(chat: Chat, server: LiveServer) -> list[dict[str, str]]:
    """What the server has of the newest conversation that a browser knows."""
    (uids,) = chat.page.evaluate(
        "Object.keys(localStorage).filter(k => k.startsWith('moss-jt')).map(k => localStorage[k])"
    )
    uid = json.loads(uids)[0]
    turns: list[dict[str, str]] = server.client().get(f"/v1/conversations/{uid}").json["turns"]
    return turns


def test_an_answer_is_made_again_and_a_question_is_changed(chat: Chat, tool_server: LiveServer) -> None:
    chat.say("first")
    chat.await_answer("you said first")
    chat.say("@count")
    chat.await_answer(re.compile(r"this is number \d+"))
    number = re.findall(r"number (\d+)", chat.answer.inner_text())
    chat.button("retry").click()
    expect(chat.answer).not_to_contain_text(f"number {number[0]}")
    chat.await_answer(re.compile(r"this is number \d+"))
    chat.button("edit").click()
    expect(chat.page.get_by_role("textbox", name=say("edit", "en"))).to_have_value("@count")
    chat.button("keep").click()
    chat.button("edit").click()
    chat.page.get_by_role("textbox", name=say("edit", "en")).fill("in other words")
    chat.button("send").click()
    chat.await_answer("you said in other words")
    expect(chat.questions).to_have_text(["first", "in other words"])
    assert [turn["human"] for turn in stored_turns(chat, tool_server)] == ["first", "in other words"]


def test_thoughts_calls_and_results_are_folded_and_sources_are_links(chat: Chat) -> None:
    chat.say("@search rain<sup><|1|></sup> and <sup><|2|></sup>")
    chat.await_answer("you said")
    fold = chat.answer.get_by_test_id("stExpander")
    expect(fold.get_by_text("I think", exact=True)).to_be_hidden()
    fold.get_by_text(say("thoughts", "en")).click()
    expect(fold.get_by_text("I think", exact=True)).to_be_visible()
    expect(fold).to_contain_text('Search("rain')
    expect(fold).to_contain_text("<|1|>: ")
    links = chat.answer.get_by_role("link")
    expect(links.filter(has_text="[1]")).to_have_attribute("href", re.compile(r"^https://example\.org/\?q=rain"))
    expect(links.filter(has_text="Page of rain")).to_have_count(1)
    expect(links.filter(has_text="[2]")).to_have_count(0)  # its address is a script
    expect(chat.answer).to_contain_text("Trap of rain")
    assert_harmless(chat.page)


def test_a_picture_is_shown(chat: Chat) -> None:
    chat.say("@draw a house")
    chat.await_answer("A picture of a test.")
    picture = chat.answer.get_by_role("img")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])") == [
        WIDTH,
        HEIGHT,
    ]


def test_several_conversations(chat: Chat, tool_server: LiveServer) -> None:
    chat.say("about apples")
    chat.await_answer("you said about apples")
    chat.button("new").click()
    expect(chat.answers).to_have_count(0)
    chat.say("about **pears**")
    chat.await_answer("you said about pears")
    assert chat.titles().all_inner_texts()[:2] == ["about **pears**", "about apples"]
    chat.page.reload()
    chat.titles().get_by_text("about apples").click()
    chat.await_answer("you said about apples")
    with chat.page.expect_download() as download:
        chat.button("export").click()
    exported = json.loads(Path(download.value.path()).read_text("utf-8"))
    assert [turn["human"] for turn in exported["turns"]] == ["about apples"]
    chat.button("delete").click()
    expect(chat.titles().get_by_text("about apples")).to_have_count(0)
    expect(chat.titles().get_by_text("about **pears**")).to_be_visible()
    assert tool_server.client().get(f"/v1/conversations/{exported['uid']}").status == 404
    assert exported["uid"] not in chat.page.evaluate("JSON.stringify(localStorage)")


def test_an_answer_goes_on_while_another_conversation_is_shown(chat: Chat) -> None:
    chat.say("the slow one @hold")
    expect(chat.answer).to_contain_text("you said the slow one")
    chat.button("new").click()
    chat.say("the quick one")
    chat.await_answer("you said the quick one")
    chat.titles().get_by_text("the slow one").click()
    expect(chat.questions).to_have_text(["the slow one @hold"])
    expect(chat.answer).to_contain_text("you said the slow one")
    chat.button("stop").click()
    chat.await_answer(say("stopped", "en"))


def test_the_sliders_do_what_they_say(chat: Chat) -> None:
    chat.page.get_by_text(say("sampling", "en"), exact=True).click()
    for key in ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens"):
        chat.page.get_by_role("slider", name=say(key, "en")).press("ArrowRight")
        chat.page.wait_for_timeout(500)  # the page is drawn anew, and would lose the next key
    seed = chat.page.get_by_role("spinbutton", name=say("seed", "en"))
    seed.fill("7")
    seed.press("Enter")
    chat.say("@settings")
    chat.await_answer("temperature 0.75, top_p 0.81, top_k 41, repetition_penalty 1.03, max_new_tokens ")
    chat.await_answer(re.compile(r", seed 7\b"))
    longer = tokens_left(chat)
    chat.button("reset").click()
    expect(seed).to_have_value("")
    chat.button("retry").click()
    chat.await_answer("temperature 0.7, top_p 0.8, top_k 40, repetition_penalty 1.02, max_new_tokens ")
    assert longer - tokens_left(chat) == 1


def tokens_left(chat: Chat) -> int:
    """How long the answer to "@settings" might have been: what was asked, less the thoughts."""
    found = re.search(r"max_new_tokens (\d+)", chat.answer.inner_text())
    assert found
    return int(found[1])


def test_code_formulas_and_tables_are_rendered(chat: Chat) -> None:
    chat.field.fill(
        "so:\n\n```python\nprint(1 < 2)\n```\n\nand $x^2$ and \\(y_1\\)\n\n| a | b |\n|---|---|\n| `c|d` | 2 |\n"
    )
    chat.field.press("Enter")
    chat.await_answer("you said so:")
    expect(chat.answer.locator("pre code")).to_have_text("print(1 < 2)")
    expect(chat.answer.locator(".katex")).to_have_count(2)
    expect(chat.answer.locator("td").first).to_be_visible()


def test_an_error_of_the_server_is_told_and_the_question_is_not_lost(chat: Chat) -> None:
    chat.say("@bad luck")
    expect(chat.answer.get_by_test_id("stAlert")).to_contain_text("the toy was asked to fail")
    expect(chat.questions).to_have_text(["@bad luck"])
    expect(chat.button("retry")).to_be_visible()


def test_texts_stay_texts(chat: Chat, tool_server: LiveServer) -> None:
    client, uid = tool_server.client(), None
    for text in TEXTS.values():
        uid = client.say(f"@search {text}", uid)["uid"]
    name = f"moss-jt http://127.0.0.1:{tool_server.port}"
    chat.page.evaluate("([name, uids]) => localStorage.setItem(name, uids)", [name, json.dumps([uid])])
    chat.page.reload()
    chat.titles().first.click()
    expect(chat.answers).to_have_count(len(TEXTS))
    chat.button("retry").wait_for()
    assert chat.questions.all_inner_texts() == [f"@search {text}" for text in TEXTS.values()]
    answers = [" ".join(answer.split()) for answer in chat.answers.all_inner_texts()]
    for (name, text), answer in zip(TEXTS.items(), answers, strict=True):
        assert name not in NO_MARKDOWN or f"you said @search {text}" in answer, name
    chat.page.evaluate("document.querySelectorAll('summary').forEach(summary => summary.click())")
    expect(chat.answer.get_by_text("I think", exact=True)).to_be_visible()
    assert_harmless(chat.page)


def test_texts_stay_texts_while_they_stream(chat: Chat) -> None:
    for name in ("script", "image", "link"):
        chat.say(f"{TEXTS[name]} @hold {name}")
        expect(chat.answer).to_contain_text(f"@hold {name}")
        assert_harmless(chat.page)
        chat.button("stop").click()
        chat.await_answer(say("stopped", "en"))
        assert_harmless(chat.page)


def test_moss_tiny_thinks_calculates_and_answers(tab: Tab, tiny_server: LiveServer) -> None:
    with streamlit(tiny_server) as address:
        chat = Chat(tab.page).open(address)
        chat.say("What is 12 * 11?")
        chat.await_answer("132")
        fold = chat.answer.get_by_test_id("stExpander")
        fold.get_by_text(say("thoughts", "en")).click()
        expect(fold).to_contain_text("Calculate(")
        expect(chat.page.get_by_test_id("stSidebar")).to_contain_text(re.compile(r"[1-9][0-9.]* tokens/s"))
        expect(chat.page.get_by_test_id("stSidebar")).to_contain_text(re.compile(r"held in memory: [1-9]"))
