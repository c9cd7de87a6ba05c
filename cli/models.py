"""`moss-jt models`: list, find and remove what is stored."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING

import click

from moss_jt.cli.asking import confirm
from moss_jt.language import pick

if TYPE_CHECKING:
    from moss_jt.stored import StoredModel


@click.group(
    "models",
    help=pick(
        "List, find and remove stored models: pulled, made by synth, or converted on the fly.\n\n"
        "Example: moss-jt models list",
        "列出、查找和删除已保存的模型（下载的、synth 生成的、即时转换的）。\n\n例如：moss-jt models list",
    ),
)
def command() -> None:
    """Manage stored models."""


@command.command("list", help=pick("List the stored models.", "列出已保存的模型。"))
@click.option("--json", "as_json", is_flag=True, help=pick("Print JSON.", "以 JSON 输出。"))
def list_command(as_json: bool) -> None:
    """List the stored models."""
    from moss_jt.stored import list_models

    models = list_models()
    if as_json:
        click.echo(json.dumps([model.to_dict() for model in models], indent=1))
    elif models:
        click.echo(_table(models))
    else:
        click.echo(
            pick(
                "No model is stored. Fetch one with: moss-jt pull OWNER/NAME", "尚无模型。下载：moss-jt pull OWNER/NAME"
            ),
            err=True,
        )


@command.command("path", help=pick("Print the folder of a stored model.", "显示模型所在的文件夹。"))
@click.argument("name")
def path_command(name: str) -> None:
    """Print the folder of a model."""
    from moss_jt.stored import path_of

    click.echo(path_of(name))


@command.command("rm", help=pick("Remove a stored model, whole or partial.", "删除已保存的模型（包括未完成的）。"))
@click.argument("name")
@click.option("--yes", is_flag=True, help=pick("Do not ask.", "不再询问。"))
def rm_command(name: str, yes: bool) -> None:
    """Remove a model after asking."""
    from moss_jt.pull_plan import gigabytes
    from moss_jt.stored import get_model, remove_model

    model = get_model(name)
    size = gigabytes(model.size_bytes)
    question = pick(
        f"Remove {model.name} ({size}) from {model.path.parent}?",
        f"从 {model.path.parent} 删除 {model.name}（{size}）？",
    )
    if not yes and not confirm(question):
        click.echo(pick("Nothing was removed.", "未删除。"), err=True)
        return
    freed = gigabytes(remove_model(name))
    click.echo(pick(f"Removed {model.name}; {freed} freed.", f"已删除 {model.name}，释放 {freed}。"), err=True)


def _table(models: list[StoredModel]) -> str:
    """The models in columns."""
    from moss_jt.pull_plan import gigabytes

    states = {"complete": pick("complete", "完整"), "partial": pick("partial", "未完成")}
    rows = [
        (
            pick("NAME", "名称"),
            pick("BITS", "位数"),
            pick("SIZE", "大小"),
            pick("STATE", "状态"),
            pick("LAST USED", "上次使用"),
        )
    ]
    for model in models:
        used = datetime.fromtimestamp(model.last_used).strftime("%Y-%m-%d %H:%M")
        rows.append((model.name, str(model.bits or "?"), gigabytes(model.size_bytes), states[model.state], used))
    widths = [max(_width(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _width(text: str) -> int:
    """Columns on a terminal: Chinese characters take two."""
    return sum(2 if character > "\u2e7f" else 1 for character in text)
