"""`moss-jt web`: a page in the browser, and a server for it unless one is named."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import click

from moss_jt.cli.options import database_option, load_options, model_options, tool_options
from moss_jt.errors import ConfigError, MossError, ServerError
from moss_jt.language import pick

UI = Literal["gradio", "streamlit"]
PORT = 7860
_MODULES = {
    "gradio": ("gradio", "httpx", "markdown_it", "mdit_py_plugins", "uvicorn"),
    "streamlit": ("streamlit", "httpx", "markdown_it", "mdit_py_plugins"),
}
UNAUTHORIZED = 401


@click.command(
    help=pick(
        "Talk to a model in the browser.\n\n"
        "Starts a server for the model, and a page that asks it; --server takes one that runs (moss-jt serve). "
        "The page listens at 127.0.0.1 only, unless told otherwise; where others can reach it, everybody logs in with a "
        "key of theirs (moss-jt keys add). Ctrl-C ends page and server.\n\n"
        "Example: moss-jt web --model fnlp/moss-moon-003-sft-int4",
        "在浏览器中与模型对话。\n\n"
        "启动模型的服务器以及访问它的网页；--server 使用已运行的服务器（moss-jt serve）。"
        "网页默认只监听 127.0.0.1；他人可访问时，每人须用自己的密钥登录（moss-jt keys add）。"
        "按 Ctrl-C 结束网页与服务器。\n\n"
        "例如：moss-jt web --model fnlp/moss-moon-003-sft-int4",
    )
)
@model_options(embedded=True)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help=pick("Address of the page.", "网页的监听地址。"),
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=PORT,
    show_default=True,
    help=pick("Port of the page; 0 takes a free one.", "网页的端口；0 表示任选空闲端口。"),
)
@click.option(
    "--ui",
    type=click.Choice(["gradio", "streamlit"]),
    default="gradio",
    show_default=True,
    help=pick("Which page.", "使用哪种网页。"),
)
@click.option(
    "--server",
    metavar="URL",
    help=pick("A server that runs, instead of one of its own.", "使用已运行的服务器，而不另外启动。"),
)
@click.option(
    "--key",
    envvar="MOSS_JT_KEY",
    show_envvar=True,
    help=pick(
        "Key of the server, for whoever sees the page; without it each logs in.",
        "服务器的密钥，供所有访问网页的人使用；不给出则各自登录。",
    ),
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help=pick("Answers that are computed at once.", "同时计算的回答数。"),
)
@database_option
@tool_options
def command(
    *,
    model: str | None,
    host: str,
    port: int,
    ui: UI,
    server: str | None,
    key: str | None,
    parallel: int,
    database: Path | None,
    tools: str | None,
    search_with: str | None,
    draw_with: str | None,
    **others: Any,
) -> None:
    """Show a page."""
    options = load_options(others)
    require_extra(ui)
    if server is not None and (model or tools or database):
        raise ConfigError("--server names a server that has its model, tools and database; leave these options out.")
    failures: list[str] = []

    def fail(reason: str) -> None:
        failures.append(reason)
        os.kill(os.getpid(), signal.SIGINT)  # ends the page, whichever it is

    with contextlib.ExitStack() as stack:
        url = server
        if url is None:
            from moss_jt.cli.chat_screen import Screen
            from moss_jt.cli.loading import find_model
            from moss_jt.cli.web_server import order, own_server

            folder = find_model(model, Screen(interactive=False))
            tooling = {"tools": tools, "search": search_with, "draw": draw_with}
            wanted = order(folder, options, parallel=parallel, database=database, **tooling)
            url = stack.enter_context(own_server(wanted, fail))
        logs_in = check_access(url, key, host=host)
        with _ends_with_ctrl_c():
            _show(ui, url, key, host=host, port=port, logs_in=logs_in)
    if failures:
        raise MossError(failures[0])


def require_extra(ui: UI) -> None:
    """Refuse to go on without the libraries of the extra `web`.

    Raises:
        ConfigError: says how to install them.
    """
    from importlib.util import find_spec

    missing = [module for module in _MODULES[ui] if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"{missing[0]} is not installed, and the page needs it: sh run.sh web brings it, as does pip install '.[web]'"
        )


def check_access(url: str, key: str | None, *, host: str) -> bool:
    """Whether visitors log in, each with a key of the server.

    Args:
        url: of the server.
        key: that all visitors would use.
        host: address of the page.

    Raises:
        ConfigError: others can reach the page, and nothing would keep them out.
        ServerError: the server does not answer, or refuses the key.
    """
    from moss_jt.web.client import ServerClient
    from moss_jt.web.hosting import reaches_others

    with ServerClient(url, key) as client:
        try:
            needs_key = client.figures().lists
        except ServerError as error:
            if error.status != UNAUTHORIZED or key is not None:
                raise
            needs_key = True
    public = reaches_others(host)
    if public and key is not None:
        raise ConfigError(
            f"{host} can be reached by others, who would all be one visitor. Leave --key out, and each logs in."
        )
    if public and not needs_key:
        raise ConfigError(
            f"{host} can be reached by others, and there are no keys. Make one first: moss-jt keys add NAME"
        )
    return needs_key and key is None


@contextlib.contextmanager
def _ends_with_ctrl_c() -> Iterator[None]:
    """Ctrl-C is how a page ends, not an error."""
    with contextlib.suppress(KeyboardInterrupt):
        yield


def _show(ui: UI, url: str, key: str | None, *, host: str, port: int, logs_in: bool) -> None:
    if ui == "streamlit":
        from moss_jt.web.streamlit_run import serve

        serve(url, key, host=host, port=port, on_listening=_greet)
        return
    from moss_jt.web.hosting import GRADIO_VARIABLES, PageServer

    os.environ.update(GRADIO_VARIABLES)
    from moss_jt.web.gradio_page import page_app
    from moss_jt.web.visitors import Visitors

    visitors = Visitors(url, key)

    def end() -> None:
        visitors.close()
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # that open tabs are cut off now is no fault

    app = page_app(visitors, logs_in=logs_in)
    PageServer(app, host=host, port=port, guarded=logs_in, on_listening=_greet, on_end=end).run()


def _greet(url: str) -> None:
    click.echo(
        pick(f"The page is at {url} (Ctrl-C ends it).", f"网页地址：{url} （按 Ctrl-C 结束）。"),
        err=True,
    )
