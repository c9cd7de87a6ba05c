"""`moss-convert synth`: a model of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moss_jt.cli.convert.sizes import in_words
from moss_jt.language import pick


@click.command(
    "synth",
    help=pick(
        "Make a model of random weights in the folder DST, with a tokenizer of single bytes.\n\n"
        "It answers nonsense, at the speed and with the memory of the real one.\n\n"
        "Example: moss-convert synth --preset moss-moon-003 --bits 4 random-int4",
        "在目录 DST 中生成随机权重的模型，分词器以单个字节为单位。\n\n"
        "其回答没有意义，但速度和内存占用与真实模型相同。\n\n"
        "例如：moss-convert synth --preset moss-moon-003 --bits 4 random-int4",
    ),
)
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--preset",
    type=click.Choice(["moss-moon-003", "tiny"]),
    required=True,
    help=pick("The shape of the model.", "模型的形状。"),
)
@click.option(
    "--bits",
    type=click.Choice(["4", "8", "16"]),
    default="16",
    show_default=True,
    help=pick("Of the weights; 16 is float16.", "权重位数；16 即 float16。"),
)
@click.option(
    "--head",
    type=click.Choice(["fp16", "int8"]),
    default="fp16",
    show_default=True,
    help=pick("Of the output layer; fp16 is what published models have.", "输出层的类型；已发布的模型为 fp16。"),
)
@click.option("--layers", type=click.IntRange(min=1), help=pick("Other than the preset's.", "层数；默认与预设相同。"))
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help=pick("Of the weights.", "随机种子。")
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["native", "hf"]),
    default="native",
    show_default=True,
    help=pick("hf: one pytorch_model.bin, as from a hub.", "hf：单个 pytorch_model.bin，如同从模型库下载。"),
)
@click.option(
    "--resume", is_flag=True, help=pick("Go on with an interrupted run (native).", "继续中断的任务（native）。")
)
@click.option("--json", "as_json", is_flag=True, help=pick("Print the result as JSON.", "以 JSON 输出结果。"))
def command(
    *,
    dst: Path,
    preset: str,
    bits: str,
    head: str,
    layers: int | None,
    seed: int,
    form: str,
    resume: bool,
    as_json: bool,
) -> None:
    """Make a model."""
    from moss_jt.cli.progress import TerminalProgress
    from moss_jt.converters.synth import preset_config, synthesize, synthesize_foreign

    config = preset_config(
        "tiny" if preset == "tiny" else "moss-moon-003",
        bits=int(bits),
        layers=layers,
        head_bits=8 if head == "int8" else 16,
    )
    progress = TerminalProgress()
    if form == "hf":
        if resume:
            raise click.UsageError(pick("--resume works with --format native only.", "--resume 仅适用于 native 格式。"))
        made = synthesize_foreign(config, dst, seed=seed, progress=progress)
    else:
        made = synthesize(config, dst, seed=seed, resume=resume, progress=progress)
    if as_json:
        click.echo(json.dumps({"path": str(made.path), "bytes": made.nbytes, "layers": made.config.n_layer}))
        return
    size = in_words(made.nbytes)
    click.echo(pick(f"{size} of random weights: its answers are random.", f"{size} 随机权重：回答是随机的。"), err=True)
    click.echo(made.path)
