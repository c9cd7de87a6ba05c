"""`moss-jt fit`: where every part of a model would go, and how fast it would be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from moss_jt.language import pick

if TYPE_CHECKING:
    from pathlib import Path

    from moss_jt.config import MossConfig
    from moss_jt.fit import Change, Fit, Part

GIB, MIB = 1 << 30, 1 << 20


@click.command(
    help=pick(
        "Tell whether a model fits, where each part of it goes, and how fast it will be.\n\n"
        "Works before anything is fetched: config.json is enough, here or on the hub, or a preset. The rates of this machine are measured "
        "at the first call (some seconds) and kept.\n\n"
        "Example: moss-jt fit --preset moss-moon-003 --bits 4 --memory 6GiB\n\n"
        "Example: moss-jt fit --model fnlp/moss-moon-003-sft-int4 --json",
        "判断模型能否运行、各部分放在何处、速度如何。\n\n"
        "无需先下载：有 config.json（本地或模型库中）或预设即可。首次运行时测量本机性能（数秒）并保存结果。\n\n"
        "例如：moss-jt fit --preset moss-moon-003 --bits 4 --memory 6GiB\n\n"
        "例如：moss-jt fit --model fnlp/moss-moon-003-sft-int4 --json",
    )
)
@click.option(
    "--model",
    metavar=pick("DIR|NAME", "目录|名称"),
    help=pick(
        "Folder with config.json, or the name of a model, stored or on the hub.",
        "含 config.json 的目录，或模型名称（已保存的，或模型库中的）。",
    ),
)
@click.option(
    "--preset",
    type=click.Choice(["moss-moon-003", "tiny"]),
    help=pick("A shape, where there is no folder.", "没有目录时使用的预设形状。"),
)
@click.option(
    "--bits",
    type=click.Choice(["4", "8", "16"]),
    help=pick("Of the preset's weights. [default: 16]", "预设的权重位数。[默认 16]"),
)
@click.option(
    "--head",
    type=click.Choice(["fp16", "int8"]),
    help=pick("Of the preset's output layer. [default: fp16]", "预设的输出层类型。[默认 fp16]"),
)
@click.option(
    "--memory",
    metavar="SIZE",
    help=pick(
        "All memory that may be taken, like 6GiB. [default: what is free, less a reserve]",
        "可用内存总量，如 6GiB。[默认：空闲内存减去预留]",
    ),
)
@click.option(
    "--vram",
    metavar="SIZE",
    help=pick(
        "Plan for a CUDA device of which so much may be taken, like 8GiB; --memory is then that of its host.",
        "为可用显存如 8GiB 的 CUDA 设备做规划；此时 --memory 指主机内存。",
    ),
)
@click.option(
    "--kv",
    type=click.Choice(["fp32", "fp16", "int8"]),
    help=pick(
        "Type of the cached keys and values. [default: fp16, with --compute exact fp32]",
        "键值缓存的类型。[默认 fp16；--compute exact 时为 fp32]",
    ),
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help=pick(
        "Longest conversation. [default: the model's, or what fits]", "对话的最大长度。[默认：模型上限，或内存所能容纳]"
    ),
)
@click.option(
    "--compute",
    type=click.Choice(["fast", "exact"]),
    default="fast",
    show_default=True,
    help=pick("How products with weights are computed.", "权重乘法的计算方式。"),
)
@click.option("--recalibrate", is_flag=True, help=pick("Measure this machine anew.", "重新测量本机性能。"))
@click.option("--json", "as_json", is_flag=True, help=pick("Print one JSON object.", "输出一个 JSON 对象。"))
def command(
    *,
    model: str | None,
    preset: str | None,
    bits: str | None,
    head: str | None,
    memory: str | None,
    vram: str | None,
    kv: str | None,
    context: int | None,
    compute: Literal["fast", "exact"],
    recalibrate: bool,
    as_json: bool,
) -> None:
    """Plan, predict, print."""
    if (model is None) == (preset is None):
        raise click.UsageError(pick("give either --model or --preset.", "请给出 --model 或 --preset 之一。"))
    if model is not None and (bits or head):
        raise click.UsageError(
            pick("--bits and --head are for --preset; a model has its own.", "--bits 与 --head 仅用于 --preset。")
        )

    from moss_jt.cli.progress import TerminalProgress
    from moss_jt.fit import fit
    from moss_jt.memory import parse_size

    shape = _shape_of(model) if model is not None else _preset(preset or "", bits, head)
    limit = None if memory is None else parse_size(memory, "--memory")
    if vram is not None:
        _fit_device(
            shape, parse_size(vram, "--vram"), as_json=as_json, memory=limit, kv=kv, compute=compute, context=context
        )
        return
    found = fit(
        shape,
        memory=limit,
        kv=kv,
        compute=compute,
        context=context,
        recalibrate=recalibrate,
        progress=TerminalProgress(),
    )
    if as_json:
        click.echo(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        click.echo("\n".join(screen(found)))


def _fit_device(shape: Path | MossConfig, vram: int, *, as_json: bool, **options: Any) -> None:
    """Plan for a device; measure the one that is here."""
    from moss_jt.accelerator import open_accelerator
    from moss_jt.cli import fit_device as report
    from moss_jt.cli.progress import TerminalProgress
    from moss_jt.fit_device import fit_device

    progress = TerminalProgress()
    device = open_accelerator("auto", vram, progress)
    found = fit_device(shape, vram=vram, device=device, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(found.to_dict(), ensure_ascii=False))
        return
    for part in report.screen(found, None if device is None else device.name):
        click.echo(part if isinstance(part, str) else "\n".join(table(part)))


def _shape_of(model: str) -> Path | MossConfig:
    """The folder of a model that is here; else what the hub says of it, and nothing else is fetched."""
    from moss_jt import stored
    from moss_jt.hub import resolve_model
    from moss_jt.paths import expand
    from moss_jt.pull_plan import hub_config

    is_elsewhere = "/" in model and stored.is_model_name(model) and stored.find_model(model) is None
    return hub_config(model) if is_elsewhere and not expand(model).exists() else resolve_model(model)


def _preset(name: str, bits: str | None, head: str | None) -> MossConfig:
    from moss_jt.converters.synth import preset_config

    known: Literal["tiny", "moss-moon-003"] = "tiny" if name == "tiny" else "moss-moon-003"
    return preset_config(known, bits=int(bits or 16), head_bits=8 if head == "int8" else 16)


def screen(found: Fit) -> list[str]:
    """The lines of the report, none wider than 80 columns."""
    lines = [*_title(found), ""]
    lines += table([_headings(), *(_part(part) for part in _shown(found.parts)), _total(found)])
    lines += ["", *table([_speed_headings(), *_speeds(found)])]
    lines += ["", *_prompts(found)]
    if found.changes:
        lines += ["", pick("What would make it faster:", "可以提速的办法：")]
        lines += table([_change(change) for change in found.changes], indent=2)
    lines += [f"! {line}" for line in found.warnings]
    return [*lines, "", _measured(found)]


def table(rows: Sequence[Sequence[str]], *, indent: int = 0) -> list[str]:
    """Columns as wide as need be: the first to the left, the others to the right."""
    widths = [max(_columns(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first = row[0] + " " * (widths[0] - _columns(row[0]))
        rest = (" " * (width - _columns(cell)) + cell for width, cell in zip(widths[1:], row[1:], strict=True))
        lines.append((" " * indent + "  ".join([first, *rest])).rstrip())
    return lines


def _columns(text: str) -> int:
    """Columns on a terminal: a Chinese character takes two."""
    return sum(2 if ord(character) >= 0x2E80 else 1 for character in text)


def _title(found: Fit) -> list[str]:
    config, memory, tokens = found.config, _size(found.plan.memory), found.plan.context
    kind = f"int{config.quantization.bits}" if config.quantization else config.dtype or "float16"
    return [
        pick(
            f"{found.name}: {kind}, {config.n_layer} layers of width {config.n_embd}",
            f"{found.name}：{kind}，{config.n_layer} 层，宽度 {config.n_embd}",
        ),
        pick(f"{memory} of memory, up to {tokens} tokens", f"内存 {memory}，最多 {tokens} 个词元"),
    ]


def _headings() -> list[str]:
    return [pick("part", "部分"), pick("size", "大小"), pick("in memory", "内存"), pick("on disk", "磁盘")]


def _shown(parts: Sequence[Part]) -> list[Part]:
    return [part for part in parts if part.total]


def _part(part: Part) -> list[str]:
    names = {
        "layers": pick("layers", "各层"),
        "head": pick("output layer", "输出层"),
        "embedding": pick("embedding (rows as needed)", "词嵌入（按行读取）"),
        "small": pick("norms and biases", "归一化与偏置"),
        "kv": pick("KV cache (grows)", "键值缓存（逐步增长）"),
        "ring": pick("ring for streamed weights", "流式读取缓冲环"),
        "buffers": pick("activations", "激活值"),
        "process": pick("the process itself", "进程本身"),
    }
    stored = f", {part.stored}" if part.stored else ""
    return [names[part.key] + stored, _size(part.total), _cell(part.memory), _cell(part.disk)]


def _total(found: Fit) -> list[str]:
    used = sum(part.memory for part in found.parts)
    return [pick("together at the start", "启动时合计"), "", _size(used), ""]


def _cell(nbytes: int) -> str:
    return _size(nbytes) if nbytes else "-"


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / MIB:.1f} MiB"


def _speed_headings() -> list[str]:
    return [
        pick("tokens so far", "已有词元"),
        pick("KV cache", "键值缓存"),
        pick("weights held", "内存中权重"),
        pick("read a token", "每词元读取"),
        pick("tokens/s", "词元/秒"),
        pick("limit", "瓶颈"),
    ]


def _speeds(found: Fit) -> list[list[str]]:
    bounds = {"disk": pick("disk", "磁盘"), "compute": pick("computing", "计算")}
    return [
        [
            str(step.position),
            _size(step.kv_bytes),
            _size(step.resident_bytes),
            _cell(step.streamed_bytes),
            f"{step.tokens_per_s:.2f}",
            bounds[step.bound],
        ]
        for step in found.decoding
    ]


def _prompts(found: Fit) -> list[str]:
    return [
        pick(
            f"A prompt of {prompt.tokens} tokens: {prompt.seconds:.1f} s, {prompt.tokens_per_s:.1f} tokens/s",
            f"{prompt.tokens} 个词元的提示：{prompt.seconds:.1f} 秒，{prompt.tokens_per_s:.1f} 词元/秒",
        )
        for prompt in found.prefill
    ]


def _change(change: Change) -> list[str]:
    value = change.value
    words = {
        "memory": pick("{} more memory", "增加 {} 内存").format(_size(int(value)) if change.key == "memory" else ""),
        "bits": pick(f"weights in int{value}", f"权重改为 int{value}"),
        "head": pick("output layer in int8 (moss-jt quantize)", "输出层改为 int8（moss-jt quantize）"),
        "kv": pick("--kv int8", "--kv int8"),
        "context": pick(f"conversations up to {value} tokens", f"对话不超过 {value} 个词元"),
    }
    end = "" if change.streams else pick("nothing read from disk", "无需读取磁盘")
    return [words[change.key], f"{change.factor:.1f}x" if change.factor >= 1.1 else f"{change.factor:.2f}x", end]


def _measured(found: Fit) -> str:
    known: Any = found.calibration
    disk = found.rates.disk / 1e9
    memory = known.memory.median / 1e9
    busy = (
        "" if known.idle >= 0.8 else pick(" (busy; again: --recalibrate)", "（当时机器繁忙，可用 --recalibrate 重测）")
    )
    return pick(
        f"Measured {known.when}{busy}: memory {memory:.1f} GB/s, disk {disk:.2f} GB/s",
        f"测量于 {known.when}{busy}：内存 {memory:.1f} GB/s，磁盘 {disk:.2f} GB/s",
    )
