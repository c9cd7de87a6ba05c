"""The harness itself: what a page does wrong is noticed, and nothing but this machine can be reached."""

from __future__ import annotations

import pytest
from chromium import Chromium, Tab
from live_server import LiveServer
from xss import TEXTS, assert_harmless


def test_a_page_without_faults_has_none(tab: Tab, toy_server: LiveServer) -> None:
    tab.page.goto(f"http://127.0.0.1:{toy_server.port}/healthz")
    assert tab.page.inner_text("body").strip() == '{"status":"ok"}'


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("alert('here')", "dialog: here"),
        ("console.error('broken')", "console: broken"),
        ("setTimeout(() => { throw new Error('thrown') })", "uncaught: thrown"),
        ("fetch('https://example.com/', {mode: 'no-cors'}).catch(() => 0)", "request: https://example.com/"),
    ],
)
def test_what_a_page_does_wrong_fails_its_test(chromium: Chromium, script: str, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem), chromium.tab() as tab:
        tab.page.set_content(f"<script>{script}</script><p>done</p>")
        tab.page.wait_for_selector("p")
        tab.page.evaluate("new Promise(done => setTimeout(done))")  # behind what the script had set to come


def test_there_is_nothing_outside(chromium: Chromium) -> None:
    with pytest.raises(AssertionError, match="ERR_NAME_NOT_RESOLVED"), chromium.tab() as tab:
        tab.page.set_content("")
        tab.page.evaluate("fetch('https://example.com/').catch(() => 0)")


@pytest.mark.parametrize("name", ["script", "image", "vector", "frame", "details", "style", "form", "half"])
def test_the_texts_do_harm_where_a_page_lets_them(chromium: Chromium, name: str) -> None:
    with pytest.raises(AssertionError), chromium.tab() as tab:
        tab.page.set_content(f"<p>{TEXTS[name]} ></p>")
        assert_harmless(tab.page)
