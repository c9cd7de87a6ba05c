"""`moss-jt chat`: options, one model, one conversation; the loop is in chat_loop."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import click

from moss_jt.cli.options import generation_config, load_options, model_options, sampling_options, tool_options
from moss_jt.language import pick

if TYPE_CHECKING:
    from collections.abc import Callable

    from moss_jt.cli.chat_screen import Screen
    from moss_jt.config import GenerationConfig, MossConfig
    from moss_jt.runner import Model
    from moss_jt.tools.toolbox import ToolBox


@click.command(
    help=pick(
        "Talk to a model.\n\n"
        "Answers go to stdout, everything else to stderr. In a pipe each line is a message. "
        "/help in the chat lists its commands; stop or Ctrl-D leaves, Ctrl-C stops an answer.\n\n"
        "Example: moss-jt chat --model fnlp/moss-moon-003-sft-int4",
        "与模型对话。\n\n"
        "回答输出到 stdout，其余输出到 stderr。通过管道使用时，每行为一条消息。"
        "对话中输入 /help 查看命令；stop 或 Ctrl-D 退出，Ctrl-C 停止回答。\n\n"
        "例如：moss-jt chat --model fnlp/moss-moon-003-sft-int4",
    )
)
@model_options(embedded=True)
@click.option(
    "--template",
    type=click.Choice(["auto", "readme", "fields"]),
    default="auto",
    show_default=True,
    help=pick("Prompt format; auto asks the model's config.", "提示格式；auto 按模型配置选择。"),
)
@click.option(
    "--system",
    metavar="TEXT",
    help=pick('System prompt in place of MOSS\'s own; "" is none.', "系统提示，替换 MOSS 默认提示；空字符串表示不用。"),
)
@tool_options
@click.option(
    "--quality",
    type=click.IntRange(0, 100),
    help=pick(
        "How good answers shall be, for a model that learned it (moss-jt finetune --quality).",
        "期望的回答质量，适用于学过质量标签的模型（moss-jt finetune --quality）。",
    ),
)
@sampling_options
def command(
    *,
    model: str | None,
    template: Literal["auto", "readme", "fields"],
    system: str | None,
    tools: str | None,
    search_with: str | None,
    draw_with: str | None,
    quality: int | None,
    **others: Any,
) -> None:
    """Talk to a model."""
    from moss_jt.cli.chat_screen import Screen
    from moss_jt.cli.chat_tools import open_tools
    from moss_jt.cli.loading import open_model

    config, options = generation_config(others), load_options(others)
    screen = Screen(interactive=sys.stdin.isatty() and sys.stdout.isatty())
    box = open_tools(tools, search=search_with, draw=draw_with, screen=screen)
    try:
        loaded = open_model(model, options, screen)
        good = _talk(loaded, screen, template, quality=quality, system=system, config=config, tools=box)
    finally:
        if box is not None:
            box.close()
    if not good:
        sys.exit(1)


def _talk(
    loaded: Model,
    screen: Screen,
    template: Literal["auto", "readme", "fields"],
    *,
    quality: int | None,
    system: str | None,
    config: Callable[[MossConfig], GenerationConfig],
    tools: ToolBox | None,
) -> bool:
    """Hold the conversation; false if somebody's message could not be answered and nobody saw it."""
    from moss_jt.chat import ChatSession
    from moss_jt.cli.chat_commands import COMMANDS, Talk
    from moss_jt.cli.chat_input import PipeInput, TerminalInput
    from moss_jt.cli.chat_loop import converse
    from moss_jt.engine import Engine
    from moss_jt.fit import predictor_for
    from moss_jt.template import choose_template

    form = choose_template(template, loaded.config, tools=tools is not None, quality=quality)
    chosen = config(loaded.config)
    session = ChatSession(Engine(loaded), loaded.tokenizer, form, system=system, config=chosen, tools=tools)
    talk = Talk(session, screen, predictor=partial(predictor_for, loaded))
    if screen.interactive:
        screen.note(_welcome())
        converse(talk, TerminalInput(["clear", "stop", *(f"/{name}" for name in COMMANDS)]))
        return True
    return converse(talk, PipeInput(ask=sys.stderr if sys.stdin.isatty() else None))


def _welcome() -> str:
    return pick(
        "Type a message and press Enter. clear forgets everything, stop leaves, /help lists more.",
        "输入消息后按回车。clear 清空对话，stop 退出，/help 查看更多命令。",
    )
