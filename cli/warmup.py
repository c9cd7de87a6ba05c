"""`moss-jt warmup`: the one-time compilation, ahead of time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from moss_jt.language import pick

if TYPE_CHECKING:
    from moss_jt.startup.plan import Device


@click.command(
    help=pick(
        "Do the one-time compilation of Jittor and of our kernels now, rather than at the first chat.\n\n"
        "Needs no network. May be stopped and started again: it goes on where it stopped.\n\n"
        "Example: moss-jt warmup",
        "提前完成 Jittor 和内核的一次性编译，而不是等到第一次对话时。\n\n"
        "不需要网络；可以中断，再次运行会接着编译。\n\n"
        "例如：moss-jt warmup",
    )
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help=pick("For which device.", "为哪种设备编译。"),
)
def command(*, device: Device) -> None:
    """Start Jittor for a device and compile what the model will use."""
    from moss_jt import startup
    from moss_jt.cli.progress import TerminalProgress

    began = time.monotonic()
    progress = TerminalProgress()
    startup.import_jittor(device=device, progress=progress)
    if device == "cpu":
        from moss_jt import launch

        launch.warm_up(progress)
    seconds = time.monotonic() - began
    click.echo(pick(f"Ready on {device} ({seconds:.1f} s).", f"{device} 已就绪（{seconds:.1f} 秒）。"))
