"""`moss-jt index`: the user's own documents, for searching without a network."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from moss_jt import paths
from moss_jt.errors import ConfigError
from moss_jt.language import pick

if TYPE_CHECKING:
    from moss_jt.tools.index import Indexed, LocalIndex


@click.command(
    help=pick(
        "Index folders of documents (txt, md, rst, html and their like) for the search tool; run it again after "
        "changes, and only what is new is read.\n\n"
        "Nothing leaves this machine. The index lies in moss-jt's own folder.\n\n"
        "Example: moss-jt index ./docs",
        "为搜索工具索引文档目录（txt、md、rst、html 等）；文档变化后重新运行即可，只读取有变化的部分。\n\n"
        "数据不会离开本机，索引保存在 moss-jt 自己的目录中。\n\n"
        "例如：moss-jt index ./docs",
    )
)
@click.argument("folders", nargs=-1, metavar=pick("[FOLDER]...", "[目录]..."))
@click.option("--list", "listing", is_flag=True, help=pick("Show what is indexed.", "显示已索引的目录。"))
@click.option("--remove", is_flag=True, help=pick("Take the folders out of the index.", "从索引中移除这些目录。"))
@click.option("--find", metavar="TEXT", help=pick("Search, as the model would.", "像模型那样搜索。"))
@click.option("--json", "as_json", is_flag=True, help=pick("Print JSON.", "以 JSON 输出。"))
def command(*, folders: tuple[str, ...], listing: bool, remove: bool, find: str | None, as_json: bool) -> None:
    """Add, remove, list or search folders."""
    from moss_jt.tools.index import LocalIndex

    if not folders and not listing and find is None:
        raise ConfigError("a folder to index is missing. As in: moss-jt index ./docs (or --list, or --find TEXT)")
    index = LocalIndex()
    for folder in folders:
        _change(index, folder, remove=remove, as_json=as_json)
    if listing:
        _list(index, as_json=as_json)
    if find is not None:
        _find(index, find, as_json=as_json)


def _change(index: LocalIndex, folder: str, *, remove: bool, as_json: bool) -> None:
    """Add or remove one folder, and say what was done."""
    from moss_jt.cli.progress import TerminalProgress

    path = paths.expand(folder)
    if remove:
        files = index.remove(path)
        words = pick(f"{path}: {files} files taken out.", f"{path}：已移除 {files} 个文件。")
        click.echo(json.dumps({"folder": str(path), "removed": files}) if as_json else words)
        return
    done = index.add(path, progress=TerminalProgress())
    click.echo(json.dumps({"folder": str(path), **asdict(done)}) if as_json else f"{path}: {_in_words(done)}")


def _in_words(done: Indexed) -> str:
    return pick(
        f"{done.added} files new, {done.changed} changed, {done.removed} gone, {done.unchanged} as before; "
        f"{done.passages} passages." + (f" {done.unreadable} could not be read." if done.unreadable else ""),
        f"新增 {done.added} 个文件，更新 {done.changed} 个，移除 {done.removed} 个，未变 {done.unchanged} 个；"
        f"共 {done.passages} 个段落。" + (f"{done.unreadable} 个文件无法读取。" if done.unreadable else ""),
    )


def _list(index: LocalIndex, *, as_json: bool) -> None:
    found = index.folders()
    if as_json:
        click.echo(json.dumps([asdict(folder) for folder in found], ensure_ascii=False))
        return
    for folder in found:
        words = pick(
            f"{folder.files} files, {folder.passages} passages", f"{folder.files} 个文件，{folder.passages} 个段落"
        )
        click.echo(f"{folder.path}: {words}")
    if not found:
        click.echo(
            pick("Nothing is indexed. As in: moss-jt index ./docs", "尚无索引。例如：moss-jt index ./docs"), err=True
        )


def _find(index: LocalIndex, text: str, *, as_json: bool) -> None:
    from moss_jt.cli.chat_screen import harmless
    from moss_jt.tools.search import HITS, cleaned

    hits = cleaned(index.search(text, HITS), HITS)
    if as_json:
        click.echo(json.dumps([asdict(hit) for hit in hits], ensure_ascii=False, indent=1))
        return
    for number, hit in enumerate(hits, 1):
        click.echo(f"[{number}] {harmless(hit.title)}  {harmless(hit.url)}\n{harmless(hit.text)}\n")
    if not hits:
        click.echo(pick("Nothing was found.", "没有找到。"), err=True)
