"""The Streamlit page. Streamlit runs `show` from top to bottom whenever something is clicked or typed.

What lives longer is in _State: the conversations that are open, and questions that are being asked (moss_jt.web.asking).
Every text of a person, a model or a tool goes through st.text, or through moss_jt.web.rendering_markdown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import streamlit as st

from moss_jt.errors import ServerError
from moss_jt.tools.citations import cited, without_begun
from moss_jt.web.asking import NOT_FOUND, Asked, Asking
from moss_jt.web.client import Figures, Picture, Turn, Wishes
from moss_jt.web.rendering import PICTURE_TYPES
from moss_jt.web.rendering_markdown import answer_markdown, escaped, source_markdown
from moss_jt.web.streamlit_access import (
    client,
    language,
    server_url,
    show_loading,
    show_login,
    show_unreachable,
    told,
    words,
)
from moss_jt.web.streamlit_uids import remember
from moss_jt.web.talks import rows_of
from moss_jt.web.words import LANGUAGES, language_of

POLL_S = 0.25
FIGURES_S = 3.0
LISTED = 50
UNAUTHORISED = 401
UNSCROLLED = 5  # conversations
LIST_HEIGHT = 240
LONGEST_ANSWER = 2048  # where the server does not tell its own limit
# Streamlit's own sign that it draws has a button that stops the drawing, not the answer.
STYLE = """<style>
[data-testid=stStatusWidget] { display: none }
[data-testid=stText] { white-space: pre-wrap; overflow-wrap: anywhere }
[data-testid=stMainBlockContainer] { padding-top: 2rem }
[data-testid=stSidebarUserContent] { padding-top: 0 }
</style>"""


@dataclass
class _Talk:
    """A conversation of this page.

    Attributes:
        uid: None until its first answer has begun.
        is_new: its first answer has begun, and the server has nothing of it yet.
        asking: what is being asked.
        failed: the last question, where the server has nothing of it.
    """

    uid: str | None = None
    is_new: bool = False
    asking: Asking | None = None
    failed: Asked | None = None


@dataclass
class _State:
    """What one visitor does.

    Attributes:
        talk: the conversation that is shown.
        count: of its turns that the server had when it was drawn.
        asked: all in which something is being asked, also those that are not shown.
        uids: of one's conversations, the newest first, where the server lists none.
        added: of these, what the browser has not confirmed yet.
        dropped: uids that were deleted here.
        titles: of conversations that were seen.
        pictures: that were fetched, by conversation and name.
        wishes: what the sliders said; Streamlit forgets it while they are not drawn.
        own: how the model is asked where nobody says; None until it is loaded.
        editing: the last question is being changed.
        speed: of the last answer, tokens per second; 0 where it is not known.
        problem: to tell once.
    """

    talk: _Talk = field(default_factory=_Talk)
    count: int = 0
    asked: list[_Talk] = field(default_factory=list)
    uids: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    titles: dict[str, str] = field(default_factory=dict)
    pictures: dict[tuple[str, str], bytes] = field(default_factory=dict)
    wishes: Wishes = field(default_factory=Wishes)
    own: Wishes | None = None
    editing: bool = False
    speed: float = 0.0
    problem: str = ""


def show() -> None:
    """Draw the page."""
    st.set_page_config(page_title="MOSS", layout="centered")
    st.html(STYLE)
    state = _state()
    with st.sidebar:
        _show_languages()
    st.title(words("title"), anchor=False)
    try:
        _show_page(state, client().figures())
    except ServerError as error:
        if error.status == UNAUTHORISED:
            show_login(error)
        else:
            show_unreachable(str(error))


def _show_page(state: _State, figures: Figures) -> None:
    """What there is to see where the server answers."""
    ready = client().readiness().ready
    _settle(state, lists=figures.lists)
    talk = state.talk
    turns = _turns(talk.uid)
    state.count = len(turns)
    with st.sidebar:
        _show_conversations(state, lists=figures.lists)
        with st.container(horizontal=True):  # also where it is empty: what comes behind it keeps its place
            if talk.uid is not None and turns and talk.asking is None:
                _show_ways_out(talk.uid)
        if state.own is None and figures.model:
            state.own = figures.wishes
            if state.wishes == Wishes():  # nobody has chosen while it was loaded
                _take_wishes(figures.wishes)
        _show_sampling(state, figures.longest_answer or LONGEST_ANSWER)
        _show_figures(state.speed)
    if not ready:
        show_loading()
    st.chat_input(words("ask"), key="prompt", disabled=talk.asking is not None or not ready, on_submit=_send)
    _show_talk(state, turns)


def _state() -> _State:
    if "state" not in st.session_state:
        st.session_state["state"] = _State()
        st.session_state["language"] = language_of(st.context.headers.get("Accept-Language"))
    state: _State = st.session_state["state"]
    return state


# ---- what is clicked ------------------------------------------------------------------------------------------------


def _send() -> None:
    """Ask what was typed."""
    _ask(st.session_state["prompt"])


def _ask(text: str, *, instead: bool = False) -> None:
    """Ask; where it is `instead`, the last turn gives its place once there is an answer."""
    state = _state()
    talk = state.talk
    if not text.strip() or talk.asking is not None:
        return
    number = state.count - 1 if instead else state.count
    talk.asking = Asking(client(), text, uid=talk.uid, number=number, wishes=_wishes(), instead=instead)
    talk.failed = None
    state.editing = False
    state.asked.append(talk)


def _open(uid: str | None) -> None:
    """Show a conversation, or a new one."""
    state = _state()
    state.editing = False
    state.talk = next((talk for talk in state.asked if uid is not None and talk.uid == uid), _Talk(uid))


def _delete(uid: str) -> None:
    try:
        client().delete(uid)
    except ServerError as error:
        if error.status != NOT_FOUND:
            _state().problem = str(error)
            return
    _state().dropped.append(uid)
    _open(None)


def _edit(wanted: bool) -> None:
    _state().editing = wanted


def _reset_sampling() -> None:
    """Give the sliders the model's own values."""
    _take_wishes(_state().own or Wishes())


def _take_wishes(wishes: Wishes) -> None:
    for name, value in vars(wishes).items():
        st.session_state[name] = value


def _wishes() -> Wishes:
    """What the sliders say; they hold their values under the names of the fields."""
    return Wishes(**{name: st.session_state[name] for name in vars(Wishes())})


# ---- conversations --------------------------------------------------------------------------------------------------


def _settle(state: _State, *, lists: bool) -> None:
    """Take note of conversations that have begun and of answers that are over."""
    for talk in list(state.asked):
        assert talk.asking is not None, "so it came into this list"
        asked = talk.asking.look()
        if asked.uid is not None and talk.uid is None:
            talk.uid, talk.is_new = asked.uid, True
            state.added.insert(0, asked.uid)
        if asked.uid is not None and asked.number == 0 and (asked.kept or asked.uid not in state.titles):
            state.titles[asked.uid] = _title(asked.turn.human)
        if asked.over:
            _end(state, talk, asked)
    if not lists:
        state.uids = remember(server_url(), known=state.uids, added=state.added, dropped=state.dropped)
        state.added = [uid for uid in state.added if uid not in (*state.uids, *state.dropped)]


def _end(state: _State, talk: _Talk, asked: Asked) -> None:
    """Take note that an answer is over."""
    state.asked.remove(talk)
    state.speed = asked.tokens_per_s or state.speed
    talk.asking, talk.failed = None, None if asked.kept else asked
    if talk.is_new and talk.uid is not None and not asked.kept:
        state.dropped.append(talk.uid)  # it has never been
        talk.uid = None
    talk.is_new = False


def _title(text: str) -> str:
    return " ".join(text.split())[:60] or words("no_title")


def _listed(state: _State, *, lists: bool) -> Iterator[tuple[str, str]]:
    """One's conversations, the newest first, with their titles."""
    if lists:
        yield from ((one.uid, _title(one.title)) for one in client().conversations()[:LISTED])
        return
    own = [uid for uid in dict.fromkeys([*state.added, *state.uids]) if uid not in state.dropped]
    for uid in own[:LISTED]:
        if uid not in state.titles:
            turns = _turns(uid)
            if not turns:
                continue
            state.titles[uid] = _title(turns[0].human)
        yield uid, state.titles[uid]


def _turns(uid: str | None) -> tuple[Turn, ...]:
    """What the server has of a conversation; nothing of one that has not begun, or is no longer there."""
    if uid is None:
        return ()
    try:
        return client().conversation(uid).turns
    except ServerError as error:
        if error.status != NOT_FOUND:
            raise
        return ()


def _show_conversations(state: _State, *, lists: bool) -> None:
    st.button(words("new"), key="new", on_click=_open, args=(None,), width="stretch")
    listed = list(_listed(state, lists=lists))
    with st.container(height=LIST_HEIGHT if len(listed) > UNSCROLLED else "content", border=False, key="conversations"):
        for uid, title in listed:
            st.button(
                escaped(title),
                key=f"open {uid}",
                type="primary" if uid == state.talk.uid else "tertiary",
                on_click=_open,
                args=(uid,),
                width="stretch",
            )


def _show_ways_out(uid: str) -> None:
    name, content = f"moss-{uid[:8]}.json", client().export(uid)
    st.download_button(words("export"), content, name, "application/json", on_click="ignore")
    st.button(words("delete"), on_click=_delete, args=(uid,))


# ---- the conversation that is shown ---------------------------------------------------------------------------------


def _show_talk(state: _State, turns: tuple[Turn, ...]) -> None:
    if state.problem:
        st.error(escaped(state.problem))
        state.problem = ""
    talk = state.talk
    if talk.asking is not None:
        turns = turns[: talk.asking.look().number]
    elif not turns and talk.failed is None:
        st.caption(words("empty") if talk.uid is None else words("gone"))
    for turn in turns[:-1]:
        _show_turn(turn, talk.uid)
    if turns:
        _show_turn(turns[-1], talk.uid, edits=state.editing)
    if talk.asking is not None:
        _show_asked(talk)
    elif talk.failed is not None:
        _show_failed(talk.failed)
    elif turns and not state.editing:
        with st.container(horizontal=True):
            st.button(words("retry"), key="retry", on_click=_ask, args=(turns[-1].human,), kwargs={"instead": True})
            st.button(words("edit"), key="edit", on_click=_edit, args=(True,))


def _show_turn(turn: Turn, uid: str | None, *, edits: bool = False) -> None:
    """Draw a turn, its question with a field to change it in where it `edits`."""
    with st.chat_message("user"):
        if edits:
            _show_editor(turn.human)
        else:
            st.text(turn.human)
    with st.chat_message("assistant"):
        _show_answer(turn, uid)


def _show_editor(text: str) -> None:
    st.caption(words("editing"))
    st.text_area(words("edit"), text, key="edited", label_visibility="collapsed")
    with st.container(horizontal=True):
        st.button(words("send"), type="primary", on_click=_send_edited)
        st.button(words("keep"), on_click=_edit, args=(False,))


def _send_edited() -> None:
    _ask(st.session_state["edited"], instead=True)


def _show_answer(turn: Turn, uid: str | None, *, over: bool = True) -> None:
    if turn.thoughts or turn.commands or turn.results:
        with st.expander(words("thoughts")):
            for key, text in (("thinks", turn.thoughts), ("commands", turn.commands), ("results", turn.results)):
                if text:
                    st.caption(words(key))
                    st.text(text)
    st.markdown(answer_markdown(turn.answer if over else without_begun(turn.answer), turn.sources))
    if over and uid is not None:
        for picture in turn.pictures:
            _show_picture(uid, picture)
    numbers = cited(turn.answer)
    lines = [f"- {escaped(f'[{one.number}]')} {source_markdown(one)}" for one in turn.sources if one.number in numbers]
    if lines:
        st.caption(f"{words('sources')}\n" + "\n".join(lines))
    note = {"cancelled": "stopped", "length": "cut_length", "time": "cut_time"}.get(turn.reason)
    if over and note is not None:
        st.caption(words(note))


def _show_picture(uid: str, picture: Picture) -> None:
    kept = _state().pictures
    if (uid, picture.name) not in kept:
        try:
            found = client().picture(uid, picture.name)
        except ServerError as error:
            st.caption(escaped(str(error)))
            return
        kept[uid, picture.name] = found.content if found.type in PICTURE_TYPES else b""
    if kept[uid, picture.name]:
        st.image(kept[uid, picture.name])
    st.caption(escaped(picture.note or words("picture")))


@st.fragment(run_every=POLL_S)
def _show_asked(talk: _Talk) -> None:
    """Draw what has come of a question, now and then until it is over."""
    if talk.asking is None:
        return
    asked = talk.asking.look()
    if asked.over or asked.uid != talk.uid:
        st.rerun()
    with st.chat_message("user"):
        st.text(asked.turn.human)
    with st.chat_message("assistant"):
        _show_answer(asked.turn, asked.uid, over=False)
        if not asked.begun:
            st.caption(words("waiting"))
        st.button(words("stop"), key="stop", on_click=talk.asking.stop)


def _show_failed(asked: Asked) -> None:
    """A question of which the server has nothing: it may be asked again."""
    with st.chat_message("user"):
        st.text(asked.turn.human)
    with st.chat_message("assistant"):
        if asked.error:
            st.error(escaped(asked.error))
        else:
            st.caption(words("stopped"))
        st.button(words("retry"), key="retry", on_click=_ask, args=(asked.turn.human,))


# ---- the side -------------------------------------------------------------------------------------------------------


def _show_languages() -> None:
    st.radio(
        words("language"),
        list(LANGUAGES),
        key="language",
        format_func=lambda name: LANGUAGES[name],
        horizontal=True,
        label_visibility="collapsed",
    )


def _show_sampling(state: _State, longest: int) -> None:
    for name, value in vars(state.wishes).items():
        st.session_state.setdefault(name, value)
    st.session_state["max_new_tokens"] = min(st.session_state["max_new_tokens"], longest)
    with st.expander(words("sampling")):
        st.slider(words("temperature"), 0.0, 2.0, step=0.05, key="temperature", help=words("temperature_info"))
        st.slider(words("top_p"), 0.0, 1.0, step=0.01, key="top_p", help=words("top_p_info"))
        st.slider(words("top_k"), 0, 200, step=1, key="top_k", help=words("top_k_info"))
        st.slider(
            words("repetition_penalty"),
            1.0,
            2.0,
            step=0.01,
            key="repetition_penalty",
            help=words("repetition_penalty_info"),
        )
        st.slider(words("max_new_tokens"), 1, longest, step=1, key="max_new_tokens")
        st.number_input(words("seed"), min_value=0, step=1, key="seed", help=words("seed_info"))
        st.button(words("reset"), on_click=_reset_sampling)
    state.wishes = _wishes()


@st.fragment(run_every=FIGURES_S)
def _show_figures(speed: float) -> None:
    """What the server does, drawn anew by itself."""
    with told():
        rows = rows_of(client().figures(), language(), speed)
        st.caption("\\\n".join(f"{escaped(name)}: {escaped(value)}" for name, value in rows))
