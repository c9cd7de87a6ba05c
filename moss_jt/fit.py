"""fit(): whether and how a model runs within a memory, before it is loaded or even fetched.

A config.json is enough: sizes follow from it, rates from the calibration of this machine. The same
plan is made that `load_model` makes, so what is told here is what happens there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moss_jt import paths
from moss_jt.calibrate import Calibration, Wanted, calibrate, disk_of, load_calibration
from moss_jt.checkpoint import HEAD, Checkpoint, expected_shapes, is_native
from moss_jt.config import Bits, MossConfig, Quantization
from moss_jt.errors import ConfigError
from moss_jt.kv_layout import KVType
from moss_jt.language import pick
from moss_jt.layout import ITEM_BYTES, Layout
from moss_jt.memory import GIB, MIB, automatic_memory, format_size
from moss_jt.plan import MatrixSize, Plan, make_plan, matrix_sizes, needs_of, resident_rows, smallest_memory
from moss_jt.predict import Decoding, Predictor, Prefill, Rates
from moss_jt.progress import Progress
from moss_jt.runner import DEFAULT_KV, Compute, Model, kv_type

BASE_BYTES = 200 * MIB  # of a process with Jittor, kernels and tokenizer, before any weight
SHARES = (0, 25, 50, 100)  # per cent of the context at which decoding is predicted
PROMPTS = (128, 512)
SHORT_CONTEXT = 512
GROUP = 128  # of formats that are proposed
_WORTH = 1.05  # a change is told if it makes decoding this much faster
_HELPS = 1.2  # more memory is proposed in steps that make it so much faster
_MOST_CHANGES = 6
_SLOW_TOKEN_S = 10.0
_MORE_GIB = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Part:
    """What something takes, in bytes.

    Attributes:
        key: "layers", "head", "embedding", "small", "kv", "ring", "buffers" or "process".
        total: of it; of the KV cache at full context.
        memory: of it in memory at the start; of the KV cache a block.
        disk: of it read from disk; of the embedding single rows only.
        stored: as what, for weights.
    """

    key: str
    total: int
    memory: int
    disk: int = 0
    stored: str = ""


@dataclass(frozen=True)
class Change:
    """Something that would make decoding faster.

    Attributes:
        key: "memory", "bits", "head", "kv" or "context".
        value: more bytes, bits, a type, or tokens.
        factor: how much faster, at half of the context.
        streams: whether weights are still read from disk then.
    """

    key: str
    value: int | str
    factor: float
    streams: bool


@dataclass(frozen=True)
class Fit:
    """How a model runs within a memory.

    Attributes:
        name: of the model.
        config: its shape.
        compute, kv: how it computes and caches.
        plan: what lies where.
        parts: what takes how much.
        decoding: predicted at SHARES of the context.
        prefill: predicted for PROMPTS, as far as the context takes them.
        changes: what would help, best first.
        warnings: a sentence each.
        smallest: bytes that the same context needs at least.
        calibration: what the rates come from, and whether all kernels were measured.
    """

    name: str
    config: MossConfig
    compute: Compute
    kv: KVType
    plan: Plan
    parts: tuple[Part, ...]
    decoding: tuple[Decoding, ...]
    prefill: tuple[Prefill, ...]
    changes: tuple[Change, ...]
    warnings: tuple[str, ...]
    smallest: int
    calibration: Calibration
    rates: Rates
    measured: bool

    def to_dict(self) -> dict[str, Any]:
        """For machines: bytes, seconds, tokens a second."""
        plan = self.plan
        return {
            "model": self.name,
            "compute": self.compute,
            "kv": self.kv,
            "memory": plan.memory,
            "smallest_memory": self.smallest,
            "context": plan.context,
            "capacity": plan.capacity,
            "ring": {"slots": plan.ring_slots, "slot_bytes": plan.slot_bytes},
            "parts": [asdict(part) for part in self.parts],
            "decode": [
                {**asdict(step), "bound": step.bound, "tokens_per_s": step.tokens_per_s} for step in self.decoding
            ],
            "prefill": [{**asdict(prompt), "tokens_per_s": prompt.tokens_per_s} for prompt in self.prefill],
            "changes": [asdict(change) for change in self.changes],
            "warnings": list(self.warnings),
            "rates": asdict(self.rates),
            "calibration": {"when": self.calibration.when, "kernels_measured": self.measured},
        }


@dataclass(frozen=True)
class _Case:
    """A model, a way of running it, and a budget: what a plan and a prediction follow from."""

    config: MossConfig
    layouts: Mapping[str, Layout] | None
    compute: Compute
    kv: KVType
    memory: int
    context: int | None
    base: int

    def sizes(self) -> list[MatrixSize]:
        return matrix_sizes(self.config, self.layouts)

    def plan(self, sizes: Sequence[MatrixSize]) -> Plan:
        needs = needs_of(self.config, sizes, base=self.base, kv=self.kv)
        return make_plan(sizes, needs, memory=self.memory, context=self.context)

    def wanted(self, sizes: Sequence[MatrixSize], folder: Path) -> Wanted:
        return Wanted(frozenset(size.stored for size in sizes), self.compute, self.kv, folder)


def fit(
    model: Path | MossConfig,
    *,
    memory: int | None = None,
    kv: str | None = None,
    compute: Compute = "fast",
    context: int | None = None,
    base: int = BASE_BYTES,
    recalibrate: bool = False,
    progress: Progress | None = None,
) -> Fit:
    """Plan and predict.

    Args:
        model: a folder with config.json, native or not, whole or not; or a shape.
        memory: bytes for the whole process; None for what is free, less a reserve.
        kv: type of the cache, a key of KV_TYPES; None for the usual one.
        compute: "fast" or "exact".
        context: tokens that the cache must hold; None for n_positions, or for what fits.
        base: bytes that the process takes before any weight.
        recalibrate: measure the machine anew.
        progress: told about measuring.

    Raises:
        ConfigError: the memory is too little, or a value cannot work.
        CheckpointError: the folder's files are broken.
        StartupError, KernelError, DiskError: the machine could not be measured.
    """
    config, layouts, folder, name = look_at(model)
    kind = DEFAULT_KV[compute] if kv is None else kv_type(kv)
    if context is not None:
        context = min(context, config.n_positions)
    free = base + automatic_memory()
    case = _Case(config, layouts, compute, kind, free if memory is None else memory, context, base)
    sizes = case.sizes()
    plan = case.plan(sizes)
    wanted = case.wanted(sizes, folder)
    proposed = {size.stored for _, _, variant in _variants(case) for size in variant.sizes()}
    found = calibrate(replace(wanted, stored=wanted.stored | proposed), again=recalibrate, progress=progress)
    rates = found.rates(wanted)
    predictor = Predictor(config, sizes, plan, rates)
    prompts = [count for count in PROMPTS if count <= plan.context] or [plan.context]
    decoding = tuple(predictor.decoding(_position(plan, share)) for share in SHARES)
    return Fit(
        name=name,
        config=config,
        compute=compute,
        kv=kind,
        plan=plan,
        parts=tuple(_parts(config, layouts, sizes, plan)),
        decoding=decoding,
        prefill=tuple(predictor.prefill(count) for count in prompts),
        changes=tuple(_changes(case, found, folder)),
        warnings=tuple(_warnings(case, plan, decoding, free, measured=found.is_measured(wanted))),
        smallest=smallest_memory(sizes, plan.needs, plan.context),
        calibration=found,
        rates=rates,
        measured=found.is_measured(wanted),
    )


def predictor_for(model: Model) -> Predictor | None:
    """Predictions for a loaded model, from what is kept of this machine; nothing is measured.

    None where the model has no budget, lies on a device, or the machine was not measured for it (`moss-jt fit` does that).
    """
    if model.budget is None or model.placed is not None:
        return None
    layouts = {size.name: model.store.layout(size.name) for size in matrix_sizes(model.config)}
    sizes = matrix_sizes(model.config, layouts)
    wanted = Wanted(frozenset(size.stored for size in sizes), model.compute, model.kv, model.path)
    found = load_calibration()
    if not found.is_measured(wanted) or disk_of(model.path) not in found.disks or found.memory is None:
        return None
    return Predictor(model.config, sizes, model.budget.plan, found.rates(wanted))


def look_at(model: Path | MossConfig) -> tuple[MossConfig, Mapping[str, Layout] | None, Path, str]:
    """The shape, the layouts where the weights are there, the folder whose disk counts, and a name."""
    if isinstance(model, MossConfig):
        return model, None, paths.models_dir(), model.name or "MOSS"
    config = MossConfig.from_file(model / "config.json")
    name = model.resolve().name
    if is_native(model) and any(model.glob("*.safetensors")):
        checkpoint = Checkpoint.open(model)
        return config, {name: entry.layout for name, entry in checkpoint.entries.items()}, model, name
    return config, None, model, name


def _position(plan: Plan, share: int) -> int:
    """Tokens before the one that is predicted, at so many per cent of the context."""
    return min(plan.context * share // 100, plan.context - 1)


def _parts(
    config: MossConfig, layouts: Mapping[str, Layout] | None, sizes: Sequence[MatrixSize], plan: Plan
) -> Iterator[Part]:
    """Where everything goes at the start."""
    rows = resident_rows(sizes, plan.resident_budget(1))
    for key, of_key in (
        ("layers", [s for s in sizes if s.name != HEAD]),
        ("head", [s for s in sizes if s.name == HEAD]),
    ):
        total = sum(size.nbytes for size in of_key)
        resident = sum(size.bytes_of(rows[size.name]) for size in of_key)
        yield Part(key, total, resident, total - resident, of_key[0].stored)
    table = _embedding(config, layouts)
    yield Part("embedding", table[0], 0, table[0], table[1])
    needs = plan.needs
    yield Part("small", needs.small, needs.small)
    yield Part("kv", plan.kv_bytes(plan.context), plan.kv_bytes(1))
    yield Part("ring", plan.ring_bytes, plan.ring_bytes)
    yield Part("buffers", plan.buffer_bytes, plan.buffer_bytes)
    yield Part("process", needs.base + needs.margin, needs.base + needs.margin)


def _embedding(config: MossConfig, layouts: Mapping[str, Layout] | None) -> tuple[int, str]:
    name, shape = next(iter(expected_shapes(config).items()))
    stored = getattr(layouts[name], "dtype", "float16") if layouts is not None else config.dtype or "float16"
    return shape[0] * shape[1] * ITEM_BYTES[stored], stored


def _rate_of(case: _Case, found: Calibration, folder: Path) -> tuple[float, bool] | None:
    """Tokens a second at half of the context, and whether anything is streamed then; None where it does not fit."""
    sizes = case.sizes()
    try:
        plan = case.plan(sizes)
    except ConfigError:
        return None
    step = Predictor(case.config, sizes, plan, found.rates(case.wanted(sizes, folder))).decoding(_position(plan, 50))
    return step.tokens_per_s, step.streamed_bytes > 0


def _changes(case: _Case, found: Calibration, folder: Path) -> list[Change]:
    """What would make decoding faster, best first; of memory the first step that helps and the one that is enough."""
    now = _rate_of(case, found, folder)
    assert now is not None, "the case itself has a plan"
    changes = []
    for key, value, variant in _variants(case):
        if key == "context" and not now[1]:
            continue  # nothing has to leave for the cache
        rate = _rate_of(variant, found, folder)
        if rate is not None and rate[0] >= _WORTH * now[0]:
            changes.append(Change(key, value, rate[0] / now[0], rate[1]))
    more = [change for change in changes if change.key == "memory"]
    helps = [change for change in more if change.factor >= _HELPS] or more
    enough = [change for change in more if not change.streams]
    kept = [change for change in changes if change.key != "memory"]
    kept += dict.fromkeys(helps[:1] + enough[:1])
    return sorted(kept, key=lambda change: -change.factor)[:_MOST_CHANGES]


def _variants(case: _Case) -> Iterator[tuple[str, int | str, _Case]]:
    """The same with one thing changed."""
    config = case.config
    for gib in _MORE_GIB:
        yield "memory", gib * GIB, replace(case, memory=case.memory + gib * GIB)
    bits = config.quantization.bits if config.quantization else 16
    fewer: tuple[Bits, ...] = (8, 4)
    for less in fewer:
        if less < bits:
            smaller = replace(config, quantization=Quantization(less, GROUP))
            yield "bits", less, replace(case, config=smaller, layouts=None)
    if config.head_quantization is None and config.quantization is not None:
        head = replace(config, head_quantization=Quantization(8, GROUP))
        yield "head", 8, replace(case, config=head, layouts=None)
    if case.kv != "int8":
        yield "kv", "int8", replace(case, kv="int8")
    if min(case.context or config.n_positions, config.n_positions) > 2 * SHORT_CONTEXT:
        yield "context", SHORT_CONTEXT, replace(case, context=SHORT_CONTEXT)


def _warnings(case: _Case, plan: Plan, decoding: Sequence[Decoding], free: int, *, measured: bool) -> Iterator[str]:
    """What somebody should know before the model is fetched or loaded."""
    whole = plan.needs.fixed + plan.total_bytes + plan.kv_bytes(plan.context)
    streams = decoding[-1].streamed_bytes > 0
    if case.memory > free:
        yield pick(
            f"{format_size(case.memory)} is more than the {format_size(free)} that this process may take now.",
            f"{format_size(case.memory)} 超过了本进程当前可用的 {format_size(free)}。",
        )
    if streams and whole <= free:
        yield pick(
            f"Reading from disk is not needed here: {format_size(whole)} would hold everything, and "
            f"{format_size(free)} are free.",
            f"此处无需从磁盘读取：{format_size(whole)} 即可容纳全部内容，而可用内存为 {format_size(free)}。",
        )
    elif streams and _int4_fits(case):
        yield pick(
            "In int4 the whole model would fit in this memory, and nothing would be read from disk.",
            "若采用 int4，整个模型可放入此内存，无需从磁盘读取。",
        )
    if decoding[0].seconds > _SLOW_TOKEN_S:
        yield pick(
            f"A token takes {decoding[0].seconds:.0f} s: the disk is too slow for what must be read from it.",
            f"每个词元需 {decoding[0].seconds:.0f} 秒：磁盘速度不足以读取所需的数据。",
        )
    if not measured:
        yield pick(
            "The kernels are not measured yet, their rates are estimated. After `moss-jt warmup` this is exact.",
            "尚未测量算子速度，当前为估计值。运行 `moss-jt warmup` 后即可准确预测。",
        )


def _int4_fits(case: _Case) -> bool:
    bits = case.config.quantization.bits if case.config.quantization else 16
    if bits == 4:
        return False
    smaller = replace(case, config=replace(case.config, quantization=Quantization(4, GROUP)), layouts=None)
    sizes = smaller.sizes()
    try:
        plan = smaller.plan(sizes)
    except ConfigError:
        return False
    return plan.needs.fixed + plan.total_bytes + plan.kv_bytes(plan.context) <= case.memory
