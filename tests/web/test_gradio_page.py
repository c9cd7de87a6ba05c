"""The main page in a real Chromium, on servers with the toy engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from chromium import Chromium, Profile, Tab
from finding_tools import PICTURE, FindingTools
from live_server import LONGEST_S, Client, LiveServer, until
from xss import TEXTS, assert_harmless

from moss_jt.config import GenerationConfig
from moss_jt.server.calls import FoundSource
from moss_jt.server.keys import add_key, remove_key
from moss_jt.web.words import say

if TYPE_CHECKING:
    from fastapi import FastAPI
    from playwright.sync_api import Locator, Page

pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[web]'")
expect = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'"
).expect

SOURCES = (
    FoundSource(1, f"A page {TEXTS['image']}", "https://example.org/page?a=1&b=2"),
    FoundSource(2, TEXTS["script"], "javascript:alert('a source')"),
)


@contextmanager
def gradio(server: LiveServer, *, logs_in: bool = False) -> Iterator[str]:
    """The address of a page that asks a server."""
    from moss_jt.web.hosting import GRADIO_VARIABLES, PageServer
    from moss_jt.web.visitors import Visitors

    visitors = Visitors(f"http://127.0.0.1:{server.port}")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in GRADIO_VARIABLES.items():
            patch.setenv(name, value)
        from moss_jt.web.gradio_page import page_app

        async def built() -> FastAPI:
            """Within a loop: where none runs, Gradio makes some and leaves them."""
            return page_app(visitors, logs_in=logs_in)

        with ThreadPoolExecutor(1) as pool:  # in this thread a browser's may run
            app = pool.submit(asyncio.run, built()).result()
    page = PageServer(app, host="127.0.0.1", port=0, guarded=logs_in, on_end=visitors.close)
    thread = threading.Thread(target=page.run)
    thread.start()
    until(lambda: page.started or not thread.is_alive(), "the page listens")
    try:
        yield page.url
    finally:
        page.should_exit = True
        thread.join(LONGEST_S)
        assert not thread.is_alive()


@dataclass
class Chat:
    """The page as its user sees it."""

    tab: Tab

    @property
    def page(self) -> Page:
        return self.tab.page

    def open(self, address: str) -> Chat:
        """Open the page, or open it again: Gradio then complains of the connection that ended with the last."""
        self.page.goto(address)
        expect(self.send).to_have_text(re.compile(f"{say('send', 'en')}|{say('send', 'zh')}"))
        expect(self.part("state")).to_contain_text(re.compile(r"\w.*\d|\w \w"))  # what opening brings has come
        ended = ("AbortError: signal is aborted", "Connection errored out")
        self.tab.problems[:] = [one for one in self.tab.problems if not any(words in one for words in ended)]
        return self

    def part(self, name: str) -> Locator:
        return self.page.locator(f"#moss-{name}")

    @property
    def field(self) -> Locator:
        return self.page.locator("#moss-text textarea")

    @property
    def send(self) -> Locator:
        return self.part("send")

    @property
    def questions(self) -> Locator:
        return self.page.locator("#moss-chat .moss-said")

    @property
    def answers(self) -> Locator:
        return self.page.locator("#moss-chat .moss-answer")

    @property
    def titles(self) -> Locator:
        return self.page.locator("#moss-talks label")

    def say(self, text: str) -> None:
        self.field.fill(text)
        self.field.press("Enter")

    def ask(self, text: str, answer: str | None = None) -> None:
        """Say something and wait for the whole answer."""
        count = self.questions.count()
        self.say(text)
        expect(self.questions).to_have_count(count + 1)
        self.await_answer(answer or f"you said {text}")

    def await_answer(self, text: str | re.Pattern[str]) -> None:
        expect(self.answers.last).to_contain_text(text)
        expect(self.send).to_be_visible()

    def begin(self) -> None:
        """A new conversation."""
        self.part("new").click()
        expect(self.questions).to_have_count(0)


@pytest.fixture(scope="module")
def profile(chromium: Chromium) -> Iterator[Profile]:
    """A browser that need not load Gradio's scripts for every test."""
    with chromium.profile() as profile:
        yield profile


@pytest.fixture(scope="module")
def address(chromium: Chromium, toy_server: LiveServer) -> Iterator[str]:
    """A page on the server without tools; a test without a browser skips before it is there."""
    with gradio(toy_server) as address:
        yield address


@pytest.fixture(scope="module")
def finding_address(chromium: Chromium, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page on a server whose tools find what would do harm where a page let it."""
    tools = FindingTools(TEXTS["image"] + TEXTS["breaks out"], SOURCES)
    with LiveServer(tmp_path_factory.mktemp("finding"), tools=tools) as live, gradio(live) as address:
        yield address


@dataclass
class Opened:
    """A page that several tests use, each with a new conversation: to load it takes longer than to use it."""

    tab: Tab
    chat: Chat

    def begin(self) -> Chat:
        if not self.chat.send.is_visible():  # a test has failed in the midst of an answer
            self.chat.open(self.chat.page.url)
        self.chat.begin()
        return self.chat

    def check(self) -> None:
        assert_harmless(self.tab.page)
        assert not self.tab.problems, "\n".join(self.tab.problems)


@pytest.fixture(scope="module")
def opened(profile: Profile, address: str) -> Iterator[Opened]:
    """The page on the server without tools."""
    with profile.tab() as tab:
        yield Opened(tab, Chat(tab).open(address))


@pytest.fixture(scope="module")
def opened_finding(profile: Profile, finding_address: str) -> Iterator[Opened]:
    """The page on the server with tools."""
    with profile.tab() as tab:
        yield Opened(tab, Chat(tab).open(finding_address))


@pytest.fixture
def chat(opened: Opened) -> Iterator[Chat]:
    """A new conversation."""
    yield opened.begin()
    opened.check()


@pytest.fixture
def finding(opened_finding: Opened) -> Iterator[Chat]:
    """The same with tools."""
    yield opened_finding.begin()
    opened_finding.check()


def test_an_answer_streams_and_outlives_a_reload(chat: Chat, address: str) -> None:
    chat.ask("hello")
    chat.ask("and **bold** `code`", "you said and bold code")
    assert chat.answers.last.locator("strong").inner_text() == "bold"
    assert chat.answers.last.locator("code").inner_text() == "code"
    chat.open(address)
    expect(chat.answers).to_have_count(2)
    assert chat.questions.all_inner_texts() == ["hello", "and **bold** `code`"]
    chat.ask("once more")


def test_formulas_are_set_and_money_is_not(chat: Chat) -> None:
    chat.say("$x^2$, \\(x^2\\), $$x^2$$, \\[x^2\\] for $5 or $6")
    chat.await_answer("for $5 or $6")
    assert chat.answers.last.locator(".katex").count() == 4
    assert chat.answers.last.locator(".katex-display").count() == 2
    assert chat.answers.last.locator(".katex msup").count() == 4, "as MathML, for those who listen"


def test_code_stays_as_it_was_written(chat: Chat) -> None:
    code = "def f(x):\n    if x < 1 && y:\n\n        return '<b>'\n"
    chat.say(f"this:\n\n```python\n{code}```")
    chat.await_answer("return '<b>'")
    assert chat.answers.last.locator("pre code.language-python").text_content() == code


def test_an_answer_is_stopped_and_kept(chat: Chat, toy_server: LiveServer) -> None:
    chat.say("wait @hold")
    expect(chat.answers.last).to_contain_text("you said wait @hold")
    expect(chat.send).to_be_hidden()
    expect(chat.part("retry")).to_be_disabled()
    chat.part("stop").click()
    expect(chat.page.locator("#moss-chat .moss-note")).to_have_text(say("stopped", "en"))
    expect(chat.send).to_be_visible()
    until(lambda: toy_server.service.dispatcher.running == 0, "the engine is let go")
    chat.ask("go on")
    assert [turn["answer"] for turn in exported(chat)["turns"]] == ["you said wait @hold", "you said go on"]


def test_closing_the_tab_ends_the_answer(profile: Profile, address: str, toy_server: LiveServer) -> None:
    with profile.tab() as tab:
        chat = Chat(tab).open(address)
        chat.begin()
        chat.say("wait @hold")
        expect(chat.answers.last).to_contain_text("you said wait @hold")
        assert toy_server.service.dispatcher.running == 1
    until(lambda: toy_server.service.dispatcher.running == 0, "the engine is let go")


def test_the_last_question_is_answered_anew(chat: Chat) -> None:
    chat.ask("one")
    chat.ask("@count", "this is number")
    before = chat.answers.last.inner_text()
    chat.part("retry").click()
    expect(chat.answers.last).not_to_have_text(before)
    chat.await_answer("this is number")
    turns = exported(chat)["turns"]
    assert [turn["human"] for turn in turns] == ["one", "@count"]
    assert turns[1]["answer"] == chat.answers.last.inner_text() != before


def test_the_last_question_is_asked_in_other_words(chat: Chat) -> None:
    chat.ask("one")
    chat.ask("two <b>")
    chat.part("edit").click()
    expect(chat.field).to_have_value("two <b>")
    expect(chat.part("editing")).to_contain_text(say("editing", "en"))
    chat.say("three")
    chat.await_answer("you said three")
    assert chat.questions.all_inner_texts() == ["one", "three"]
    assert [turn["human"] for turn in exported(chat)["turns"]] == ["one", "three"]


def test_one_need_not_edit(chat: Chat) -> None:
    chat.ask("one")
    chat.part("edit").click()
    expect(chat.field).to_have_value("one")
    chat.part("keep").click()
    expect(chat.field).to_have_value("")
    chat.ask("two")
    assert chat.questions.all_inner_texts() == ["one", "two"]


def test_conversations_are_chosen_and_deleted(chat: Chat, address: str) -> None:
    chat.ask("about cats")
    chat.begin()
    chat.ask("about dogs")
    chat.titles.filter(has_text="about cats").click()
    expect(chat.questions).to_have_text(["about cats"])
    chat.ask("more cats")
    chat.open(address)
    expect(chat.questions).to_have_text(["about cats", "more cats"])
    chat.part("delete").click()
    expect(chat.questions).to_have_count(0)
    expect(chat.titles.filter(has_text="about cats")).to_have_count(0)
    chat.titles.filter(has_text="about dogs").click()
    expect(chat.questions).to_have_text(["about dogs"])


def test_one_that_is_gone_leaves_the_list(chat: Chat, toy_server: LiveServer) -> None:
    chat.ask("about a secret")
    uid = exported(chat)["uid"]
    chat.begin()
    Client(toy_server.port).ask("DELETE", f"/v1/conversations/{uid}")
    chat.titles.filter(has_text="about a secret").click()
    expect(chat.titles.filter(has_text="about a secret")).to_have_count(0)
    chat.ask("hello")


def exported(chat: Chat) -> dict[str, list[dict[str, str]]]:
    """What the page exports."""
    with chat.page.expect_download() as download:
        chat.part("export").click()
    found: dict[str, list[dict[str, str]]] = json.loads(Path(download.value.path()).read_text("utf-8"))
    return found


def test_a_conversation_is_exported_as_the_server_has_it(chat: Chat) -> None:
    chat.ask("你好")
    (turn,) = exported(chat)["turns"]
    assert (turn["human"], turn["answer"]) == ("你好", "you said 你好")


def test_tools_are_folded_sources_are_links_and_pictures_are_seen(finding: Chat, finding_address: str) -> None:
    query = f"rain <sup><|1|></sup> and <sup><|2|></sup> {TEXTS['image']}"
    finding.say(f"@search {query}")
    finding.await_answer("you said @search rain")
    for _ in range(2):  # as it came, and as it was kept
        thoughts = finding.page.get_by_text(say("thoughts", "en"), exact=True)
        assert finding.page.locator(".moss-parts").count() == 0, "folded"
        thoughts.click()
        parts = finding.page.locator(".moss-parts pre")
        expect(parts).to_have_count(3)
        assert parts.all_inner_texts()[:2] == ["I think", f'Search("{query}")']
        assert parts.last.inner_text().endswith(f"=>\n<|1|>: '{TEXTS['image'] + TEXTS['breaks out']}'")
        links = finding.answers.last.locator("sup a")
        assert {link.get_attribute("href") for link in links.all()} == {SOURCES[0].url}
        assert "noopener noreferrer" in (links.first.get_attribute("rel") or "")
        listed = finding.page.locator(".moss-sources li")
        assert listed.all_inner_texts() == [f"[1] {SOURCES[0].title}", f"[2] {SOURCES[1].title}"]
        picture = finding.page.locator(".moss-picture img")
        expect(picture).to_have_js_property("naturalWidth", int.from_bytes(PICTURE[16:20], "big"))
        assert picture.get_attribute("alt") == "a sketch"
        finding.open(finding_address)
        expect(finding.questions).to_have_count(1)


def test_texts_stay_texts(chat: Chat) -> None:
    """In a question, in its answer, in the list of conversations; what tools find is in the test above."""
    texts = list(TEXTS.values())
    heaps = ["\n\n".join(texts[at : at + 4]) for at in range(0, len(texts), 4)]
    for number, heap in enumerate(heaps):
        chat.say(f"{heap}\n\nthe end of {number}")
        chat.await_answer(f"the end of {number}")
    assert chat.questions.all_text_contents() == [f"{heap}\n\nthe end of {n}" for n, heap in enumerate(heaps)]
    for text in (TEXTS["script"], TEXTS["frame"], TEXTS["half"], TEXTS["link"]):
        expect(chat.answers.filter(has_text=text)).to_have_count(1)
    expect(chat.titles.first).to_contain_text(TEXTS["script"][:30])


@pytest.mark.parametrize("name", ["script", "half", "link", "code", "formula"])
def test_a_text_that_still_arrives_stays_a_text(chat: Chat, name: str) -> None:
    chat.say(f"@hold {TEXTS[name]}")
    expect(chat.answers.last).to_contain_text("you said @hold")
    assert_harmless(chat.page)
    chat.part("stop").click()
    expect(chat.send).to_be_visible()


def test_the_language_is_switched_and_remembered(chat: Chat, address: str) -> None:
    chat.ask("你好")
    chat.part("language").get_by_text("中文").click()
    expect(chat.send).to_have_text(say("send", "zh"))
    expect(chat.part("state")).to_contain_text(say("tools", "zh"))
    expect(chat.part("new")).to_have_text(say("new", "zh"))
    expect(chat.questions).to_have_text(["你好"])
    chat.open(address)
    expect(chat.send).to_have_text(say("send", "zh"))
    chat.part("language").get_by_text("English").click()
    expect(chat.send).to_have_text(say("send", "en"))


def told(chat: Chat) -> dict[str, str]:
    """What the model says of its settings."""
    pairs = (pair.split(" ") for pair in chat.answers.last.inner_text().split(", "))
    return {name: value for name, value in pairs if name in WISHES}


WISHES = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed")


def test_the_sliders_do_what_they_say(chat: Chat) -> None:
    chat.part("sampling").get_by_text(say("sampling", "en"), exact=True).click()
    wanted: dict[str, str] = dict(zip(WISHES, ("1.3", "0.55", "7", "1.11", "240", "12"), strict=True))
    fields = {name: chat.part(name.replace("_", "-")).locator("input[type=number]") for name in wanted}

    def all_set() -> bool:
        """Set them; what was set while Gradio still unfolded the sliders may be as before."""
        for name, field in fields.items():
            if field.input_value() != wanted[name]:
                field.fill(wanted[name])
                field.press("Tab")
        chat.page.wait_for_timeout(500)
        return {name: field.input_value() for name, field in fields.items()} == wanted

    until(all_set, "the sliders stay where they were put")
    chat.ask("@settings", "temperature")
    assert told(chat) == wanted
    chat.part("reset").click()
    expect(chat.part("temperature").locator("input[type=number]")).to_have_value("0.7")
    chat.ask("@settings", "temperature 0.7")
    found, default = told(chat), GenerationConfig()
    assert found.pop("seed") != "12", "another each time"
    assert found == {name: str(getattr(default, name)) for name in found}


def test_answers_may_be_asked_for_where_the_longest_is_short(profile: Profile, tmp_path: Path) -> None:
    """The slider began beyond its end, which Gradio refused with every question."""
    with LiveServer(tmp_path, max_new_tokens=100) as live, gradio(live) as address, profile.tab() as tab:
        chat = Chat(tab).open(address)
        chat.ask("@settings", "max_new_tokens 100")
        chat.part("sampling").get_by_text(say("sampling", "en"), exact=True).click()
        field = chat.part("max-new-tokens").locator("input[type=number]")
        expect(field).to_have_value("100")
        chat.part("temperature").locator("input[type=number]").fill("1.3")
        chat.part("reset").click()
        expect(chat.part("temperature").locator("input[type=number]")).to_have_value("0.7")
        expect(field).to_have_value("100")
        chat.ask("and **again**", "you said and again")


def test_speed_and_memory_are_shown(chat: Chat) -> None:
    chat.ask("hello")
    state = chat.part("state")
    expect(state).to_contain_text("tokens/s")
    expect(state).to_contain_text("1 MiB")
    expect(state).to_contain_text("toy")


def test_a_refusal_is_told_and_the_words_come_back(chat: Chat) -> None:
    chat.ask("hello")
    chat.say("@bad <img src=x onerror=alert(1)>")
    expect(chat.page.get_by_text("the toy was asked to fail")).to_be_visible()
    expect(chat.field).to_have_value("@bad <img src=x onerror=alert(1)>")
    expect(chat.questions).to_have_text(["hello"])
    chat.ask("well then")


@pytest.fixture(scope="module")
def keyed_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, int]]:
    """A page that wants a key, and its port."""
    folder = tmp_path_factory.mktemp("keyed")
    with LiveServer(folder, keys=("alice", "bob")) as live, gradio(live, logs_in=True) as address:
        yield live, int(address.rpartition(":")[2])


def test_one_logs_in_with_a_key_and_sees_ones_own(profile: Profile, keyed_page: tuple[LiveServer, int]) -> None:
    live, port = keyed_page
    live.client("bob").say("what bob says")
    with profile.tab() as tab:
        tab.page.goto(f"http://127.0.0.1:{port}")
        fields = tab.page.locator("input")
        expect(fields).to_have_count(2)
        fields.nth(0).fill("alice")
        fields.nth(1).fill(live.keys["alice"])
        tab.page.get_by_role("button").last.click()
        chat = Chat(tab)
        expect(chat.send).to_have_text(say("send", "en"))
        expect(chat.titles).to_have_count(0)
        chat.ask("a secret")
        expect(chat.titles).to_have_text(["a secret"])
    assert [one["title"] for one in live.client("alice").get("/v1/conversations").json["data"]] == ["a secret"]


@pytest.mark.parametrize(
    ("name", "key"), [("alice", "wrong"), ("bob", "alice's"), ("", "alice's"), ("alice", ""), ("alice", "é\n")]
)
def test_nobody_gets_in_without_a_key_of_theirs(keyed_page: tuple[LiveServer, int], name: str, key: str) -> None:
    from moss_jt.web.visitors import Visitors

    live, _ = keyed_page
    with contextlib.closing(Visitors(f"http://127.0.0.1:{live.port}")) as visitors:
        assert not visitors.login(name, live.keys["alice"] if key == "alice's" else key)
        assert visitors.login("alice", live.keys["alice"])
        assert visitors.visitor("alice", "x").client.figures().user == "alice"


def test_a_new_key_of_an_old_name_ends_the_logins_of_the_old(keyed_page: tuple[LiveServer, int]) -> None:
    """Who had logged in with a removed key saw what the next one of its name did, and asked with it."""
    live, port = keyed_page
    with contextlib.ExitStack() as stack:
        old, again, new = (
            stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False)) for _ in range(3)
        )

        def log_in(browser: httpx.Client, key: str) -> None:
            assert browser.post("/login", data={"username": "carol", "password": key}).status_code == 200

        key = live.database.now(add_key, "carol")
        log_in(old, key)
        log_in(again, key)
        assert [browser.get("/config").status_code for browser in (old, again)] == [200, 200]
        live.database.now(remove_key, "carol", keep_conversations=False)
        log_in(new, live.database.now(add_key, "carol"))
        assert [browser.get("/config").status_code for browser in (old, again, new)] == [401, 401, 200]


def test_a_page_that_wants_a_key_does_nothing_without(keyed_page: tuple[LiveServer, int]) -> None:
    page = Client(keyed_page[1])
    assert b"moss-send" not in page.get("/").body, "what is on the page is not told before the login"
    for path in ("/config", "/gradio_api/info"):
        assert page.get(path).status == 401, path
    asked = {"fn_index": 0, "data": [], "session_hash": "x"}
    for path in ("/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/upload"):
        assert page.post(path, asked).status == 401, path


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:80", "Origin": "http://evil.example:80"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ],
)
def test_other_sites_cannot_use_the_page(address: str, headers: dict[str, str]) -> None:
    page = Client(int(address.rpartition(":")[2]))
    assert page.ask("GET", "/", headers=headers).status == 403
    assert page.ask("POST", "/gradio_api/queue/join", {}, headers=headers).status == 403


def test_a_browser_is_told_to_load_nothing_from_elsewhere(address: str) -> None:
    reply = Client(int(address.rpartition(":")[2])).get("/")
    assert reply.status == 200
    assert reply.headers["content-security-policy"].startswith("default-src 'self'; ")
    assert b"https://fonts." not in reply.body
