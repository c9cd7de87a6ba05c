"""`moss-convert hf2jittor`: a Hugging Face folder to a native one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moss_jt.cli.convert.sizes import in_words
from moss_jt.language import pick

if TYPE_CHECKING:
    from moss_jt.config import FloatType
    from moss_jt.converters.conversion import Conversion
    from moss_jt.converters.native_plan import HeadType

HEADS: dict[str, HeadType] = {"fp16": "float16", "int8": "int8"}
DTYPES: dict[str, FloatType] = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@click.command(
    "hf2jittor",
    help=pick(
        "Convert the Hugging Face folder SRC to the native folder DST (SRC-jittor if not given).\n\n"
        "Takes .bin and safetensors, one file or shards, float or GPTQ int4/int8. The result appears when it is "
        "whole; until then it grows in .DST.partial, from which --resume goes on.\n\n"
        "Example: moss-convert hf2jittor moss-moon-003-sft-int4",
        "将 Hugging Face 目录 SRC 转换为本程序格式的目录 DST（默认为 SRC-jittor）。\n\n"
        "支持 .bin 与 safetensors、单文件与分片、浮点与 GPTQ int4/int8。转换完成后 DST 才会出现；"
        "此前的内容在 .DST.partial 中，可用 --resume 继续。\n\n例如：moss-convert hf2jittor moss-moon-003-sft-int4",
    ),
)
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path), required=False)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    help=pick("Type of the floating-point weights; else the source's.", "浮点权重的类型；默认与源文件相同。"),
)
@click.option(
    "--head",
    type=click.Choice(list(HEADS)),
    help=pick(
        "Type of the output layer; else like the others. int8 halves what each token reads of it, and rounds it.",
        "输出层的类型；默认与其他浮点权重相同。int8 使每个词元读取量减半，但有舍入误差。",
    ),
)
@click.option("--resume", is_flag=True, help=pick("Go on with an interrupted conversion.", "继续中断的转换。"))
@click.option(
    "--delete-source",
    is_flag=True,
    help=pick(
        "Delete each weight file of SRC as soon as it is used up, to save disk.",
        "源权重文件用完后立即删除，以节省磁盘。",
    ),
)
@click.option("--json", "as_json", is_flag=True, help=pick("Print the result as JSON.", "以 JSON 输出结果。"))
def command(
    *,
    src: Path,
    dst: Path | None,
    dtype: str | None,
    head: str | None,
    resume: bool,
    delete_source: bool,
    as_json: bool,
) -> None:
    """Convert a folder."""
    from moss_jt.cli.progress import TerminalProgress
    from moss_jt.converters.hf2jittor import hf2jittor

    try:
        done = hf2jittor(
            src,
            dst,
            dtype=DTYPES[dtype] if dtype is not None else None,
            head=HEADS[head] if head is not None else None,
            resume=resume,
            delete_source=delete_source,
            way_out="" if delete_source else pick(", or add --delete-source", "，或加上 --delete-source"),
            progress=TerminalProgress(),
        )
    except KeyboardInterrupt:
        click.echo(
            pick("Stopped; the same command with --resume goes on.", "已停止；加上 --resume 可继续转换。"), err=True
        )
        raise
    if as_json:
        click.echo(json.dumps(_as_dict(done)))
        return
    for line in _notes(done):
        click.echo(line, err=True)
    click.echo(done.path)


def _as_dict(done: Conversion) -> dict[str, object]:
    quantization, head = done.config.quantization, done.config.head_quantization
    return {
        "path": str(done.path),
        "bytes": done.nbytes,
        "bits": quantization.bits if quantization else 16 if done.config.dtype != "float32" else 32,
        "group_size": quantization.group_size if quantization else None,
        "dtype": done.config.dtype,
        "head_bits": head.bits if head else None,
        "dropped_tensors": done.dropped,
        "dropped_bytes": done.dropped_bytes,
        "resumed_tensors": done.resumed,
        "deleted_source_bytes": done.deleted_bytes,
    }


def _notes(done: Conversion) -> list[str]:
    """What the user should know about a conversion, in lines."""
    quantization = done.config.quantization
    kind = (
        f"int{quantization.bits}, "
        + pick(f"groups of {quantization.group_size}", f"每组 {quantization.group_size}").replace("-1", "K")
        if quantization
        else done.config.dtype or pick("mixed float types", "混合浮点类型")
    )
    if done.config.head_quantization is not None:
        bits = done.config.head_quantization.bits
        kind += pick(f", lm_head int{bits}", f"，lm_head 为 int{bits}")
    lines = [pick(f"Weights: {in_words(done.nbytes)}, {kind}", f"权重：{in_words(done.nbytes)}，{kind}")]
    if done.dropped:
        lines.append(
            pick(
                f"Dropped: {done.dropped} causal_mask buffers ({in_words(done.dropped_bytes)}), which can be worked out",
                f"已略去：{done.dropped} 个 causal_mask（{in_words(done.dropped_bytes)}），可由程序算出",
            )
        )
    if done.resumed:
        lines.append(
            pick(f"Kept from the earlier run: {done.resumed} tensors", f"沿用此前已完成的 {done.resumed} 个张量")
        )
    if done.deleted_bytes:
        lines.append(
            pick(
                f"Deleted from the source: {in_words(done.deleted_bytes)}",
                f"已删除源文件 {in_words(done.deleted_bytes)}",
            )
        )
    return lines
