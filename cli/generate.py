"""`moss-jt generate`: one prompt in, its continuation out, for scripts."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO

import click

from moss_jt.cli.options import generation_config, load_options, model_options, sampling_options
from moss_jt.language import pick

if TYPE_CHECKING:
    from moss_jt.cli.chat_screen import Screen
    from moss_jt.config import GenerationConfig
    from moss_jt.messages import FinishedEvent
    from moss_jt.runner import Model


@click.command(
    help=pick(
        "Continue one prompt, as it is: no system prompt, no tags.\n\n"
        "The text streams to stdout, or one JSON object at the end with --json. It stops at the end markers that "
        "the model's files name.\n\n"
        "\b\nExample: moss-jt generate --model DIR --markers --prompt $'<|Human|>: Hello<eoh>\\n<|MOSS|>:'\n\n"
        "Example: moss-jt generate --model DIR --ids 1,2,3 --greedy --json",
        "按原样续写一段提示词：不加系统提示和标签。\n\n"
        "文本流式输出到 stdout；用 --json 则在结束时输出一个 JSON 对象。遇到模型文件中指定的结束标记即停止。\n\n"
        "\b\n例如：moss-jt generate --model DIR --markers --prompt $'<|Human|>: 你好<eoh>\\n<|MOSS|>:'\n\n"
        "例如：moss-jt generate --model DIR --ids 1,2,3 --greedy --json",
    )
)
@model_options(embedded=True)
@click.option(
    "--prompt", metavar="TEXT", help=pick("The prompt; - reads it from stdin.", "提示词；- 表示从 stdin 读取。")
)
@click.option("--ids", metavar="1,2,3", help=pick("The prompt as token ids.", "以词元编号给出的提示。"))
@click.option(
    "--markers",
    is_flag=True,
    help=pick(
        "Read <eoh>, <eom> and their like in the prompt as control tokens.",
        "把提示词中的 <eoh>、<eom> 等读作控制词元。",
    ),
)
@click.option(
    "--stop",
    metavar="TEXT",
    multiple=True,
    help=pick("End after this text too; may be repeated.", "生成此文本后也停止；可重复使用。"),
)
@sampling_options
@click.option("--json", "as_json", is_flag=True, help=pick("Print one JSON object.", "输出一个 JSON 对象。"))
def command(
    *,
    model: str | None,
    prompt: str | None,
    ids: str | None,
    markers: bool,
    stop: tuple[str, ...],
    as_json: bool,
    **others: Any,
) -> None:
    """Continue one prompt."""
    if (prompt is None) == (ids is None):
        raise click.UsageError(pick("give either --prompt or --ids.", "请给出 --prompt 或 --ids 之一。"))
    given = None if ids is None else parse_ids(ids)
    choice, options = generation_config(others), load_options(others)
    text = sys.stdin.read() if prompt == "-" else prompt

    from moss_jt.cli.chat_screen import Screen
    from moss_jt.cli.loading import open_model

    screen = Screen(interactive=False)
    began = time.monotonic()
    loaded = open_model(model, options, screen)
    load_s = time.monotonic() - began
    tokens = given if given is not None else loaded.tokenizer.encode(text or "", allow_special=markers)
    config = replace(choice(loaded.config), stop_ids=_stop_ids(loaded), stop_strings=stop)
    reader = _Reader(loaded, config, sys.stdout if not as_json else None)
    try:
        finished = _run(loaded, tokens, config, reader, screen)
    finally:
        reader.end()
    if as_json:
        click.echo(json.dumps(_report(reader, finished, load_s), ensure_ascii=False))


def parse_ids(text: str) -> list[int]:
    """Read "1,2,3".

    Raises:
        click.UsageError: a part is not a whole number from 0.
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit())]
    if wrong:
        raise click.UsageError(
            pick(
                f"--ids takes whole numbers with commas between, not {wrong[0]!r}.",
                f"--ids 需要用逗号分隔的整数，而不是 {wrong[0]!r}。",
            )
        )
    return [int(part) for part in parts]


def _stop_ids(model: Model) -> tuple[int, ...]:
    """The end markers that the model's files name."""
    if not model.has_tokenizer:
        return () if model.config.eos_token_id is None else (model.config.eos_token_id,)
    tokenizer = model.tokenizer
    named = (tokenizer.eos_id, tokenizer.markers.get("<eom>"))
    return tuple(dict.fromkeys(i for i in named if i is not None))


class _Reader:
    """Collects what is generated, and writes its text to a stream as it comes."""

    def __init__(self, model: Model, config: GenerationConfig, stream: TextIO | None) -> None:
        self.ids: list[int] = []
        self.text: str | None = "" if model.has_tokenizer else None
        self._stop_ids = config.stop_ids
        self._decoder = model.tokenizer.stream() if model.has_tokenizer else None
        self._stream = stream

    def push(self, token: int) -> None:
        """Take the next id."""
        self.ids.append(token)
        if self._decoder is None:
            self._write(f"{token} " if self._stream else "")
        elif token not in self._stop_ids:
            self._add(self._decoder.push(token))

    def end(self) -> None:
        """Write what was held back, and end the line."""
        if self._decoder is not None:
            self._add(self._decoder.flush())
        if self.ids:
            self._write("\n")

    def _add(self, text: str) -> None:
        self.text = (self.text or "") + text
        self._write(text)

    def _write(self, text: str) -> None:
        from moss_jt.cli.chat_screen import harmless

        if self._stream is not None and text:
            self._stream.write(harmless(text) if self._stream.isatty() else text)
            self._stream.flush()


def _run(model: Model, ids: list[int], config: GenerationConfig, reader: _Reader, screen: Screen) -> FinishedEvent:
    """Drive an engine through one request."""
    from moss_jt.engine import Engine
    from moss_jt.messages import FinishedEvent, PrefillEvent, Request, TokenEvent

    engine = Engine(model)
    engine.submit(Request(tuple(ids), config))
    with screen.waiting() as waiting:
        waiting.update(0, len(ids), 0)
        while True:
            for event in engine.step():
                if isinstance(event, PrefillEvent):
                    waiting.update(event.done, event.total, event.reused)
                elif isinstance(event, TokenEvent):
                    waiting.over()
                    reader.push(event.id)
                elif isinstance(event, FinishedEvent):
                    return event


def _report(reader: _Reader, finished: FinishedEvent, load_s: float) -> dict[str, Any]:
    """What --json prints."""
    rate = (finished.new_tokens - 1) / finished.decode_s if finished.new_tokens > 1 and finished.decode_s > 0 else 0.0
    return {
        "ids": reader.ids,
        "text": reader.text,
        "reason": finished.reason,
        "prompt_tokens": finished.prompt_tokens,
        "new_tokens": finished.new_tokens,
        "tokens_per_s": round(rate, 3),
        "seconds": {
            "load": round(load_s, 3),
            "prefill": round(finished.prefill_s, 3),
            "decode": round(finished.decode_s, 3),
        },
    }
