"""The command `moss-jt`: the table of its sub-commands, and the one place where errors become words.

A sub-command's module is imported when it is called, not before, so that `--help` answers at once.
`run` is the door of every program here: it sets the language, turns a MossError into one line and
exit code 1, Ctrl-C into 130, and stays quiet when the reader of a pipe has gone.
"""

from __future__ import annotations

import difflib
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn

import click

from moss_jt.errors import MossError
from moss_jt.language import Language, pick, set_language

LANGUAGES: dict[str, Language] = {"zh": "zh", "en": "en"}
INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


class Entry(NamedTuple):
    """A sub-command: its module under moss_jt.cli and a line of help in both languages."""

    module: str
    en: str
    zh: str


COMMANDS = {
    "chat": Entry("chat", "Talk to a model.", "与模型对话。"),
    "serve": Entry("serve", "Serve a model over HTTP.", "通过 HTTP 提供模型服务。"),
    "web": Entry("web", "Talk to a model in the browser.", "在浏览器中与模型对话。"),
    "keys": Entry("keys", "Make, list and remove keys of a server.", "管理服务密钥。"),
    "generate": Entry("generate", "Continue one prompt, for scripts.", "续写一段提示词，供脚本使用。"),
    "bench": Entry("bench", "Measure how fast a model computes here.", "测量模型在本机的速度。"),
    "doctor": Entry(
        "doctor", "Tell what this machine has, what works, and how to mend the rest.", "检查本机环境并给出修复方法。"
    ),
    "warmup": Entry("warmup", "Do the one-time compilation now.", "提前完成一次性编译。"),
    "fit": Entry("fit", "Tell where a model would go, and how fast it would be.", "预测模型的内存分布与速度。"),
    "tools": Entry("tools", "List the tools that a model can call, and try them.", "列出并测试模型可调用的工具。"),
    "index": Entry("index", "Index your documents for the search tool.", "为搜索工具索引文档。"),
    "pull": Entry("pull", "Fetch a model from a hub.", "从模型库下载模型。"),
    "models": Entry("models", "List, find and remove stored models.", "列出、查找和删除已保存的模型。"),
    "convert": Entry("convert", "Convert, inspect and verify checkpoints.", "转换、查看和校验权重文件。"),
    "eval-ppl": Entry("eval_ppl", "Tell how well a model foretells a text.", "计算模型在文本上的困惑度。"),
    "finetune": Entry("finetune", "Train a model on conversations or texts.", "用对话或文本训练模型。"),
    "merge": Entry("merge", "Add an adapter to the weights of its model.", "将适配器合并进模型权重。"),
    "quantize": Entry("quantize", "Make int4 or int8 of a model in floating point.", "将浮点模型量化为 int4 或 int8。"),
}


class LazyGroup(click.Group):
    """A group that imports a sub-command's module only when that sub-command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the table, in its order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the sub-command, or give None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"moss_jt.cli.{COMMANDS[cmd_name].module}").command
        return with_common_options(command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of sub-commands from the table, importing none of them."""
        with formatter.section(pick("Commands", "命令")):
            formatter.write_dl([(name, pick(entry.en, entry.zh)) for name, entry in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the sub-command; for an unknown name say which one may have been meant."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = pick(f" Did you mean {near[0]}?", f" 是否指 {near[0]}？") if near else ""
            ctx.fail(pick(f"There is no command {args[0]!r}.{hint}", f"没有命令 {args[0]!r}。{hint}"))
        return super().resolve_command(ctx, args)


def _choose_language(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Take `--lang` of a call that did not come through `run`."""
    if value is not None:
        set_language(LANGUAGES.get(value))


def with_common_options(command: click.Command) -> click.Command:
    """Let a command, and the commands within it, take --lang and --debug too, wherever they are written."""
    if all(param.name != "debug" for param in command.params):
        command.params += [
            click.Option(
                ["--lang"],
                type=click.Choice(list(LANGUAGES)),
                expose_value=False,
                callback=_choose_language,
                help=pick("Language of the words around the results.", "界面语言。"),
            ),
            click.Option(
                ["--debug"],
                is_flag=True,
                expose_value=False,
                help=pick("Show a whole traceback instead of one line.", "出错时显示完整的调用栈。"),
            ),
        ]
    if isinstance(command, click.Group) and not isinstance(command, LazyGroup):
        for child in command.commands.values():
            with_common_options(child)
    return command


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Print the version and leave."""
    if value:
        from moss_jt import __version__

        click.echo(f"moss-jt {__version__}")
        ctx.exit()


def make_group() -> click.Group:
    """The command `moss-jt`, with its help in the language in use."""
    group = LazyGroup(
        name="moss-jt",
        help=pick(
            "MOSS on Jittor, for machines that are too small for it.\n\n"
            "Example: moss-jt chat --model fnlp/moss-moon-003-sft-int4",
            "在内存和显存不足的机器上，用 Jittor 运行 MOSS。\n\n例如：moss-jt chat --model fnlp/moss-moon-003-sft-int4",
        ),
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        params=[
            click.Option(
                ["--version"],
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=_print_version,
                help=pick("Print the version and leave.", "显示版本号。"),
            )
        ],
    )
    return with_common_options(group)  # type: ignore[return-value]


def language_of(args: Sequence[str]) -> str | None:
    """The value of `--lang` wherever it stands; help texts need it before click reads the options."""
    for here, after in zip(args, [*args, ""][1:], strict=True):
        if here == "--lang":
            return after
        if here.startswith("--lang="):
            return here.partition("=")[2]
    return None


def run(
    command: click.Command | Callable[[], click.Command],
    args: Sequence[str] | None = None,
    prog_name: str = "moss-jt",
) -> NoReturn:
    """Run a command, or what a function makes once the language is known, and leave with its exit code."""
    words = list(sys.argv[1:] if args is None else args)
    _prepare(words)
    made = command if isinstance(command, click.Command) else command()
    sys.exit(exit_code_of(with_common_options(made), words, prog_name))


def exit_code_of(command: click.Command, args: Sequence[str], prog_name: str = "moss-jt") -> int:
    """Run a command; report its errors on stderr and give the exit code."""
    try:
        code = command.main(list(args), prog_name=prog_name, standalone_mode=False)
        sys.stdout.flush()
    except (MossError, MemoryError) as error:
        if "--debug" in args:
            raise
        words = _exhausted(error) if isinstance(error, MemoryError) else str(error)
        click.echo(f"{prog_name}: {one_line(words)}", err=True)
        return 1
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo(pick("Interrupted.", "已中断。"), err=True)
        return INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return 1
    except OSError as error:
        if "--debug" in args or not _is_full(error):
            raise
        _forget_stdout()
        click.echo(f"{prog_name}: {_full(error)}", err=True)
        return 1
    return code if isinstance(code, int) else 0


def one_line(message: str) -> str:
    """A message without line breaks or control characters."""
    return "".join(c if c.isprintable() else " " for c in " ".join(message.split()))


def _is_full(error: OSError) -> bool:
    """Whether the disk behind stdout is full; where the library writes files, it says so itself, with their names."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and error.filename is None


def _exhausted(error: MemoryError) -> str:
    return pick(
        f"the system gives no more memory ({str(error) or 'how much was wanted is not known'}). Close other programs.",
        f"系统无法再分配内存（{str(error) or '所需大小未知'}）。请关闭其他程序。",
    )


def _full(error: OSError) -> str:
    return pick(
        f"standard output cannot be written: {error.strerror}. Make room, or send it elsewhere.",
        f"无法写入标准输出：{error.strerror}。请腾出空间，或输出到别处。",
    )


def _forget_stdout() -> None:
    """Point stdout at nothing, so that the last flush at exit does not complain about the closed pipe."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)


def _open_missing_streams() -> None:
    """Put the null device where the caller closed a standard stream (`<&-`): Python has None there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: the closed one
            setattr(sys, name, os.fdopen(handle, mode, encoding="utf-8", closefd=False))


def _soften_streams() -> None:
    """Let a character that the terminal's encoding does not know become "?" rather than an error."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _prepare(args: Sequence[str]) -> None:
    """What comes before any help text is written: streams that cannot fail, the language, the log."""
    _open_missing_streams()
    _soften_streams()
    asked = language_of(args)
    if asked is not None:
        set_language(LANGUAGES.get(asked))
    if "--debug" in args:
        import logging

        logging.basicConfig(level=logging.DEBUG, format="%(levelname)s %(name)s: %(message)s")


def main() -> NoReturn:
    """The program `moss-jt`."""
    run(make_group)
