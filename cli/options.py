"""Options that several commands share: which model, how it computes, how it chooses words."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import click

from moss_jt.language import pick

if TYPE_CHECKING:
    from moss_jt.config import GenerationConfig, MossConfig

F = TypeVar("F", bound=Callable[..., Any])

LOADING = ("adapter", "device", "compute", "memory", "vram", "host_share", "kv", "context")
SAMPLING = ("greedy", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "max_new_tokens")


def _share(ctx: click.Context, param: click.Parameter, value: str) -> float | Literal["auto"]:
    """A part of something, 0 to 1, or "auto"."""
    given: Any = value if value == "auto" else click.FloatRange(0, 1)(value, param, ctx)
    return cast('float | Literal["auto"]', given)


def model_options(*, model_required: bool = False, embedded: bool = False, context: bool = True) -> Callable[[F], F]:
    """Add --model and the options of `load_options`.

    Args:
        model_required: there is no command without a model.
        embedded: without a model the one that comes with the package is taken.
        context: False for a command with a --context of its own.
    """
    options = (
        click.option(
            "--model",
            required=model_required,
            metavar=pick("DIR|NAME", "目录|名称"),
            help=pick(
                "Folder of a model, native or Hugging Face, or the name of a stored one.",
                "模型目录（本程序格式或 Hugging Face 格式），或已保存模型的名称。",
            )
            + (pick(" [default: moss-tiny, which comes along]", "[默认：附带的 moss-tiny]") if embedded else ""),
        ),
        click.option(
            "--adapter",
            metavar=pick("DIR", "目录"),
            help=pick(
                "Folder of an adapter that moss-jt finetune made for this model.",
                "由 moss-jt finetune 为该模型训练的适配器目录。",
            ),
        ),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            metavar="auto|cpu|cuda|cuda:N",
            help=pick(
                "Where to compute; auto takes a CUDA device where one can be used.",
                "计算设备；auto 在有可用的 CUDA 设备时使用它。",
            ),
        ),
        click.option(
            "--compute",
            type=click.Choice(["fast", "exact"]),
            default="fast",
            show_default=True,
            help=pick(
                "fast rounds the inputs of int4 and int8 weights, to int8 on the CPU and to half on a CUDA device; exact "
                "computes in float32.",
                "fast：int4/int8 权重的输入在 CPU 上舍入为 int8，在 CUDA 设备上舍入为 float16；exact：全程 float32。",
            ),
        ),
        click.option(
            "--memory",
            metavar="SIZE",
            help=pick(
                "All memory that may be taken, like 6GiB; weights that do not fit are read from disk as they are "
                "needed. [default: what is free, less a reserve]",
                "可用内存总量，如 6GiB；放不下的权重按需从磁盘读取。[默认：空闲内存减去预留]",
            ),
        ),
        click.option(
            "--vram",
            metavar="SIZE",
            help=pick(
                "All memory of the device that may be taken, like 8GiB; weights that do not fit stay in main memory and "
                "are copied as they are needed. [default: what is free, less a reserve]",
                "可用显存总量，如 8GiB；放不下的权重留在内存中，按需复制。[默认：空闲显存减去预留]",
            ),
        ),
        click.option(
            "--host-share",
            default="0",
            callback=_share,
            metavar="0..1|auto",
            help=pick(
                "With a device: this part of the feed-forward weights that would be copied for each token is multiplied by "
                "the processor instead; auto measures what is fastest here. [default: 0]",
                "使用显卡时：每个词元本应复制的前馈层权重中，由处理器直接计算的比例；auto 测量后取最快的比例。[默认 0]",
            ),
        ),
        click.option(
            "--kv",
            type=click.Choice(["fp32", "fp16", "int8"]),
            help=pick(
                "Type of the cached keys and values. [default: fp16, with --compute exact fp32]",
                "键值缓存的类型。[默认 fp16；--compute exact 时为 fp32]",
            ),
        ),
    )
    longest = click.option(
        "--context",
        type=click.IntRange(min=1),
        metavar="TOKENS",
        help=pick(
            "Longest conversation. [default: the model's, or what fits]",
            "对话的最大长度（词元）。[默认：模型上限，或内存所能容纳]",
        ),
    )
    return _all_of(*options, longest) if context else _all_of(*options)


def sampling_options(function: F) -> F:
    """Add the options of `generation_config`."""
    add = _all_of(
        click.option(
            "--max-new-tokens", type=int, help=pick("Longest answer. [default: 512]", "回答的最大长度。[默认 512]")
        ),
        click.option(
            "--temperature",
            type=float,
            help=pick("0 is greedy. [default: the model's, or 0.7]", "0 即贪心。[默认：模型自定，或 0.7]"),
        ),
        click.option(
            "--top-k",
            type=int,
            help=pick(
                "Keep this many best tokens; 0: all. [default: 40]", "只保留最好的 k 个词元，0 为全部。[默认 40]"
            ),
        ),
        click.option(
            "--top-p",
            type=float,
            help=pick(
                "Keep the best tokens up to this mass. [default: 0.8]", "只保留累计概率达到此值的词元。[默认 0.8]"
            ),
        ),
        click.option(
            "--repetition-penalty", type=float, help=pick("1.0: none. [default: 1.02]", "1.0 为不惩罚。[默认 1.02]")
        ),
        click.option(
            "--seed", type=int, help=pick("Of the random draws, to repeat an answer.", "随机种子，用于复现回答。")
        ),
        click.option("--greedy", is_flag=True, help=pick("Always take the best token.", "总是选取最优词元。")),
    )
    return add(function)


def database_option(function: F) -> F:
    """Add --database, the server's file."""
    add = click.option(
        "--database",
        type=click.Path(dir_okay=False, path_type=Path),
        help=pick(
            "File of keys and conversations. [default: under MOSS_JT_HOME]",
            "密钥与对话的数据库文件。[默认：MOSS_JT_HOME 之下]",
        ),
    )
    return add(function)


def tool_options(function: F) -> F:
    """Add --tools and where tools get what they give, for `moss_jt.cli.chat_tools.open_tools`."""
    add = _all_of(
        click.option(
            "--tools",
            metavar="NAME,...",
            help=pick(
                "Tools that the model may call: search, calc, solve, draw, installed ones, or all. For plugin models.",
                "模型可调用的工具：search、calc、solve、draw、已安装的其他工具，或 all。用于 plugin 模型。",
            ),
        ),
        click.option(
            "--search-with",
            metavar="BACKEND",
            help=pick(
                "local, ddgs, searxng=URL, bing or bing=URL. [default: MOSS_JT_SEARCH, else local]",
                "local、ddgs、searxng=URL、bing 或 bing=URL。[默认：MOSS_JT_SEARCH，否则 local]",
            ),
        ),
        click.option(
            "--draw-with",
            metavar="BACKEND",
            help=pick(
                "placeholder, a1111=URL, comfyui=URL or diffusers. [default: MOSS_JT_DRAW, else placeholder]",
                "placeholder、a1111=URL、comfyui=URL 或 diffusers。[默认：MOSS_JT_DRAW，否则 placeholder]",
            ),
        ),
    )
    return add(function)


def load_options(values: dict[str, Any]) -> dict[str, Any]:
    """Take the options of loading out of a command's values, as `load_model` names them."""
    given = {name: values.pop(name) for name in LOADING}
    given["max_tokens"] = given.pop("context")
    return given


def generation_config(values: dict[str, Any]) -> Callable[[MossConfig], GenerationConfig]:
    """Take the sampling options out of a command's values.

    Returns:
        what they mean for a model: what was not given keeps its default.

    Raises:
        ConfigError: a value cannot work.
    """
    from moss_jt.config import GenerationConfig

    given = {name: values.pop(name) for name in SAMPLING}
    if given.pop("greedy"):
        given["do_sample"] = False
    given = {name: value for name, value in given.items() if value is not None}
    GenerationConfig(**given)  # before anything is loaded
    return partial(GenerationConfig.for_model, **given)


def _all_of(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """One decorator for several options, shown in this order."""

    def add(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return add
