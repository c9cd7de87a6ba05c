"""`moss-convert verify`: compare a native folder with its checksums."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moss_jt.cli.convert.sizes import in_words
from moss_jt.language import pick


@click.command(
    "verify",
    help=pick(
        "Read the native folder PATH again and compare every byte with its manifest.\n\n"
        "Exit code 1 names the first tensor or file that is wrong.\n\n"
        "Example: moss-convert verify moss-moon-003-sft-int4-jittor",
        "重新读取本程序格式的目录 PATH，与清单逐一比对。\n\n出错时退出码为 1，并指出第一个有问题的张量或文件。\n\n"
        "例如：moss-convert verify moss-moon-003-sft-int4-jittor",
    ),
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help=pick("Print the result as JSON.", "以 JSON 输出结果。"))
def command(path: Path, as_json: bool) -> None:
    """Verify a folder."""
    from moss_jt.cli.progress import TerminalProgress
    from moss_jt.converters.verify import verify

    found = verify(path, progress=TerminalProgress())
    if as_json:
        click.echo(
            json.dumps({"path": str(path), "tensors": found.tensors, "bytes": found.nbytes, "files": found.files})
        )
        return
    size = in_words(found.nbytes)
    click.echo(
        pick(
            f"{path}: {found.tensors} tensors, {size}, all as written.",
            f"{path}：{found.tensors} 个张量，{size}，校验无误。",
        )
    )
