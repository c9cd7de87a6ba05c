"""`moss-jt doctor`: one screen about this machine."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from moss_jt.language import pick

if TYPE_CHECKING:
    from moss_jt.doctor import Finding

_MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red")}


@click.command(
    help=pick(
        "Tell what this machine has, what works, and the one command that mends each problem.\n\n"
        "Nothing is compiled, unless --deep is given. Exit code 1 where moss-jt cannot start.\n\n"
        "Example: moss-jt doctor --json",
        "检查本机环境：有什么、能否使用，以及修复每个问题的命令。\n\n"
        "除非使用 --deep，否则不编译任何东西。若 moss-jt 无法启动，退出码为 1。\n\n"
        "例如：moss-jt doctor --json",
    )
)
@click.option("--json", "as_json", is_flag=True, help=pick("Print one JSON object.", "输出一个 JSON 对象。"))
@click.option(
    "--deep",
    is_flag=True,
    help=pick(
        "Also start Jittor (compiling it if need be) and compute with it.", "同时启动 Jittor（必要时编译）并验证计算。"
    ),
)
def command(*, as_json: bool, deep: bool) -> int:
    """Examine this machine and print the findings."""
    from moss_jt.cli.progress import TerminalProgress
    from moss_jt.doctor import examine, is_healthy

    findings = examine(deep=deep, progress=TerminalProgress())
    healthy = is_healthy(findings)
    if as_json:
        report = {"healthy": healthy, "findings": [finding.to_dict() for finding in findings]}
        click.echo(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        for finding in findings:
            _show(finding)
        click.echo(_summary(findings))
    return 0 if healthy else 1


def _show(finding: Finding) -> None:
    from moss_jt.cli.chat_screen import has_colours

    mark, colour = _MARKS[finding.state]
    line = f"{mark} {finding.title}: {finding.value}"
    if has_colours(sys.stdout):
        line = f"{click.style(mark, fg=colour)} {click.style(finding.title, bold=True)}: {finding.value}"
    click.echo(line)
    if finding.fix:
        click.echo(f"    → {finding.fix}")


def _summary(findings: list[Finding]) -> str:
    broken = sum(finding.state == "fail" for finding in findings)
    weak = sum(finding.state == "warn" for finding in findings)
    if broken:
        return pick(f"{broken} to mend before moss-jt can start.", f"moss-jt 启动前有 {broken} 项需要修复。")
    if weak:
        return pick(f"Ready; {weak} could be better.", f"可以使用；有 {weak} 项可以改进。")
    return pick("All is well.", "一切正常。")
