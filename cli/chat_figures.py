"""The figures that /stats shows: the last answer, the context, the engine, the memory of this process."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moss_jt.language import pick

if TYPE_CHECKING:
    from moss_jt.chat import ReplyStats
    from moss_jt.predict import Predictor

Figures = Mapping[str, "float | int | str"]


def figures(stats: Figures, last: ReplyStats | None, predictor: Predictor | None = None) -> list[tuple[str, str]]:
    """Names and values, in the order in which a user asks for them; with a predictor, what was to be expected too."""
    return [*_last_answer(last, predictor), *_context(stats), *_memory(stats), *_weights(stats)]


def _last_answer(last: ReplyStats | None, predictor: Predictor | None) -> list[tuple[str, str]]:
    if last is None:
        return []
    first, rate = pick(f"after {last.prefill_s:.2f} s", f"{last.prefill_s:.2f} 秒后"), ""
    if predictor is not None:
        if last.prompt_tokens and not last.reused_tokens:
            first += _predicted(f"{predictor.prefill(last.prompt_tokens).seconds:.2f} s")
        middle = last.prompt_tokens + last.new_tokens // 2
        rate = _predicted(f"{predictor.decoding(middle).tokens_per_s:.1f}")
    return [
        (
            pick("last prompt", "上次提示"),
            pick(
                f"{last.prompt_tokens} tokens, {last.reused_tokens} of them known from before",
                f"{last.prompt_tokens} 个词元，其中 {last.reused_tokens} 个已在缓存中",
            ),
        ),
        (pick("first token", "首个词元"), first),
        (
            pick("last answer", "上次回答"),
            pick(
                f"{last.new_tokens} tokens, {last.tokens_per_s:.1f} tokens/s",
                f"{last.new_tokens} 个词元，{last.tokens_per_s:.1f} 词元/秒",
            )
            + rate,
        ),
        *_thinking(last),
    ]


def _thinking(last: ReplyStats) -> list[tuple[str, str]]:
    """What came before the answer, where tools are on."""
    if not last.thought_tokens:
        return []
    before = pick(
        f"{last.thought_tokens} tokens, tools {last.tools_s:.2f} s",
        f"{last.thought_tokens} 个词元，工具用时 {last.tools_s:.2f} 秒",
    )
    return [(pick("thoughts", "思考"), before)]


def _predicted(value: str) -> str:
    return pick(f" (predicted: {value})", f"（预测：{value}）")


def _context(stats: Figures) -> list[tuple[str, str]]:
    turns = pick(f"{stats['turns']}", f"{stats['turns']} 轮")
    if stats["dropped_turns"]:
        turns += pick(
            f", the oldest {stats['dropped_turns']} forgotten", f"，最早的 {stats['dropped_turns']} 轮已不再记住"
        )
    return [
        (pick("turns", "对话"), turns),
        (
            pick("context", "上下文"),
            pick(
                f"{stats['context_tokens']} of {stats['context_size']} tokens",
                f"{stats['context_tokens']} / {stats['context_size']} 个词元",
            ),
        ),
    ]


def _memory(stats: Figures) -> list[tuple[str, str]]:
    rows = []
    now, peak = resident_bytes()
    if peak:
        here = pick(f"{gigabytes(now)}, at most {gigabytes(peak)}", f"{gigabytes(now)}，峰值 {gigabytes(peak)}")
        rows.append((pick("memory", "内存"), here))
    if "cached_bytes" in stats:
        rows.append((pick("cache", "缓存"), gigabytes(int(stats["cached_bytes"]))))
    if "device" in stats:
        rows.append((pick("computes", "计算"), f"{stats['device']}, {stats.get('compute', '')}".rstrip(", ")))
    return rows


def _weights(stats: Figures) -> list[tuple[str, str]]:
    """Where the weights are now."""
    if "resident_bytes" not in stats:
        return []
    if "device_bytes" in stats:
        return _tiers(stats)
    here, streamed = gigabytes(int(stats["resident_bytes"])), int(stats["streamed_bytes"])
    if not streamed:
        return [(pick("weights", "权重"), pick(f"{here}, all in memory", f"{here}，全部在内存中"))]
    there = gigabytes(streamed)
    where = pick(f"{here} in memory, {there} read for each token", f"{here} 在内存中，每个词元从磁盘读取 {there}")
    return [(pick("weights", "权重"), where)]


def _tiers(stats: Figures) -> list[tuple[str, str]]:
    """Where the weights are, where a device has some of them."""
    there, moved = gigabytes(int(stats["device_bytes"])), int(stats["link_bytes_per_pass"])
    rows = [(pick("on the device", "显存"), pick(f"{there} of weights", f"{there} 权重"))]
    if moved:
        copied = gigabytes(moved)
        rows[0] = (rows[0][0], pick(f"{there} of weights, {copied} copied", f"{there} 权重，复制 {copied}"))
        rows.append((pick("on the host", "内存"), gigabytes(int(stats["resident_bytes"]))))
    if stats.get("host_share"):
        share = f"{100 * float(stats['host_share']):.0f} %"
        words = pick(
            f"multiplies {share} of the feed-forward weights that would be copied",
            f"计算本应复制的前馈层权重的 {share}",
        )
        rows.append((pick("processor", "处理器"), words))
    if stats["streamed_bytes"]:
        rows.append((pick("from disk", "磁盘"), gigabytes(int(stats["streamed_bytes"]))))
    return rows


def resident_bytes() -> tuple[int, int]:
    """Physical memory of this process, (now, peak); zeros where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text("ascii", "replace").splitlines() if ":" in line)
        now, peak = (int(lines.get(key, "0").split()[0]) << 10 for key in ("VmRSS", "VmHWM"))
        return now, peak
    if sys.platform == "win32":
        return 0, 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak, peak if sys.platform == "darwin" else peak << 10


def gigabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
