"""The report of `moss-jt fit --vram`: what lies where, and what a token moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moss_jt.language import pick

if TYPE_CHECKING:
    from moss_jt.fit_device import DeviceFit

GIB, MIB = 1 << 30, 1 << 20


def screen(found: DeviceFit, name: str | None) -> list[list[list[str]] | str]:
    """Lines, and tables of cells; `name` is that of the device, where it is here."""
    device, steps = found.plans.device, found.steps
    kind = f"int{found.config.quantization.bits}" if found.config.quantization else found.config.dtype or "float16"
    parts = [
        [pick("part", "部分"), pick("on the device", "显存")],
        [pick("weights", "权重"), _size(device.resident_bytes)],
        [pick("KV cache, when full", "键值缓存（满时）"), _size(device.kv_bytes(device.context))],
        [pick("ring for streamed weights", "流式缓冲环"), _size(device.ring_bytes)],
        [pick("activations", "激活值"), _size(device.buffer_bytes)],
        [pick("driver and reserve", "驱动与预留"), _size(device.needs.base + device.needs.margin)],
    ]
    speed = [
        [
            pick("tokens so far", "已有词元"),
            pick("on the device", "显存中权重"),
            pick("copied a token", "每词元复制"),
            pick("of it from disk", "其中来自磁盘"),
            pick("tokens/s at most", "词元/秒上限"),
        ]
    ]
    for step in steps:
        most = "?" if step.most_tokens_per_s is None else f"{step.most_tokens_per_s:.2f}"
        speed.append(
            [str(step.position), _size(step.device_bytes), _size(step.link_bytes), _size(step.disk_bytes), most]
        )
    return [
        pick(
            f"{found.name}: {kind}, {found.config.n_layer} layers of width {found.config.n_embd}",
            f"{found.name}：{kind}，{found.config.n_layer} 层，宽度 {found.config.n_embd}",
        ),
        pick(
            f"{_size(found.vram)} of device memory, up to {device.context} tokens; "
            f"{_size(found.host_bytes)} of weights in main memory",
            f"显存 {_size(found.vram)}，最多 {device.context} 个词元；内存中权重 {_size(found.host_bytes)}",
        ),
        "",
        parts,
        "",
        speed,
        "",
        _measured(found, name),
        *_shared(found),
    ]


def _measured(found: DeviceFit, name: str | None) -> str:
    if found.rates is None:
        return pick(
            "No CUDA device is here, so its memory and link are not measured.",
            "本机没有可用的 CUDA 设备，未测量其显存与总线速度。",
        )
    memory, link = found.rates.memory / 1e9, found.rates.link / 1e9
    return pick(
        f"Measured on {name}: memory {memory:.0f} GB/s, link {link:.1f} GB/s; speed stays below.",
        f"在 {name} 上测得：显存 {memory:.0f} GB/s，总线 {link:.1f} GB/s；实际速度低于此上限。",
    )


def _shared(found: DeviceFit) -> list[str]:
    """What the processor could have a share of; nothing where nothing is copied or the device is not here."""
    if found.rates is None or found.host_share is None:
        return []
    sharing = found.rates.sharing
    assert sharing is not None, "a share is chosen by it"
    beside, link = sharing.host_beside / 1e9, sharing.link_beside / 1e9
    measured = pick(
        f"The processor multiplies {beside:.1f} GB/s beside a link of {link:.1f} GB/s.",
        f"处理器与总线同时工作时：处理器 {beside:.1f} GB/s，总线 {link:.1f} GB/s。",
    )
    if not found.host_share:
        return [measured, pick("--host-share does not pay here.", "此处使用 --host-share 没有好处。")]
    rates = [f"{step.most_shared_tokens_per_s:.2f}" for step in found.steps if step.most_shared_tokens_per_s]
    told = ", ".join(rates)
    return [
        measured,
        pick(
            f"--host-share auto: {found.host_share:.2f}; then at most {told} tokens/s.",
            f"--host-share auto：{found.host_share:.2f}；此时上限为 {told} 词元/秒。",
        ),
    ]


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / MIB:.1f} MiB" if nbytes else "-"
