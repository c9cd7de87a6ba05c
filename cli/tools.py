"""`moss-jt tools`: which tools and back ends there are, and what came of trying each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from moss_jt.language import pick

if TYPE_CHECKING:
    from moss_jt.tools.survey import Row

_MARKS = {"ok": "✓", "off": "-", "fail": "✗"}


@click.command(
    help=pick(
        "List the tools that a model can call, with their back ends, and try each that is set up.\n\n"
        "A back end is chosen by --search-with and --draw-with of moss-jt chat, or by the variables MOSS_JT_SEARCH "
        "(local, ddgs, searxng=URL, bing, bing=URL; the key of bing is MOSS_JT_SEARCH_KEY) and MOSS_JT_DRAW "
        "(placeholder, a1111=URL, comfyui=URL, diffusers, diffusers=MODEL). Exit code 1 where one that is in use fails."
        "\n\nExample: MOSS_JT_SEARCH=searxng=http://127.0.0.1:8888 moss-jt tools",
        "列出模型可调用的工具及其后端，并逐一测试已设置的后端。\n\n"
        "后端由 moss-jt chat 的 --search-with 与 --draw-with 选择，或由环境变量 MOSS_JT_SEARCH"
        "（local、ddgs、searxng=URL、bing、bing=URL；bing 的密钥为 MOSS_JT_SEARCH_KEY）和 MOSS_JT_DRAW"
        "（placeholder、a1111=URL、comfyui=URL、diffusers、diffusers=MODEL）选择。使用中的后端失败时退出码为 1。\n\n"
        "例如：MOSS_JT_SEARCH=searxng=http://127.0.0.1:8888 moss-jt tools",
    )
)
@click.option("--json", "as_json", is_flag=True, help=pick("Print JSON.", "以 JSON 输出。"))
def command(*, as_json: bool) -> int:
    """Try every tool and print what came of it."""
    from moss_jt.tools.survey import survey

    rows = survey()
    if as_json:
        click.echo(json.dumps([row.to_dict() for row in rows], ensure_ascii=False, indent=1))
    else:
        for row in rows:
            click.echo(_line(row))
    return 1 if any(row.chosen and row.status.state == "fail" for row in rows) else 0


def _line(row: Row) -> str:
    from moss_jt.cli.chat_screen import harmless

    name = f"{row.tool} {row.backend}".strip()
    used = pick(" (in use)", "（使用中）") if row.chosen and row.backend else ""
    return f"{_MARKS[row.status.state]} {name}{used}: {harmless(row.status.text)}"
