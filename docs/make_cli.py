"""Write docs/cli.md: what `--help` says, for every command.

python docs/make_cli.py           write it
python docs/make_cli.py --check   exit with 1 if it is not current
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from moss_jt.cli.main import make_group  # noqa: E402
from moss_jt.language import set_language  # noqa: E402

TARGET = ROOT / "docs" / "cli.md"
WIDTH = 100
HEAD = """\
# The command line

What `--help` says, for every command. Made by `python docs/make_cli.py`; do not edit.
`--lang zh` gives the same in Chinese.
"""


def pages(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[str]:
    """The help of a command, then of the commands within it."""
    settings = {**command.context_settings, "terminal_width": WIDTH}
    context = click.Context(command, info_name=name, parent=parent, **settings)
    yield f"## {context.command_path}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"
    if isinstance(command, click.Group):
        for inner_name in command.list_commands(context):
            inner = command.get_command(context, inner_name)
            assert inner is not None, f"{inner_name} is listed and not there"
            yield from pages(inner, inner_name, context)


def main() -> int:
    """Write the file, or compare it."""
    set_language("en")
    text = "\n".join([HEAD, *pages(make_group(), "moss-jt")])
    if "--check" not in sys.argv:
        TARGET.write_text(text, "utf-8")
        return 0
    if TARGET.read_text("utf-8") == text:
        return 0
    sys.stderr.write("docs/cli.md is not what --help says. Run: python docs/make_cli.py\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
