"""`moss-convert inspect`: what a folder of weights is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moss_jt.cli.convert.sizes import in_words
from moss_jt.language import pick

if TYPE_CHECKING:
    from moss_jt.config import Quantization
    from moss_jt.converters.inspection import Inspection

SHAPE_KEYS = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "rotary_dim")


@click.command(
    "inspect",
    help=pick(
        "Tell what the folder PATH holds, native or Hugging Face, from its headers.\n\n"
        "Example: moss-convert inspect moss-moon-003-sft-int4",
        "根据文件头说明目录 PATH 的内容，支持本程序格式与 Hugging Face 格式。\n\n"
        "例如：moss-convert inspect moss-moon-003-sft-int4",
    ),
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help=pick("Print everything as JSON.", "以 JSON 输出全部内容。"))
def command(path: Path, as_json: bool) -> None:
    """Inspect a folder."""
    from moss_jt.converters.inspection import inspect

    found = inspect(path)
    click.echo(json.dumps(_as_dict(found)) if as_json else "\n".join(_lines(found)))


def _as_dict(found: Inspection) -> dict[str, object]:
    config = found.config
    quantization = config.quantization
    return {
        "path": str(found.path),
        "format": found.form,
        "name": config.name,
        "shape": {**{key: getattr(config, key) for key in SHAPE_KEYS}, "n_inner": config.inner_dim},
        "bits": quantization.bits if quantization else None,
        "group_size": quantization.group_size if quantization else None,
        "head_bits": config.head_quantization.bits if config.head_quantization else None,
        "act_order_matrices": found.act_order,
        "parameters": found.parameters,
        "bytes": found.nbytes,
        "files": [{"name": file.name, "bytes": file.nbytes, "tensors": file.tensors} for file in found.files],
        "dtypes": found.dtypes,
        "dropped_tensors": found.dropped,
        "tokenizer": found.tokenizer,
        "tokenizer_problem": found.tokenizer_problem,
        "missing_markers": list(found.missing_markers),
        "tensors": {name: list(shape) for name, shape in found.shapes.items()},
    }


def _lines(found: Inspection) -> list[str]:
    """The same for people."""
    config = found.config
    quantization = config.quantization
    weights = ", ".join(f"{count} x {dtype}" for dtype, count in found.dtypes.items())
    if quantization:
        groups = _group_words(quantization)
        order = pick(f", {found.act_order} matrices in act-order", f"，{found.act_order} 个矩阵为 act-order")
        weights += f"; int{quantization.bits}, {groups}{order if found.act_order else ''}"
    head = config.head_quantization
    if head:
        weights += f"; lm_head int{head.bits}, {_group_words(head)}"
    lines = [
        (pick("Folder", "目录"), str(found.path)),
        (pick("Format", "格式"), found.form),
        (pick("Shape", "形状"), ", ".join(f"{key} {getattr(config, key)}" for key in SHAPE_KEYS)),
        (pick("Parameters", "参数"), f"{found.parameters:,}"),
        (pick("Weights", "权重"), weights),
        (pick("Size", "大小"), in_words(found.nbytes)),
        *((pick("File", "文件"), f"{file.name}: {file.nbytes:,} B, {file.tensors}") for file in found.files),
        (pick("Tokenizer", "分词器"), _tokenizer_words(found)),
    ]
    if found.dropped:
        lines.append((pick("Not needed", "无需"), f"{found.dropped} x causal_mask"))
    width = max(len(label) for label, _ in lines)
    return [f"{label:<{width}}  {value}" for label, value in lines]


def _group_words(quantization: Quantization) -> str:
    size = quantization.group_size
    return pick("one group a row", "每行一组") if size == -1 else pick(f"groups of {size}", f"每组 {size}")


def _tokenizer_words(found: Inspection) -> str:
    if found.tokenizer is None:
        return pick("none", "无")
    if found.tokenizer_problem is not None:
        return pick(
            f"{found.tokenizer}, broken: {found.tokenizer_problem}",
            f"{found.tokenizer}，已损坏：{found.tokenizer_problem}",
        )
    if found.missing_markers:
        return found.tokenizer + pick(", lacks ", "，缺少 ") + " ".join(found.missing_markers)
    return found.tokenizer
