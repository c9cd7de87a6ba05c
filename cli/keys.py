"""`moss-jt keys`: who may use a server."""

from __future__ import annotations

import contextlib
import datetime
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click

from moss_jt.cli.options import database_option
from moss_jt.language import pick


@click.group(
    help=pick(
        "Make, list and remove keys of a server.\n\n"
        "As soon as there is a key, requests need one; a running server takes note at once.\n\n"
        "Example: moss-jt keys add alice --requests-per-minute 20",
        "创建、列出和删除服务密钥。\n\n"
        "只要存在密钥，请求就必须携带密钥；正在运行的服务立即生效。\n\n"
        "例如：moss-jt keys add alice --requests-per-minute 20",
    )
)
def command() -> None:
    """Make, list and remove keys."""


@command.command(
    "add", help=pick("Make a key, and print it: it cannot be shown again.", "创建密钥并显示；之后无法再次查看。")
)
@click.argument("name")
@database_option
@click.option(
    "--requests-per-minute", type=click.IntRange(1), help=pick("[default: no limit]", "每分钟请求数。[默认不限]")
)
@click.option(
    "--parallel",
    type=click.IntRange(1),
    help=pick("Answers at once. [default: no limit]", "同时进行的回答数。[默认不限]"),
)
@click.option(
    "--tokens-per-day",
    type=click.IntRange(1),
    help=pick("Of prompts and answers, by the day of UTC. [default: no limit]", "每日词元数（UTC）。[默认不限]"),
)
def add(name: str, database: Path | None, **limits: int | None) -> None:
    """Make a key."""
    from moss_jt.server.keys import add_key

    with _opened(database) as connection:
        click.echo(add_key(connection, name, **limits))


@command.command("list", help=pick("Name every key with its limits.", "列出所有密钥及其限额。"))
@database_option
@click.option("--json", "as_json", is_flag=True, help=pick("Print one JSON array.", "输出一个 JSON 数组。"))
def list_(database: Path | None, as_json: bool) -> None:
    """Name every key."""
    from moss_jt.server.keys import list_keys

    with _opened(database) as connection:
        keys = list_keys(connection)
    if as_json:
        click.echo(json.dumps([asdict(key) for key in keys]))
        return
    for key in keys:
        limits = {
            pick("requests a minute", "次/分钟"): key.requests_per_minute,
            pick("at once", "并发"): key.parallel,
            pick("tokens a day", "词元/天"): key.tokens_per_day,
        }
        words = ", ".join(f"{limit} {unit}" for unit, limit in limits.items() if limit is not None)
        made = datetime.datetime.fromtimestamp(key.created).strftime("%Y-%m-%d")
        click.echo(f"{key.name}  …{key.hint}  {made}  {words or pick('no limits', '无限额')}")


@command.command(
    "remove", help=pick("Remove a key, and the conversations that belong to it.", "删除密钥及其所属对话。")
)
@click.argument("name")
@database_option
@click.option(
    "--keep-conversations",
    is_flag=True,
    help=pick("Keep them for a new key of the same name.", "保留对话，供同名新密钥使用。"),
)
def remove(name: str, database: Path | None, keep_conversations: bool) -> None:
    """Remove a key."""
    from moss_jt.server.keys import remove_key

    with _opened(database) as connection:
        count = remove_key(connection, name, keep_conversations=keep_conversations)
    click.echo(
        pick(f"Removed {name} and {count} conversations.", f"已删除 {name} 及 {count} 个对话。"),
        err=True,
    )


@contextlib.contextmanager
def _opened(database: Path | None) -> Iterator[sqlite3.Connection]:
    """The database; all that is done with it is kept, or nothing."""
    from moss_jt.server.database import open_database
    from moss_jt.server.settings import default_database

    connection = open_database(database or default_database())
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        connection.execute("COMMIT")
    finally:
        connection.close()
