"""`moss-convert jittor2hf`: a native folder back to a Hugging Face one."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moss_jt.cli.convert.sizes import in_words
from moss_jt.language import pick


@click.command(
    "jittor2hf",
    help=pick(
        "Convert the native folder SRC back to the Hugging Face folder DST, with safetensors files.\n\n"
        "The tensors are those that hf2jittor was given; int4 and int8 come back as GPTQ. A quantised head, for "
        "which that form has no place, becomes floating point.\n\n"
        "Example: moss-convert jittor2hf moss-moon-003-sft-int4-jittor moss-again",
        "将本程序格式的目录 SRC 转换回 Hugging Face 目录 DST（safetensors 文件）。\n\n"
        "张量与 hf2jittor 的输入完全相同；int4 和 int8 还原为 GPTQ 格式。"
        "该格式无法保存量化的输出层，故将其还原为浮点。\n\n"
        "例如：moss-convert jittor2hf moss-moon-003-sft-int4-jittor moss-again",
    ),
)
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--resume", is_flag=True, help=pick("Go on with an interrupted conversion.", "继续中断的转换。"))
@click.option("--json", "as_json", is_flag=True, help=pick("Print the result as JSON.", "以 JSON 输出结果。"))
def command(src: Path, dst: Path, resume: bool, as_json: bool) -> None:
    """Convert a folder back."""
    from moss_jt.cli.progress import TerminalProgress
    from moss_jt.converters.jittor2hf import jittor2hf

    done = jittor2hf(src, dst, resume=resume, progress=TerminalProgress())
    if as_json:
        click.echo(
            json.dumps(
                {
                    "path": str(done.path),
                    "bytes": done.nbytes,
                    "tensors": done.tensors,
                    "resumed_tensors": done.resumed,
                    "dequantised_head": done.head,
                }
            )
        )
        return
    if done.head is not None:
        click.echo(
            pick(
                f"The quantised lm_head became {done.head}; its codes cannot be kept in this form.",
                f"量化的 lm_head 已还原为 {done.head}；此格式无法保存其编码。",
            ),
            err=True,
        )
    size = in_words(done.nbytes)
    click.echo(pick(f"{done.tensors} tensors, {size}", f"{done.tensors} 个张量，{size}"), err=True)
    click.echo(done.path)
