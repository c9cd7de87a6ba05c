"""`moss-jt pull`: fetch a model from a hub and convert it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from moss_jt.cli.asking import confirm
from moss_jt.language import pick

if TYPE_CHECKING:
    from pathlib import Path

    from moss_jt.config import FloatType
    from moss_jt.pull_plan import PullPlan

DTYPES: dict[str, FloatType] = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@click.command(
    "pull",
    help=pick(
        "Fetch a model from a hub and convert it to the native format.\n\n"
        "NAME is OWNER/NAME as on the hub. What has arrived is kept when the command is stopped: run it again to "
        "go on. A mirror is named by HF_ENDPOINT=https://MIRROR, an access token by HF_TOKEN.\n\n"
        "Example: moss-jt pull fnlp/moss-moon-003-sft-int4",
        "从模型库下载模型并转换为本程序的格式。\n\nNAME 即模型库中的 OWNER/NAME。中断后再次运行即可续传。"
        "镜像用 HF_ENDPOINT=https://MIRROR 指定，访问令牌用 HF_TOKEN 指定。\n\n例如：moss-jt pull fnlp/moss-moon-003-sft-int4",
    ),
)
@click.argument("name")
@click.option("--revision", help=pick("Branch, tag or commit; else the main branch.", "分支、标签或提交；默认主分支。"))
@click.option(
    "--delete-source/--keep-source",
    default=None,  # as an unfinished pull was begun
    help=pick(
        "Convert each weight file when it has arrived and delete it, or keep the original files (the default).",
        "每个权重文件下载后立即转换并删除，或保留原始文件（默认）。",
    ),
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    help=pick("Type of the floating-point weights; else the source's.", "浮点权重的类型；默认与源文件相同。"),
)
@click.option(
    "--yes", is_flag=True, help=pick("Accept the licence without being asked.", "不再询问，直接接受许可协议。")
)
@click.option("--json", "as_json", is_flag=True, help=pick("Print the result as JSON.", "以 JSON 输出结果。"))
def command(
    *, name: str, revision: str | None, delete_source: bool | None, dtype: str | None, yes: bool, as_json: bool
) -> None:
    """Fetch a model."""
    from moss_jt.cli.progress import TerminalProgress
    from moss_jt.errors import HubError
    from moss_jt.hub import find_pulled, pull
    from moss_jt.pull_plan import check_room, plan_pull, stored_name

    full = stored_name(name, revision)
    path = find_pulled(name, revision)
    fetched = path is None
    if path is None:
        plan = plan_pull(name, revision=revision, dtype=_float_type(dtype), delete_source=delete_source)
        click.echo(_describe(plan), err=True)
        check_room(plan)
        if not (yes or plan.accepted or confirm(pick("Accept the licence and fetch it?", "接受许可并下载？"))):
            raise HubError(f"the licence of {full} was not accepted; nothing was fetched.")
        path = pull(plan, progress=TerminalProgress())
    elif dtype is not None:
        _check_dtype(full, path, _float_type(dtype))
    if as_json:
        click.echo(json.dumps({"name": full, "path": str(path), "fetched": fetched}))
    else:
        here = pick("is ready", "已就绪") if fetched else pick("is stored already", "此前已下载")
        click.echo(f"{full} {here}: moss-jt chat --model {full}", err=True)
        click.echo(path)


def _float_type(dtype: str | None) -> FloatType | None:
    """The library's word for a type of floats."""
    return DTYPES[dtype] if dtype is not None else None


def _check_dtype(full: str, path: Path, dtype: FloatType | None) -> None:
    """See that a stored model has floats of the type that is asked for."""
    from moss_jt.config import MossConfig
    from moss_jt.errors import HubError

    stored = MossConfig.from_file(path / "config.json").dtype
    if dtype != stored:
        raise HubError(
            f"{full} is stored already, with weights in {stored}. Leave --dtype away to use it, or remove it first: "
            f"moss-jt models rm {full}"
        )


def _describe(plan: PullPlan) -> str:
    """What the user should know before anything is fetched."""
    from moss_jt.pull_plan import gigabytes

    here = plan.total_bytes - plan.download_bytes
    resumed = pick(f" ({gigabytes(here)} are here already)", f"（其中 {gigabytes(here)} 已下载）") if here else ""
    theirs = plan.license or pick("not named", "未注明")
    return "\n".join(
        (
            pick(
                f"Model:    {plan.repo}, version {plan.commit[:12]}", f"模型：    {plan.repo}，版本 {plan.commit[:12]}"
            ),
            pick(
                f"Download: {gigabytes(plan.total_bytes)} in {len(plan.small) + len(plan.weights)} files{resumed}",
                f"下载：    {gigabytes(plan.total_bytes)}，共 {len(plan.small) + len(plan.weights)} 个文件{resumed}",
            ),
            pick(
                f"Disk:     {gigabytes(plan.needed_bytes)} needed at most, {gigabytes(plan.free_bytes)} free, in {plan.path.parent}",
                f"磁盘：    最多需要 {gigabytes(plan.needed_bytes)}，可用 {gigabytes(plan.free_bytes)}，位于 {plan.path.parent}",
            ),
            pick(f"Licence:  the hub says: {theirs}", f"许可：    模型库标注：{theirs}"),
            pick(
                "          MOSS's weights are under AGPL-3.0; the data they were tuned on is under CC BY-NC 4.0.",
                "          MOSS 的权重采用 AGPL-3.0 许可；其微调数据采用 CC BY-NC 4.0 许可。",
            ),
            pick(
                "Limits:   answers may be wrong, biased or harmful, and need checking; a conversation holds at most "
                f"{plan.config.n_positions} tokens.",
                f"局限：    回答可能有误、带有偏见或有害，请自行核实；一次对话最多 {plan.config.n_positions} 个词元。",
            ),
        )
    )
