"""How the Streamlit page reaches its server, and what it shows while it does not: a login, how far loading is, an error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import streamlit as st

from moss_jt.errors import ServerError
from moss_jt.language import Language
from moss_jt.web.client import ServerClient
from moss_jt.web.rendering_markdown import escaped
from moss_jt.web.words import say

SERVER_VARIABLE = "MOSS_JT_SERVER"
KEY_VARIABLE = "MOSS_JT_KEY"
DEFAULT_SERVER = "http://127.0.0.1:19324"
LOADING_S = 1.0
CLIENTS = 100  # that are kept, each for a key


def client() -> ServerClient:
    """Asks the server with the key of the page, or else with that of this visitor."""
    return _client_of(server_url(), os.environ.get(KEY_VARIABLE) or st.session_state.get("key") or None)


@st.cache_resource(show_spinner=False, max_entries=CLIENTS)
def _client_of(server: str, key: str | None) -> ServerClient:
    return ServerClient(server, key)


def server_url() -> str:
    """The address of the server."""
    return os.environ.get(SERVER_VARIABLE) or DEFAULT_SERVER


def language() -> Language:
    """That of the page now."""
    chosen: Language = st.session_state["language"]
    return chosen


def words(key: str, **values: object) -> str:
    """A wording in it."""
    return say(key, language(), **values)


@st.fragment(run_every=LOADING_S)
def show_loading() -> None:
    """How far loading has come; at the end of it the page is drawn anew."""
    with told():
        found = client().readiness()
        if found.ready:
            st.rerun()
        st.progress(min(1.0, found.share), words("loading", task=escaped(found.task), percent=round(found.share * 100)))


def show_login(error: ServerError) -> None:
    """Ask for a key; it stays in the memory of this page, for as long as its visitor is there."""
    with st.form("login"):
        given = st.text_input(words("key"), type="password")
        st.form_submit_button(words("send"))
    key = given.strip()
    if key and key != st.session_state.get("key") and key.isascii() and key.isprintable():
        st.session_state["key"] = key
        st.rerun()
    if key:
        st.error(escaped(str(error)))


def show_unreachable(error: str) -> None:
    """Tell why the server cannot be asked, until it can or there is another reason."""
    st.error(escaped(error))
    _wait_for_server(error)


@st.fragment(run_every=LOADING_S)
def _wait_for_server(error: str) -> None:
    st.caption(words("waiting"))
    try:
        client().figures()
    except ServerError as now:
        if str(now) == error:
            return
    st.rerun()


@contextmanager
def told() -> Iterator[None]:
    """Show an error of the server in place of what is missing."""
    try:
        yield
    except ServerError as error:
        st.caption(escaped(str(error)))
