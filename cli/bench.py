"""`moss-jt bench`: how fast a model computes here, and how near that is to what the machine can do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from moss_jt.cli.options import load_options, model_options
from moss_jt.language import pick

if TYPE_CHECKING:
    from moss_jt.cli.chat_screen import Screen
    from moss_jt.runner import Model


def _counts(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """Whole numbers from 1 on, separated by commas."""
    words = value.split(",")
    if not all(word.strip().isascii() and word.strip().isdigit() and int(word) > 0 for word in words):
        raise click.BadParameter(
            pick(f"{value!r} is not a list of numbers like 128,512.", f"{value!r} 不是用逗号分隔的数字，如 128,512。")
        )
    return tuple(int(word) for word in words)


@click.command(
    help=pick(
        "Measure how fast a model computes here, beside what this machine can do at best in the same run.\n\n"
        "Decoding is compared with the read bandwidth of memory (and of the disk, for weights that are streamed), "
        "prefill with the processor's arithmetic. Limits and runs alternate; medians are told. It computes on the CPU, "
        "whatever devices there are; benchmarks/gpu_suite.sh measures a CUDA device.\n\n"
        "\b\nExample: moss-jt bench --synthetic moss-moon-003-int4 --layers 8\n"
        "Example: moss-jt bench --model DIR --memory 6GiB --json",
        "测量模型在本机的速度，并与同一次运行中测得的本机极限比较。\n\n"
        "解码与内存读取带宽（流式读取的权重则与磁盘）比较，预填充与处理器的算力比较。"
        "极限与运行交替测量，给出中位数。始终在 CPU 上计算；测量 CUDA 设备请用 benchmarks/gpu_suite.sh。\n\n"
        "\b\n例如：moss-jt bench --synthetic moss-moon-003-int4 --layers 8\n"
        "例如：moss-jt bench --model DIR --memory 6GiB --json",
    )
)
@model_options(model_required=False, context=False)
@click.option(
    "--synthetic",
    metavar="NAME",
    help=pick(
        "Random weights made in memory instead: moss-moon-003-int4, -int8 or -fp16.",
        "改用内存中的随机权重：moss-moon-003-int4、-int8 或 -fp16。",
    ),
)
@click.option(
    "--layers",
    type=click.IntRange(min=1),
    help=pick("Of --synthetic, other than the model's own.", "用于 --synthetic：层数，默认与模型相同。"),
)
@click.option(
    "--prompt-tokens",
    metavar="N,N",
    callback=_counts,
    default="128,512",
    show_default=True,
    help=pick("Lengths of the prompts that are timed.", "要计时的提示词长度。"),
)
@click.option(
    "--context",
    metavar="N,N",
    callback=_counts,
    default="128",
    show_default=True,
    help=pick("Tokens cached at the end of the answers that are timed.", "计时的回答结束时缓存的词元数。"),
)
@click.option(
    "--new-tokens",
    type=click.IntRange(min=2),
    default=16,
    show_default=True,
    help=pick("Of each answer.", "每个回答的词元数。"),
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help=pick("Conversations that answer at once.", "同时回答的对话数。"),
)
@click.option(
    "--pairs",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help=pick("How often limit and run alternate.", "极限与运行交替的次数。"),
)
@click.option("--json", "as_json", is_flag=True, help=pick("Print one JSON object.", "输出一个 JSON 对象。"))
@click.option(
    "--save",
    is_flag=True,
    help=pick(
        "Keep the line under benchmarks/results/ of the checkout.", "将结果行保存到源码目录的 benchmarks/results/。"
    ),
)
def command(*, as_json: bool, save: bool, **values: Any) -> None:
    """Load or make the model, measure, print."""
    from moss_jt.bench import Settings, measure
    from moss_jt.cli.chat_screen import Screen
    from moss_jt.limits import Limits
    from moss_jt.record import keep

    if (values["model"] is None) == (values["synthetic"] is None):
        raise click.UsageError(pick("Give either --model or --synthetic.", "请给出 --model 或 --synthetic 之一。"))
    settings = Settings(
        prompt_tokens=values.pop("prompt_tokens"),
        contexts=values.pop("context"),
        new_tokens=values.pop("new_tokens"),
        batch=values.pop("batch"),
        pairs=values.pop("pairs"),
    )
    screen = Screen(interactive=False)
    times: dict[str, float] = {}
    model = _open(values, settings.longest, screen, times)
    with Limits() as limits:
        report = {**times, **measure(model, settings, limits, screen.progress())}
    line = keep("bench", report, save=save)
    click.echo(line if as_json else "\n".join(lines_of(report)))


def _open(values: dict[str, Any], longest: int, screen: Screen, times: dict[str, float]) -> Model:
    """The model that the options name; how long starting and loading took goes into `times`."""
    from moss_jt import launch
    from moss_jt.bench import parse_synthetic, require_cpu, synthetic_model
    from moss_jt.hub import resolve_model
    from moss_jt.load import load_model

    name, synthetic, layers = values.pop("model"), values.pop("synthetic"), values.pop("layers")
    options = load_options({**values, "context": longest})
    require_cpu(options["device"], vram=options.pop("vram"), host_share=options.pop("host_share"))
    options["device"] = "cpu"
    progress = screen.progress()
    config = None if synthetic is None else parse_synthetic(synthetic, layers=layers)
    folder = None if name is None else resolve_model(name, progress=progress)
    began = time.perf_counter()
    launch.warm_up(progress)
    times["start_s"] = round(time.perf_counter() - began, 2)
    began = time.perf_counter()
    if config is not None:
        if options.pop("adapter") is not None:
            raise click.UsageError(pick("--adapter is for --model.", "--adapter 需与 --model 同用。"))
        model = synthetic_model(config, **options, progress=progress)
    else:
        assert folder is not None, "one of the two was given"
        model = load_model(folder, **options, progress=progress)
    times["load_s"] = round(time.perf_counter() - began, 2)
    return model


def lines_of(report: dict[str, Any]) -> list[str]:
    """A report for people."""
    model, peak = report["model"], report["peak_memory_bytes"] / 2**30
    weights = model["weight_bytes"] / 1e9
    lines = [
        pick(
            f"{model['name']}, {model['layers']} layers, {model['compute']}: {weights:.2f} GB of weights a token; "
            f"loaded in {report['load_s']:.1f} s; peak memory {peak:.2f} GiB",
            f"{model['name']}，{model['layers']} 层，{model['compute']}：每个词元 {weights:.2f} GB 权重；"
            f"加载用时 {report['load_s']:.1f} 秒；内存峰值 {peak:.2f} GiB",
        )
    ]
    for run in report["prefill"]:
        limit = run["limit"]
        lines.append(
            pick(
                f"prefill of {run['tokens']}: {_spread(run['tokens_per_s'])} tokens/s, first token after "
                f"{run['first_token_s']['median']:.2f} s; {_percent(run['of_limit'])} of "
                f"{limit['gop_per_s']['median']:.0f} GOP/s ({limit['how']})",
                f"预填充 {run['tokens']}：{_spread(run['tokens_per_s'])} 词元/秒，首个词元用时 "
                f"{run['first_token_s']['median']:.2f} 秒；达到 {limit['gop_per_s']['median']:.0f} GOP/s"
                f"（{limit['how']}）的 {_percent(run['of_limit'])}",
            )
        )
    for run in report["decode"]:
        lines.append(_decode_line(run))
    return lines


def _decode_line(run: dict[str, Any]) -> str:
    memory = run["limit"]["gb_per_s"]["median"]
    line = pick(
        f"answering at {run['context']} tokens, {run['batch']} at once: {_spread(run['tokens_per_s'])} tokens/s, "
        f"{run['gb_per_s']['median']:.1f} GB/s; {_percent(run['of_limit'])} of memory's {memory:.1f} GB/s",
        f"缓存 {run['context']} 个词元、{run['batch']} 个对话时的解码：{_spread(run['tokens_per_s'])} 词元/秒，"
        f"{run['gb_per_s']['median']:.1f} GB/s；达到内存带宽 {memory:.1f} GB/s 的 {_percent(run['of_limit'])}",
    )
    if "disk_limit" not in run:
        return line
    disk = run["disk_limit"]["gb_per_s"]["median"]
    return line + pick(
        f", {_percent(run['of_disk_limit'])} of the disk's {disk:.2f} GB/s",
        f"，达到磁盘速度 {disk:.2f} GB/s 的 {_percent(run['of_disk_limit'])}",
    )


def _spread(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f}-{found['max']:.2f})"


def _percent(found: dict[str, float]) -> str:
    return f"{100 * found['median']:.0f}% ({100 * found['min']:.0f}-{100 * found['max']:.0f})"
