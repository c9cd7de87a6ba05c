"""`moss-convert`, also `moss-jt convert`: the table of its commands, imported when they are called."""

from __future__ import annotations

from importlib import import_module
from typing import NoReturn

import click

from moss_jt.cli.main import Entry, run, with_common_options
from moss_jt.language import pick

COMMANDS = {
    "hf2jittor": Entry("hf2jittor", "Hugging Face folder to native folder.", "Hugging Face 目录转换为本程序格式。"),
    "jittor2hf": Entry("jittor2hf", "Native folder back to Hugging Face.", "本程序格式转换回 Hugging Face 目录。"),
    "inspect": Entry("inspect", "Tell what a folder of weights is.", "查看权重目录的内容。"),
    "verify": Entry("verify", "Compare a native folder with its checksums.", "校验本程序格式的目录。"),
    "synth": Entry("synth", "Make a model of random weights.", "生成随机权重的模型。"),
}


class ConvertGroup(click.Group):
    """A group that imports a command's module only when that command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the table, in its order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command, or give None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = import_module(f"moss_jt.cli.convert.{COMMANDS[cmd_name].module}").command
        return with_common_options(found)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table, importing none of them."""
        with formatter.section(pick("Commands", "命令")):
            formatter.write_dl([(name, pick(entry.en, entry.zh)) for name, entry in COMMANDS.items()])


def make_command() -> click.Group:
    """The group, with its help in the language in use."""
    return ConvertGroup(
        name="convert",
        help=pick(
            "Convert, inspect and verify checkpoints.\n\nExample: moss-convert hf2jittor moss-moon-003-sft-int4",
            "转换、查看和校验权重文件。\n\n例如：moss-convert hf2jittor moss-moon-003-sft-int4",
        ),
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


command = make_command()


def main() -> NoReturn:
    """The program `moss-convert`."""
    run(make_command, prog_name="moss-convert")
