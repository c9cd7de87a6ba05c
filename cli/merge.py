"""`moss-jt merge`: a model and its adapter to one model."""

from __future__ import annotations

from pathlib import Path

import click

from moss_jt.cli.convert.hf2jittor import DTYPES
from moss_jt.language import pick


@click.command(
    "merge",
    help=pick(
        "Add the ADAPTER that moss-jt finetune trained to the weights of MODEL; the result comes to DST.\n\n"
        "An int4 or int8 model becomes one in floating point; moss-jt quantize rounds it again. To talk to a model "
        "with its adapter nothing needs to be merged: moss-jt chat --adapter.\n\n"
        "Example: moss-jt merge moss-moon-003-sft out/adapter my-moss",
        "将 moss-jt finetune 训练的适配器 ADAPTER 合并进 MODEL 的权重，结果写入 DST。\n\n"
        "int4 或 int8 模型合并后为浮点模型，可用 moss-jt quantize 再次量化。若只需对话，无需合并：moss-jt chat --adapter。\n\n"
        "例如：moss-jt merge moss-moon-003-sft out/adapter my-moss",
    ),
)
@click.argument("model")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    help=pick("Of the weights; else the model's.", "权重类型；默认与模型相同。"),
)
def command(*, model: str, adapter: Path, dst: Path, dtype: str | None) -> None:
    """Merge an adapter."""
    from moss_jt.cli.progress import TerminalProgress
    from moss_jt.finetune.merge import merge_adapter
    from moss_jt.hub import resolve_model
    from moss_jt.load import native_folder

    progress = TerminalProgress()
    folder = native_folder(resolve_model(model), progress)
    kind = DTYPES[dtype] if dtype is not None else None
    click.echo(merge_adapter(folder, adapter, dst, dtype=kind, progress=progress))
