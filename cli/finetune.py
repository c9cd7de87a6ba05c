"""`moss-jt finetune`: train a model on conversations or texts."""

from __future__ import annotations

import atexit
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moss_jt.cli.convert.hf2jittor import DTYPES
from moss_jt.language import pick

if TYPE_CHECKING:
    from moss_jt.adapter import AdapterShape
    from moss_jt.finetune.run import Request, Trained

FOLDER = click.Path(path_type=Path)
DATA = ("max_length", "original", "quality")
TRAIN = (
    *("epochs", "batch_size", "accumulation", "learning_rate", "warmup", "weight_decay", "clip", "seed", "max_steps"),
    *("eval_step", "save_step", "keep", "pass_tokens", "recompute", "unfreeze_every"),
)


@click.command(
    "finetune",
    help=pick(
        "Train a model on the conversations (train.jsonl, val.jsonl) or texts in --data_dir.\n\n"
        "The trained model comes to OUTPUT/model, checkpoints and logs beside it. The option names of the original's "
        "finetune_moss.py work. See docs/finetuning.md.\n\n"
        "Example: moss-jt finetune --model_name_or_path base --data_dir sft --output_dir out --n_epochs 2",
        "用 --data_dir 中的对话（train.jsonl、val.jsonl）或文本训练模型。\n\n"
        "训练好的模型写入 OUTPUT/model，检查点与日志在其旁边。原版 finetune_moss.py 的选项名均可使用。"
        "详见 docs/finetuning.md。\n\n"
        "例如：moss-jt finetune --model_name_or_path base --data_dir sft --output_dir out --n_epochs 2",
    ),
)
@click.option(
    "--model_name_or_path",
    "--model",
    "model",
    metavar=pick("DIR|NAME", "目录|名称"),
    help=pick("Model to start from: a folder, or the name of a stored one.", "起始模型：目录或已保存模型的名称。"),
)
@click.option(
    "--init",
    type=FOLDER,
    metavar="CONFIG",
    help=pick("Start a new model of random weights; its config.json.", "从随机权重的新模型开始；给出其 config.json。"),
)
@click.option(
    "--tokenizer",
    type=FOLDER,
    metavar="DIR",
    help=pick("Its folder. [default: the model's]", "分词器目录。[默认：模型的]"),
)
@click.option("--data_dir", type=FOLDER, required=True, metavar="DIR", help=pick("Folder of the data.", "数据目录。"))
@click.option(
    "--output_dir", type=FOLDER, required=True, metavar="DIR", help=pick("Folder for what is made.", "输出目录。")
)
@click.option(
    "--n_epochs", "epochs", type=int, help=pick("Times through the data. [default: 2]", "遍历数据的次数。[默认 2]")
)
@click.option(
    "--train_bsz_per_gpu",
    "--batch_size",
    "batch_size",
    type=int,
    help=pick("Conversations of a batch, on each process. [default: 4]", "每个进程每批的对话数。[默认 4]"),
)
@click.option("--eval_bsz_per_gpu", type=int, hidden=True)
@click.option(
    "--gradient_accumulation_steps",
    "accumulation",
    type=int,
    help=pick("Batches of a step. [default: 1]", "每步累积的批数。[默认 1]"),
)
@click.option("--learning_rate", type=float, help=pick("The highest. [default: 9e-6]", "最高学习率。[默认 9e-6]"))
@click.option(
    "--warmup_rates",
    "warmup",
    type=float,
    help=pick("Share of the steps in which the rate rises. [default: 0.05]", "学习率上升阶段所占比例。[默认 0.05]"),
)
@click.option("--weight_decay", type=float, help=pick("Of matrices. [default: 0.1]", "矩阵的权重衰减。[默认 0.1]"))
@click.option(
    "--clip",
    type=float,
    help=pick("Largest norm of the gradient; 0: none. [default: 1]", "梯度范数上限；0 为不限。[默认 1]"),
)
@click.option(
    "--max_seq_len",
    "--max_length",
    "max_length",
    type=int,
    help=pick("Tokens of a sample; whole turns only. [default: 2048]", "样本的最大词元数，按整轮截断。[默认 2048]"),
)
@click.option("--max_steps", type=int, help=pick("Stop after so many steps.", "最多训练的步数。"))
@click.option(
    "--eval_step", type=int, help=pick("Steps between validations. [default: 200]", "验证间隔步数。[默认 200]")
)
@click.option(
    "--save_step", type=int, help=pick("Steps between checkpoints. [default: 2000]", "检查点间隔步数。[默认 2000]")
)
@click.option("--keep", type=int, help=pick("Checkpoints that are kept. [default: 2]", "保留的检查点数。[默认 2]"))
@click.option("--seed", type=int, help=pick("Of the order of the data. [default: 42]", "数据顺序的随机种子。[默认 42]"))
@click.option(
    "--pass_tokens",
    type=int,
    help=pick(
        "Tokens computed at once: more are faster, and take memory. [default: 4096]",
        "一次计算的词元数：越多越快，也越占内存。[默认 4096]",
    ),
)
@click.option(
    "--recompute",
    is_flag=True,
    default=None,
    help=pick("Compute each block twice, to save memory.", "每个模块计算两次，以节省内存。"),
)
@click.option(
    "--unfreeze_every",
    type=int,
    help=pick("Train one more layer from the top every so many steps.", "每隔这么多步，自顶向下多训练一层。"),
)
@click.option(
    "--lora_rank",
    type=click.IntRange(min=1),
    help=pick(
        "Train an adapter of this rank over the frozen model, which may be int4 or int8; it comes to OUTPUT/adapter.",
        "在冻结的模型（可为 int4 或 int8）上训练此秩的适配器，写入 OUTPUT/adapter。",
    ),
)
@click.option(
    "--lora_alpha",
    type=float,
    help=pick("Its factor is alpha / rank. [default: 2 x rank]", "系数为 alpha / 秩。[默认：2 倍秩]"),
)
@click.option(
    "--lora_targets",
    metavar="NAMES",
    help=pick("Of qkv_proj,out_proj,fc_in,fc_out. [default: all]", "可选 qkv_proj,out_proj,fc_in,fc_out。[默认：全部]"),
)
@click.option(
    "--memory",
    metavar="SIZE",
    help=pick(
        "With --lora_rank, all memory that may be taken, like 12GiB; weights that do not fit are read from disk.",
        "与 --lora_rank 同用：可用内存总量，如 12GiB；放不下的权重从磁盘读取。",
    ),
)
@click.option(
    "--device",
    metavar="auto|cpu|cuda|cuda:N",
    help=pick(
        "With --lora_rank, what multiplies by the frozen weights. [default: cpu]",
        "与 --lora_rank 同用：由谁计算冻结权重的乘法。[默认 cpu]",
    ),
)
@click.option(
    "--vram",
    metavar="SIZE",
    help=pick(
        "With --device, all memory that may be taken there, like 6GiB.",
        "与 --device 同用：设备上可用显存总量，如 6GiB。",
    ),
)
@click.option(
    "--new_tokens",
    type=FOLDER,
    metavar="FILE",
    help=pick("Add the tokens in FILE, one a line.", "添加 FILE 中的词元，每行一个。"),
)
@click.option(
    "--original",
    is_flag=True,
    default=None,
    help=pick(
        "Do as finetune_moss.py does: learn the human turns too, decay the norms.",
        "与 finetune_moss.py 一致：也学习用户发言，并对归一化权重衰减。",
    ),
)
@click.option(
    "--quality",
    is_flag=True,
    default=None,
    help=pick("Learn how good answers are, from the data's scores.", "根据数据中的评分学习回答的好坏。"),
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="fp16",
    show_default=True,
    help=pick("Of the trained model's weights.", "训练后模型的权重类型。"),
)
@click.option("--resume", is_flag=True, help=pick("Go on from the newest checkpoint.", "从最新的检查点继续。"))
@click.option(
    "--log_dir",
    type=FOLDER,
    metavar="DIR",
    help=pick("Folder of the logs. [default: OUTPUT/log]", "日志目录。[默认：OUTPUT/log]"),
)
@click.option(
    "--tensorboard/--no-tensorboard",
    default=None,
    help=pick("Event files. [default: where tensorboardX is installed]", "事件文件。[默认：装有 tensorboardX 时]"),
)
@click.option("--json", "as_json", is_flag=True, help=pick("Print the result as JSON.", "以 JSON 输出结果。"))
def command(*, as_json: bool, **values: Any) -> None:
    """Train a model."""
    from moss_jt.cli.progress import TerminalProgress
    from moss_jt.finetune.checkpoint import checkpoints
    from moss_jt.finetune.run import finetune
    from moss_jt.finetune.team import find_team
    from moss_jt.progress import Quiet
    from moss_jt.startup.mpi import processes

    request = _request(values)
    try:
        team = find_team()
        if request.resume and not team.rank and not checkpoints(request.output_dir):
            click.echo(_nothing_to_resume(request.output_dir), err=True)
        done = finetune(request, team=team, progress=Quiet() if team.rank else TerminalProgress())
    except KeyboardInterrupt:
        click.echo(_stopped(checkpoints(request.output_dir)), err=True)
        _leave_the_others(processes())
        raise
    except Exception:
        _leave_the_others(processes())
        raise
    if team.rank:
        return
    if as_json:
        click.echo(json.dumps(_as_dict(done)))
        return
    for line in _notes(done):
        click.echo(line, err=True)
    click.echo(done.path)


def _leave_the_others(processes: int) -> None:
    """See that a process that fails ends: MPI's own end would wait for the others, which wait for this one."""
    if processes > 1:
        atexit.register(os._exit, 1)


def _request(values: dict[str, Any]) -> Request:
    from moss_jt.finetune.run import Request
    from moss_jt.finetune.settings import DataSettings, TrainSettings
    from moss_jt.hub import resolve_model
    from moss_jt.memory import parse_size

    given = {name: value for name, value in values.items() if value is not None}
    data = {name: given[name] for name in DATA if name in given}
    train = {name: given[name] for name in TRAIN if name in given}
    if given.get("original"):
        train["decay_norms"] = True
    memory, vram = given.get("memory"), given.get("vram")
    return Request(
        data_dir=given["data_dir"],
        output_dir=given["output_dir"],
        model=resolve_model(given["model"]) if "model" in given else None,
        init=given.get("init"),
        tokenizer=given.get("tokenizer"),
        new_tokens=given.get("new_tokens"),
        data=DataSettings(**data),
        train=TrainSettings(**train),
        adapter=_adapter(given),
        memory=parse_size(memory) if memory is not None else None,
        device=given.get("device", "cpu"),
        vram=parse_size(vram, "vram") if vram is not None else None,
        dtype=DTYPES[given["dtype"]],
        resume=given["resume"],
        log_dir=given.get("log_dir"),
        tensorboard=given.get("tensorboard"),
    )


def _adapter(given: dict[str, Any]) -> AdapterShape | None:
    from moss_jt.adapter import TARGETS, AdapterShape

    if "lora_rank" not in given:
        needless = [name for name in ("lora_alpha", "lora_targets", "memory", "device", "vram") if name in given]
        if needless:
            raise click.UsageError(
                pick(f"--{needless[0]} is for --lora_rank.", f"--{needless[0]} 需与 --lora_rank 同用。")
            )
        return None
    if given.get("unfreeze_every"):
        raise click.UsageError(
            pick(
                "--unfreeze_every trains the layers one after the other, and with --lora_rank there is nothing else to "
                "train. Give one of them.",
                "--unfreeze_every 逐层解冻，而 --lora_rank 只训练各层中的适配器。两者只能选其一。",
            )
        )
    rank = given["lora_rank"]
    targets = tuple(given["lora_targets"].split(",")) if "lora_targets" in given else TARGETS
    return AdapterShape(rank, given.get("lora_alpha", 2.0 * rank), targets)


def _stopped(kept: list[Path]) -> str:
    if not kept:
        return pick(
            "Stopped before the first checkpoint: the same command begins anew. --save_step says how often one is kept.",
            "已停止，尚无检查点：同一命令将从头开始。--save_step 可设定保存间隔。",
        )
    return pick(
        f"Stopped; the same command with --resume goes on from the last checkpoint, {kept[-1].name}.",
        f"已停止；加上 --resume 可从最近的检查点 {kept[-1].name} 继续。",
    )


def _nothing_to_resume(folder: Path) -> str:
    return pick(
        f"There is no checkpoint in {folder} yet: training begins at the first step.",
        f"{folder} 中尚无检查点：训练从第一步开始。",
    )


def _as_dict(done: Trained) -> dict[str, object]:
    return {
        "path": str(done.path),
        "steps": done.steps,
        "samples": done.samples,
        "dropped": done.dropped,
        **done.figures,
    }


def _notes(done: Trained) -> list[str]:
    """What the user should know, in lines."""
    lines = [pick(f"{done.samples} samples, {done.steps} steps", f"{done.samples} 个样本，{done.steps} 步")]
    if done.dropped:
        lines.append(
            pick(
                f"Left out: {done.dropped} records that do not fit or teach nothing",
                f"略去 {done.dropped} 条过长或无可学习内容的记录",
            )
        )
    lines += [f"{name}: {value:.4g}" for name, value in done.figures.items()]
    return lines
