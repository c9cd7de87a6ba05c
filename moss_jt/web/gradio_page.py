"""The main page, with Gradio: a face of a server, which keeps the conversations and does the work.

What a browser shows was made harmless in moss_jt.web.rendering before Gradio gets it; Gradio's own cleaning is on
besides. What an act of a visitor leads to is in moss_jt.web.visits; here are components and events.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from html import escape
from pathlib import Path
from typing import Any, cast

import gradio as gr
from fastapi import FastAPI
from gradio.routes import App as GradioApp
from starlette.routing import Mount

from moss_jt.errors import ServerError
from moss_jt.language import Language
from moss_jt.web.client import Figures, ServerClient, Wishes
from moss_jt.web.rendering import FORMULAS, plain_html
from moss_jt.web.talks import messages, state_html
from moss_jt.web.visitors import Visitor, Visitors
from moss_jt.web.visits import Kept, View, chosen, deleted, edited, opened, said, said_again
from moss_jt.web.words import LANGUAGES, language_of, say

CSS = Path(__file__).with_name("page.css")
TICK_S = 3.0  # between two askings for the state of the server
TITLE = 40  # characters in the list
_DOWNLOAD = """(name, text) => {
    if (!text) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
}"""
_RANGES = {  # of the sliders: least, most, step
    "temperature": (0, 2, 0.05),
    "top_p": (0.05, 1, 0.05),
    "top_k": (0, 200, 1),
    "repetition_penalty": (0.5, 2, 0.01),
    "max_new_tokens": (16, 2048, 16),
}
_WHOLE = ("top_k", "max_new_tokens", "seed")
_QUIETLY: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
Updates = dict[Any, Any]  # component -> what is new of it


def theme() -> gr.themes.Base:
    """Gradio's own look with the fonts of the system, so that none is fetched."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


class Page:
    """The page of a server.

    Args:
        visitors: those who look at it.

    Attributes:
        blocks: what Gradio serves.
    """

    def __init__(self, visitors: Visitors) -> None:
        self.visitors = visitors
        with gr.Blocks(title="MOSS", analytics_enabled=False, fill_height=True) as self.blocks:
            self._make_hidden()
            with gr.Sidebar(width=330):
                self._make_sidebar()
            self._make_chat()
            self._connect()

    # ---- what is on the page --------------------------------------------------------------------------------------

    def _make_hidden(self) -> None:
        self.kept = gr.BrowserState(Kept().to_dict(), storage_key="moss-jt", secret="moss-jt")
        self.view = gr.State(View("en"))
        self.file_name = gr.Textbox(visible=False)
        self.file_text = gr.Textbox(visible=False)
        self.timer = gr.Timer(TICK_S)

    def _make_sidebar(self) -> None:
        self.new = gr.Button(elem_id="moss-new", variant="primary")
        self.talks = gr.Radio([], elem_id="moss-talks", interactive=True)
        with gr.Row():
            self.export = gr.Button(elem_id="moss-export", size="sm", min_width=80)
            self.delete = gr.Button(elem_id="moss-delete", size="sm", min_width=80)
        with gr.Accordion(open=False, elem_id="moss-sampling") as self.sampling:
            self.wishes = {name: self._make_wish(name, default) for name, default in _defaults().items()}
            self.reset = gr.Button(size="sm", elem_id="moss-reset")
        with gr.Accordion(elem_id="moss-state") as self.state_box:
            self.state = gr.HTML(apply_default_css=False)
        choices = [(name, key) for key, name in LANGUAGES.items()]
        self.language = gr.Radio(choices, value="en", elem_id="moss-language", interactive=True)

    def _make_wish(self, name: str, default: float | None) -> gr.Slider | gr.Number:
        elem_id = f"moss-{name.replace('_', '-')}"
        if name not in _RANGES:
            return gr.Number(default, precision=0, elem_id=elem_id)
        least, most, step = _RANGES[name]
        return gr.Slider(least, most, default, step=step, elem_id=elem_id)

    def _make_chat(self) -> None:
        self.chat = gr.Chatbot(
            elem_id="moss-chat",
            show_label=False,
            height="72vh",
            layout="panel",
            render_markdown=False,  # what it gets is HTML already
            sanitize_html=True,
            allow_tags=False,
            latex_delimiters=FORMULAS,
            buttons=[],
        )
        self.editing = gr.HTML(visible=False, elem_id="moss-editing", apply_default_css=False)
        with gr.Row(equal_height=True):
            self.text = gr.Textbox(
                elem_id="moss-text", show_label=False, lines=1, max_lines=8, scale=8, autofocus=True, container=False
            )
            self.send = gr.Button(elem_id="moss-send", variant="primary", min_width=80, scale=1)
            self.stop = gr.Button(elem_id="moss-stop", variant="stop", min_width=80, scale=1, visible=False)
        with gr.Row():
            self.retry = gr.Button(elem_id="moss-retry", size="sm")
            self.edit = gr.Button(elem_id="moss-edit", size="sm")
            self.keep = gr.Button(elem_id="moss-keep", size="sm", visible=False)

    # ---- what is shown --------------------------------------------------------------------------------------------

    @property
    def _shown(self) -> list[Any]:
        """Everything that follows from a View."""
        texts = [self.chat, self.talks, self.text, self.editing]
        buttons = [self.send, self.stop, self.retry, self.edit, self.keep, self.new, self.delete, self.export]
        return [self.view, self.kept, *texts, *buttons]

    def _updates(self, view: View, before: View | None = None) -> Updates:
        """What is new on the page; everything where it is not known what was there."""
        if view.warning:
            gr.Warning(escape(view.warning), title="")
        view = replace(view, warning="")
        found: Updates = {self.view: replace(view, text=None)}
        if before is None or (view.talk, view.draft, view.language) != (before.talk, before.draft, before.language):
            found[self.chat] = messages(view.talk, view.language, view.draft)
        if before is None or view.kept != before.kept:
            found[self.kept] = view.kept.to_dict()
        if view.text is not None and (before is None or view.text != before.text):
            found[self.text] = view.text
        if before is None or _frame(view) != _frame(before):
            found |= self._frame_updates(view)
        return found

    def _frame_updates(self, view: View) -> Updates:
        """What surrounds the conversation."""
        busy, turns = view.draft is not None, bool(view.talk.turns)
        choices = [(title[:TITLE] or say("no_title", view.language), uid) for uid, title in view.choices]
        known = {uid for uid, _ in view.choices}
        note = plain_html(say("editing", view.language), "note")
        return {
            self.talks: gr.update(
                choices=choices, value=view.talk.uid if view.talk.uid in known else None, interactive=not busy
            ),
            self.editing: gr.update(value=note, visible=view.editing),
            self.send: gr.update(visible=not busy),
            self.stop: gr.update(visible=busy),
            self.retry: gr.update(interactive=turns and not busy),
            self.edit: gr.update(interactive=turns and not busy, visible=not view.editing),
            self.keep: gr.update(visible=view.editing),
            self.new: gr.update(interactive=not busy),
            self.delete: gr.update(interactive=turns and not busy),
            self.export: gr.update(interactive=turns),
        }

    def _worded(self, language: Language) -> Updates:
        """Every word of the page."""

        def labelled(key: str) -> Any:
            return gr.update(label=say(key, language))

        buttons = ("new", "export", "delete", "reset", "send", "stop", "retry", "edit", "keep")
        found: Updates = {getattr(self, key): gr.update(value=say(key, language)) for key in buttons}
        for name, component in self.wishes.items():
            info = say(f"{name}_info", language) if name != "max_new_tokens" else None
            found[component] = gr.update(label=say(name, language), info=info)
        found |= {self.talks: labelled("conversations"), self.language: labelled("language")}
        found |= {self.sampling: labelled("sampling"), self.state_box: labelled("state")}
        found[self.text] = gr.update(placeholder=say("ask", language))
        found[self.chat] = gr.update(placeholder=plain_html(say("empty", language), "note"))
        return found

    # ---- what happens ---------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Tie what a visitor does to what is done then."""
        wishes, shown = list(self.wishes.values()), self._shown
        gr.on([self.text.submit, self.send.click], self._say, [self.view, self.text, *wishes], shown, **_QUIETLY)
        self.retry.click(self._say_again, [self.view, *wishes], shown, **_QUIETLY)
        self.stop.click(self._stop, queue=False, show_progress="hidden", api_visibility="private")
        self.edit.click(self._edit, self.view, shown, **_QUIETLY)
        self.keep.click(self._keep, self.view, shown, **_QUIETLY)
        self.new.click(self._begin, self.view, shown, **_QUIETLY)
        self.talks.input(self._choose, [self.view, self.talks], shown, **_QUIETLY)
        self.delete.click(self._delete, self.view, shown, **_QUIETLY)
        exported = self.export.click(self._export, self.view, [self.file_name, self.file_text], **_QUIETLY)
        exported.then(None, [self.file_name, self.file_text], None, js=_DOWNLOAD, api_visibility="private")
        self.reset.click(self._reset, None, wishes, **_QUIETLY)
        spoken = [*shown, *wishes, self.reset, self.sampling, self.state_box, self.state, self.language]
        self.language.input(self._speak, [self.view, self.language], spoken, **_QUIETLY)
        self.blocks.load(self._open, self.kept, spoken, **_QUIETLY)
        self.timer.tick(self._look, self.view, self.state, **_QUIETLY)
        self.blocks.unload(self._stop)

    def _visitor(self, request: gr.Request) -> Visitor:
        return self.visitors.visitor(request.username, str(request.session_hash))

    def _client(self, request: gr.Request) -> ServerClient:
        return self._visitor(request).client

    def _open(self, request: gr.Request, kept: object) -> Updates:
        remembered, client = Kept.from_dict(kept), self._client(request)
        language = remembered.language or language_of(request.headers.get("accept-language"))
        view = opened(client, remembered, language)
        found = self._all(view, client)
        try:
            figures = client.figures()
        except ServerError:
            return found  # the state says why
        for name, value in _defaults(figures).items():
            slider = self.wishes[name]
            found[slider] = {**found[slider], "value": value}
        slider = self.wishes["max_new_tokens"]
        found[slider] = {**found[slider], "maximum": _most_tokens(figures)}
        return found

    def _reset(self, request: gr.Request) -> list[float | None]:
        values = _defaults()
        with contextlib.suppress(ServerError):  # the state says why
            values = _defaults(self._client(request).figures())
        return list(values.values())

    def _speak(self, request: gr.Request, view: View, language: Language) -> Updates:
        view = replace(view, language=language, kept=replace(view.kept, language=language))
        return self._all(view, self._client(request))

    def _all(self, view: View, client: ServerClient) -> Updates:
        """The whole page, its words too."""
        found = self._worded(view.language)
        for component, new in self._updates(view).items():
            words = found.get(component)
            update = new if isinstance(new, dict) else gr.update(value=new)
            found[component] = new if words is None else {**words, **update}
        found[self.state] = state_html(client, view.language, speed=view.talk.speed)
        found[self.language] = {**found[self.language], "value": view.language}
        return found

    def _say(self, request: gr.Request, view: View, text: str, *wishes: float | None) -> Iterator[Updates]:
        yield from self._showing(view, said(self._visitor(request), view, text, _wishes(wishes)))

    def _say_again(self, request: gr.Request, view: View, *wishes: float | None) -> Iterator[Updates]:
        yield from self._showing(view, said_again(self._visitor(request), view, _wishes(wishes)))

    def _showing(self, before: View, views: Iterator[View]) -> Iterator[Updates]:
        """One view after the other."""
        known = None
        for view in views:
            yield self._updates(view, known)
            known = view
        if known is None:  # nothing was said
            yield {self.view: before}

    def _stop(self, request: gr.Request) -> None:
        self._visitor(request).stop()

    def _edit(self, view: View) -> Updates:
        return self._updates(edited(view))

    def _keep(self, view: View) -> Updates:
        return self._updates(replace(view, editing=False, text=""))

    def _begin(self, request: gr.Request, view: View) -> Updates:
        return self._updates(chosen(self._client(request), view, None))

    def _choose(self, request: gr.Request, view: View, uid: str) -> Updates:
        return self._updates(chosen(self._client(request), view, uid))

    def _delete(self, request: gr.Request, view: View) -> Updates:
        return self._updates(deleted(self._client(request), view))

    def _export(self, request: gr.Request, view: View) -> tuple[str, str]:
        try:
            text = self._client(request).export(view.talk.uid) if view.talk.uid is not None else ""
        except ServerError as error:
            gr.Warning(escape(str(error)), title="")
            text = ""
        return f"moss-{(view.talk.uid or '')[:8]}.json", text

    def _look(self, request: gr.Request, view: View) -> str:
        return state_html(self._client(request), view.language, speed=view.talk.speed)


def _frame(view: View) -> tuple[object, ...]:
    """All of a View that its frame follows from."""
    busy, turns = view.draft is not None, bool(view.talk.turns)
    return view.language, view.choices, view.talk.uid, busy, turns, view.editing


def _most_tokens(figures: Figures) -> float:
    """The end of the slider: what the server lets be asked for. Gradio takes no value that is beyond it."""
    return max(figures.longest_answer, _RANGES["max_new_tokens"][0] + 1)


def _defaults(figures: Figures | None = None) -> dict[str, float | None]:
    """The sliders' values at first: the model's own, or MOSS's where the server told nothing."""
    wishes = Wishes() if figures is None else figures.wishes
    values: dict[str, float | None] = {entry.name: getattr(wishes, entry.name) for entry in fields(Wishes)}
    if figures is not None:
        values["max_new_tokens"] = min(wishes.max_new_tokens, _most_tokens(figures))
    return values


def _wishes(values: Sequence[float | None]) -> Wishes:
    """Wishes of the sliders' values, in the order of their fields."""
    named = zip(_defaults(), values, strict=True)
    return Wishes(**cast(Any, {name: _number(name, value) for name, value in named if value is not None}))


def _number(name: str, value: float) -> float:
    return int(value) if name in _WHOLE else float(value)


def page_app(visitors: Visitors, *, logs_in: bool = False) -> FastAPI:
    """The page as an application.

    Args:
        visitors: those who look at it.
        logs_in: each must show a key of the server first.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app,
        Page(visitors).blocks,
        path="/",
        footer_links=[],
        run_history=False,  # what was said is kept by the server alone
        auth=visitors.login if logs_in else None,
        auth_message=escape(say("login", "en")) + "<br>" + escape(say("login", "zh")),
        show_error=False,
        max_file_size=1,  # nothing is uploaded
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=CSS.read_text("utf-8"),
    )
    (page,) = (route.app for route in app.routes if isinstance(route, Mount) and isinstance(route.app, GradioApp))

    def log_out(name: str) -> None:
        for token in [token for token, user in page.tokens.items() if user == name]:
            del page.tokens[token]

    visitors.on_replaced = log_out
    return app
