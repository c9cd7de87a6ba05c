"""`moss-jt eval-ppl`: how well a model foretells a text."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moss_jt.cli.options import load_options, model_options
from moss_jt.language import pick

if TYPE_CHECKING:
    from moss_jt.perplexity import Perplexity
    from moss_jt.runner import Model


@click.command(
    "eval-ppl",
    help=pick(
        "Tell the perplexity of a model on the text in FILE (UTF-8): lower is better.\n\n"
        "It shows what a storage format costs: compare a model with its quantised form on the same text, context and "
        "stride. A text longer than the context is read in windows; each token is scored once.\n\n"
        "Example: moss-jt eval-ppl --model moss-int4 --context 1024 novel.txt",
        "计算模型在文本文件 FILE（UTF-8）上的困惑度，越低越好。\n\n"
        "可用来衡量存储格式的损失：在相同文本、上下文和步长下，比较模型与其量化版本。"
        "长于上下文的文本按窗口读取，每个词元只计分一次。\n\n"
        "例如：moss-jt eval-ppl --model moss-int4 --context 1024 novel.txt",
    ),
)
@model_options(model_required=True, context=False)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help=pick(
        "Tokens that a window holds. [default: the model's, or what fits]",
        "窗口的词元数。[默认：模型上限，或内存所能容纳]",
    ),
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help=pick("From one window to the next. [default: half the context]", "窗口之间的步长。[默认：上下文的一半]"),
)
@click.option("--ids", is_flag=True, help=pick("FILE holds token ids, not text.", "FILE 的内容是词元编号而非文本。"))
@click.option(
    "--markers",
    is_flag=True,
    help=pick(
        "Read <eoh>, <eom> and their like in the text as control tokens.", "把文本中的 <eoh>、<eom> 等读作控制词元。"
    ),
)
@click.option("--json", "as_json", is_flag=True, help=pick("Print the result as JSON.", "以 JSON 输出结果。"))
def command(
    *,
    model: str,
    file: Path,
    context: int | None,
    stride: int | None,
    ids: bool,
    markers: bool,
    as_json: bool,
    **others: Any,
) -> None:
    """Evaluate a model."""
    if ids and markers:
        raise click.UsageError(pick("--markers is for text, not for --ids.", "--markers 用于文本，不能与 --ids 同用。"))

    from moss_jt.cli.chat_screen import Screen
    from moss_jt.cli.loading import find_model, open_model
    from moss_jt.perplexity import perplexity, read_ids, read_text_tokens
    from moss_jt.tokenizer import load_tokenizer

    screen = Screen(interactive=False)
    folder = find_model(
        model, screen
    )  # the text comes first: encoding takes 200 times its size, and weights fill the rest
    tokens = read_ids(file) if ids else read_text_tokens(file, load_tokenizer(folder), markers=markers)
    loaded = open_model(model, load_options({**others, "context": context}), screen, folder=folder)
    began = time.monotonic()
    found = perplexity(loaded, tokens, context=context, stride=stride, progress=screen.progress())
    seconds = time.monotonic() - began
    if as_json:
        click.echo(json.dumps(_as_dict(found, loaded, seconds)))
        return
    screen.note(_in_words(found, seconds))
    click.echo(f"{found.value:.4f}")


def _as_dict(found: Perplexity, model: Model, seconds: float) -> dict[str, object]:
    return {
        "perplexity": found.value if math.isfinite(found.value) else None,
        "mean_nats": found.mean_nats,
        "tokens": found.tokens,
        "scored_tokens": found.scored,
        "context": found.context,
        "stride": found.stride,
        "windows": found.windows,
        "model": str(model.path),
        "compute": model.compute,
        "kv": model.kv,
        "seconds": round(seconds, 3),
    }


def _in_words(found: Perplexity, seconds: float) -> str:
    return pick(
        f"{found.scored} of {found.tokens} tokens scored in {found.windows} windows of {found.context}, "
        f"{found.stride} apart, in {seconds:.1f} s; {found.mean_nats:.5f} nats each. Perplexity:",
        f"共 {found.tokens} 个词元，计分 {found.scored} 个；{found.windows} 个窗口，长 {found.context}，步长 {found.stride}；"
        f"用时 {seconds:.1f} 秒；平均 {found.mean_nats:.5f} 奈特。困惑度：",
    )
