"""Opening a model for a command: which one, with progress, and the line that says what is loaded."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moss_jt import paths
from moss_jt.cli.chat_screen import Screen
from moss_jt.language import pick
from moss_jt.memory import require_room_to_start

if TYPE_CHECKING:
    from moss_jt.runner import Model


def open_model(name: str | None, options: Mapping[str, Any], screen: Screen, *, folder: Path | None = None) -> Model:
    """Load a model by folder or name, the one that comes with the package if None, and say what was loaded.

    Args:
        options: for `load_model`, from `moss_jt.cli.options.load_options`.
        folder: what `find_model` gave, where it was asked already.

    Raises:
        MossError: there is no such model, or it cannot be loaded.
    """
    require_room_to_start()
    from moss_jt.load import load_model

    progress = screen.progress()
    folder = find_model(name, screen) if folder is None else folder
    began = time.monotonic()
    progress.begin(pick("Starting", "正在启动"), 0, "s")  # around what has progress of its own, and what has none
    try:
        model = load_model(folder, **options, progress=progress)
    finally:
        progress.end()
    screen.note(_what_is_loaded(model, name or paths.EMBEDDED_MODEL, time.monotonic() - began))
    licence = _licence(model.path)
    if licence:
        screen.note(pick(f"Licence of the weights: {licence}.", f"权重许可：{licence}。"))
    return model


def find_model(name: str | None, screen: Screen) -> Path:
    """The folder of a model by folder or name, that of the model that comes along if None.

    Raises:
        MossError: there is no such model.
    """
    from moss_jt.hub import resolve_model

    return _embedded_model(screen) if name is None else resolve_model(name, progress=screen.progress())


def _embedded_model(screen: Screen) -> Path:
    """The folder of the small model that comes with the package, and a word on what it is."""
    screen.note(
        pick(
            "No --model was given: this is moss-tiny, a model of a few million parameters that comes with moss-jt. "
            "It knows moss-jt and little else. The real MOSS: moss-jt pull fnlp/moss-moon-003-sft-int4",
            "未指定 --model：当前是随 moss-jt 附带的 moss-tiny，只有几百万参数，只了解 moss-jt。"
            "获取真正的 MOSS：moss-jt pull fnlp/moss-moon-003-sft-int4",
        )
    )
    return paths.embedded_model()


def _what_is_loaded(model: Model, name: str, seconds: float) -> str:
    """One line: the name, the kind of weights, the size, where it computes, how long loading took."""
    config = model.config
    kind = f"int{config.quantization.bits}" if config.quantization else (config.dtype or "float")
    size = f"{config.n_layer} x {config.n_embd}"
    rest = _what_is_moved(model)
    return pick(
        f"{name}: {kind}, {size}, up to {model.max_tokens} tokens, on {model.device}; loaded in {seconds:.1f} s{rest}.",
        f"{name}：{kind}，{size}，最多 {model.max_tokens} 个词元，运行于 {model.device}；加载用时 {seconds:.1f} 秒{rest}。",
    )


def _what_is_moved(model: Model) -> str:
    """How much of the weights is copied to the device and read from disk for each token, where any is."""
    told = ""
    copied = 0.0 if model.placed is None else model.placed.space.weights.streamed_bytes / 1e9
    if copied:
        told += pick(
            f"; {copied:.1f} GB of weights are copied to the device for each token",
            f"；每个词元需向显卡复制 {copied:.1f} GB 权重",
        )
    streamed = model.store.streamed_bytes / 1e9
    if streamed:
        told += pick(
            f"; {streamed:.1f} GB of weights are read from disk for each token",
            f"；每个词元需从磁盘读取 {streamed:.1f} GB 权重",
        )
    return told


def _licence(folder: Path) -> str | None:
    """What the record of where a model came from says, if there is one."""
    try:
        origin = json.loads((folder / "origin.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    licence = origin.get("license") if isinstance(origin, dict) else None
    return licence if isinstance(licence, str) and licence else None
