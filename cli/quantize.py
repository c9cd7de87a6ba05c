"""`moss-jt quantize`: a model in floating point to int4 or int8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moss_jt.cli.convert.hf2jittor import DTYPES
from moss_jt.cli.convert.sizes import in_words
from moss_jt.language import pick

if TYPE_CHECKING:
    from moss_jt.config import Bits
    from moss_jt.converters.quantize import Quantized

BITS: dict[str, Bits] = {"4": 4, "8": 8}


@click.command(
    "quantize",
    help=pick(
        "Quantise the model in the folder SRC (Hugging Face or native, in floating point) to the native folder DST.\n\n"
        "Every weight is rounded to the nearest code, with the scale and zero point of each group searched for the "
        "least squared error. Memory stays at a few hundred MB. A SRC that is quantised already keeps its matrices; "
        "only its head can still be made int8. Look at the loss with: moss-jt eval-ppl\n\n"
        "Example: moss-jt quantize moss-moon-003-sft moss-int4 --bits 4 --head int8",
        "将目录 SRC 中的浮点模型（Hugging Face 或本程序格式）量化为本程序格式的目录 DST。\n\n"
        "每个权重取最近的编码，每组的缩放与零点按最小均方误差搜索。内存占用仅数百 MB。"
        "SRC 若已量化，则矩阵保持不变，只能将输出层改为 int8。可用 moss-jt eval-ppl 查看损失。\n\n"
        "例如：moss-jt quantize moss-moon-003-sft moss-int4 --bits 4 --head int8",
    ),
)
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--bits", type=click.Choice(list(BITS)), help=pick("Of each weight of the blocks.", "每个权重的位数。"))
@click.option(
    "--group",
    type=int,
    default=128,
    show_default=True,
    help=pick("Inputs that share a scale; -1 for a whole row.", "共用一个缩放的输入数；-1 表示整行。"),
)
@click.option(
    "--head",
    type=click.Choice(["keep", "int8"]),
    default="keep",
    show_default=True,
    help=pick("The output layer: as it is, or int8.", "输出层：保持原样，或 int8。"),
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    help=pick("Type of what stays in floating point; else the source's.", "保持浮点的权重的类型；默认与源文件相同。"),
)
@click.option("--resume", is_flag=True, help=pick("Go on with an interrupted run.", "继续中断的任务。"))
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help=pick("Print the result, with the error of each matrix, as JSON.", "以 JSON 输出结果及每个矩阵的误差。"),
)
def command(
    *, src: Path, dst: Path, bits: str | None, group: int, head: str, dtype: str | None, resume: bool, as_json: bool
) -> None:
    """Quantise a model."""
    from moss_jt.cli.progress import TerminalProgress
    from moss_jt.converters.quantize import quantize

    try:
        done = quantize(
            src,
            dst,
            bits=BITS[bits] if bits is not None else None,
            group_size=group,
            head="int8" if head == "int8" else None,
            dtype=DTYPES[dtype] if dtype is not None else None,
            resume=resume,
            progress=TerminalProgress(),
        )
    except KeyboardInterrupt:
        click.echo(pick("Stopped; the same command with --resume goes on.", "已停止；加上 --resume 可继续。"), err=True)
        raise
    if as_json:
        click.echo(json.dumps(_as_dict(done)))
        return
    for line in _notes(done):
        click.echo(line, err=True)
    click.echo(done.conversion.path)


def _as_dict(done: Quantized) -> dict[str, object]:
    config = done.conversion.config
    quantization, head = config.quantization, config.head_quantization
    return {
        "path": str(done.conversion.path),
        "bytes": done.conversion.nbytes,
        "bits": quantization.bits if quantization else None,
        "group_size": quantization.group_size if quantization else None,
        "head_bits": head.bits if head else None,
        "dtype": config.dtype,
        "resumed_tensors": done.conversion.resumed,
        "matrices": {
            name: {"relative_error": error.relative, "relative_error_plain": error.plain}
            for name, error in done.errors.items()
        },
    }


def _notes(done: Quantized) -> list[str]:
    """What the user should know, in lines."""
    lines = [pick(f"Weights: {in_words(done.conversion.nbytes)}", f"权重：{in_words(done.conversion.nbytes)}")]
    if done.errors:
        worst = max(done.errors, key=lambda name: done.errors[name].relative)
        mean = sum(error.relative for error in done.errors.values()) / len(done.errors)
        plain = sum(error.plain for error in done.errors.values()) / len(done.errors)
        most = done.errors[worst].relative
        lines.append(
            pick(
                f"Relative error: {mean:.2%} on average (plain rounding: {plain:.2%}), {most:.2%} in {worst}",
                f"相对误差：平均 {mean:.2%}（普通取整为 {plain:.2%}），最大 {most:.2%}（{worst}）",
            )
        )
    if done.conversion.resumed:
        resumed = done.conversion.resumed
        lines.append(pick(f"Kept from the earlier run: {resumed} tensors", f"沿用此前已完成的 {resumed} 个张量"))
    return lines
