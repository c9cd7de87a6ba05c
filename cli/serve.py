"""`moss-jt serve`: options, one server; what it does is in moss_jt.server."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click

from moss_jt.cli.options import database_option, load_options, model_options, tool_options
from moss_jt.errors import ConfigError
from moss_jt.language import pick


@click.command(
    help=pick(
        "Serve a model over HTTP: MOSS's own API at /, and OpenAI's at /v1.\n\n"
        "Listens at 127.0.0.1 only, unless told otherwise; an address that others can reach needs keys "
        "(moss-jt keys add). The log goes to stderr, a JSON object a line. Ctrl-C lets running answers finish.\n\n"
        "Example: moss-jt serve --model fnlp/moss-moon-003-sft-int4",
        "通过 HTTP 提供模型服务：/ 为 MOSS 原有接口，/v1 为 OpenAI 兼容接口。\n\n"
        "默认只监听 127.0.0.1；监听他人可访问的地址需要密钥（moss-jt keys add）。"
        "日志输出到 stderr，每行一个 JSON 对象。按 Ctrl-C 后会等待正在进行的回答结束。\n\n"
        "例如：moss-jt serve --model fnlp/moss-moon-003-sft-int4",
    )
)
@model_options(embedded=True)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help=pick("Address to listen at.", "监听地址。"),
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=19324,
    show_default=True,
    help=pick("Port; 0 takes a free one.", "端口；0 表示任选空闲端口。"),
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 64),
    default=8,
    show_default=True,
    help=pick("Answers that are computed at once.", "同时计算的回答数。"),
)
@click.option(
    "--queue",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help=pick("Requests that may wait; more are told to come again.", "可排队的请求数，超出者稍后再来。"),
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help=pick("Longest answer that may be asked for.", "可请求的最长回答。"),
)
@click.option(
    "--answer-time",
    type=click.FloatRange(min=0, min_open=True),
    default=600,
    show_default=True,
    metavar="SECONDS",
    help=pick("Longest time for an answer; it then ends with what it has.", "单个回答的最长时间，到时即止。"),
)
@click.option(
    "--wait-time",
    type=click.FloatRange(min=0, min_open=True),
    default=300,
    show_default=True,
    metavar="SECONDS",
    help=pick("Longest wait in the queue.", "排队的最长时间。"),
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help=pick("Time for running answers to finish at the end.", "退出时等待回答结束的时间。"),
)
@database_option
@tool_options
@click.option("--name", default="", help=pick("Name of the model for clients.", "向客户端显示的模型名称。"))
@click.option("--log-texts", is_flag=True, help=pick("Write prompts and answers to the log.", "把提示与回答写入日志。"))
def command(
    *,
    model: str | None,
    host: str,
    port: int,
    parallel: int,
    queue: int,
    max_new_tokens: int,
    answer_time: float,
    wait_time: float,
    grace: float,
    database: Path | None,
    name: str,
    log_texts: bool,
    tools: str | None,
    search_with: str | None,
    draw_with: str | None,
    **others: Any,
) -> None:
    """Serve a model."""
    options = load_options(others)
    require_extra()
    from moss_jt.cli.chat_screen import Screen
    from moss_jt.cli.chat_tools import open_tools
    from moss_jt.cli.loading import find_model
    from moss_jt.server.running import serve
    from moss_jt.server.settings import ServerSettings, default_database
    from moss_jt.server.tool_runner import BoxRunner
    from moss_jt.server.worker import LoadedEngine

    settings = ServerSettings(
        database=database or default_database(),
        host=host,
        port=port,
        name=name,
        parallel=parallel,
        queue=queue,
        max_new_tokens=max_new_tokens,
        answer_s=answer_time,
        wait_s=wait_time,
        grace_s=grace,
        log_texts=log_texts,
    )
    _log_as_json()
    screen = Screen(interactive=False)
    box = open_tools(tools, search=search_with, draw=draw_with, screen=screen)
    folder = find_model(model, screen)
    engine = LoadedEngine(str(folder), parallel, options)
    try:
        runner = None if box is None else BoxRunner(box)
        serve(settings, engine, tools=runner, on_listening=lambda url: screen.note(_hello(url)))
    finally:
        if box is not None:
            box.close()


def require_extra() -> None:
    """Refuse to go on without the libraries of the extra `serve`.

    Raises:
        ConfigError: says how to install them.
    """
    from importlib.util import find_spec

    missing = [module for module in ("fastapi", "uvicorn", "prometheus_client") if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"{missing[0]} is not installed, and the server needs it: sh run.sh serve brings it, as does pip install '.[serve]'"
        )


def _hello(url: str) -> str:
    return pick(
        f"Listening at {url}; {url}/readyz says when the model is loaded. Ctrl-C ends.",
        f"正在监听 {url}；模型加载情况见 {url}/readyz。按 Ctrl-C 结束。",
    )


def _log_as_json() -> None:
    """Lines of JSON on stderr, of this program and of uvicorn."""
    from moss_jt.server.logs import JsonFormatter

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("moss_jt", "uvicorn"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
