"""bench: how fast a model computes here, beside what this machine can do at best in the same run.

    model = synthetic_model("moss-moon-003-int4")       # or load_model(folder)
    with Limits() as limits:
        report = measure(model, Settings(), limits)

Everything goes through the engine, as a chat would. Runs and limits alternate, and what is told is
the median of their ratios, so that a busy moment of the machine hits both. The limit of decoding is
the read bandwidth of memory for every byte of weights, keys and values (and that of the disk for
what is streamed); the limit of prefill is arithmetic. Processor seconds are told too: on a busy
machine they are what compares.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt import launch
from moss_jt.budget import Budget
from moss_jt.checkpoint import Checkpoint
from moss_jt.config import GenerationConfig, MossConfig
from moss_jt.converters.synth import PRESETS, preset_config
from moss_jt.engine import Engine
from moss_jt.errors import ConfigError
from moss_jt.language import pick
from moss_jt.limits import Limits, Measured
from moss_jt.load import check_arguments
from moss_jt.memory import automatic_memory, format_size, parse_size, peak_memory, resident_memory
from moss_jt.messages import Request, TokenEvent
from moss_jt.plan import MatrixSize, make_plan, matrix_sizes, needs_of
from moss_jt.progress import Progress, Quiet
from moss_jt.record import spread
from moss_jt.runner import DEFAULT_KV, KV_TYPES, Compute, Model
from moss_jt.synthetic import layouts_of, synthetic_store

KINDS = {"int4": 4, "int8": 8, "fp16": 16}
HEAD = "lm_head.weight"
MEMORY_MIB_BESIDE_STREAMS = 128  # of the limit's buffer where memory is short
_SEED = 20230421


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        prompt_tokens: lengths of prompts whose prefill is timed.
        contexts: tokens in the cache at the end of each timed answer.
        new_tokens: of a timed answer; the first of them is not timed.
        batch: conversations that answer at once.
        pairs: how often limit and run alternate.
    """

    prompt_tokens: tuple[int, ...] = (128, 512)
    contexts: tuple[int, ...] = (128,)
    new_tokens: int = 16
    batch: int = 1
    pairs: int = 8

    def __post_init__(self) -> None:
        for name in ("new_tokens", "batch", "pairs"):
            if getattr(self, name) < 1 + (name == "new_tokens"):
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {1 + (name == 'new_tokens')} or more.")
        if any(length < 1 for length in self.prompt_tokens):
            raise ConfigError(f"prompt_tokens is {self.prompt_tokens}; a prompt has 1 token or more.")
        if any(length <= self.new_tokens for length in self.contexts):
            raise ConfigError(
                f"contexts is {self.contexts}; each must be more than the {self.new_tokens} new tokens that end in it."
            )

    @property
    def longest(self) -> int:
        """Tokens that a conversation must have room for."""
        return max([length + 1 for length in self.prompt_tokens] + list(self.contexts), default=1)


@dataclass(frozen=True)
class Timed:
    """A run: how many passes or prompt tokens, what they took, and what was answered to each prompt."""

    count: int
    seconds: float
    cpu_seconds: float
    answers: tuple[tuple[int, ...], ...] = ()

    @property
    def each_s(self) -> float:
        """Seconds of one pass or prompt token."""
        return self.seconds / self.count


def parse_synthetic(name: str, *, layers: int | None = None, head_bits: int = 8) -> MossConfig:
    """The shape behind a name like "moss-moon-003-int4".

    Args:
        name: a preset, then int4, int8 or fp16.
        layers: other than the preset's.
        head_bits: of lm_head where the other matrices are quantised.

    Raises:
        ConfigError: there is no such preset or kind.
    """
    preset, _, kind = name.rpartition("-")
    if preset not in PRESETS or kind not in KINDS:
        raise ConfigError(
            f"there is no synthetic model {name!r}; known are {', '.join(PRESETS)}, each with -int4, -int8 or -fp16."
        )
    if layers is not None and layers < 1:
        raise ConfigError(f"layers is {layers}; it must be 1 or more.")
    bits = KINDS[kind]
    return preset_config(preset, bits=bits, layers=layers, head_bits=head_bits if bits < 16 else 16)


def synthetic_model(
    config: MossConfig,
    *,
    device: str = "auto",
    compute: Compute = "fast",
    memory: int | str | None = None,
    kv: str | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Model:
    """A model of random weights in memory.

    Args:
        config: its shape.
        device, compute, memory, kv, max_tokens, progress: as for `load_model`.

    Raises:
        ConfigError: an argument cannot work, or it does not fit: weights that are on no disk cannot be streamed.
        DeviceMemoryError: the system does not give the memory.
    """
    check_arguments(device, compute, kv, max_tokens)
    require_cpu(device)
    asked = parse_size(memory) if isinstance(memory, str) else memory
    launch.warm_up(progress)
    kind = KV_TYPES[kv] if kv is not None else DEFAULT_KV[compute]
    layouts = layouts_of(config)
    sizes = matrix_sizes(config, layouts)
    base = resident_memory()
    needs = needs_of(config, sizes, base=base, kv=kind)
    limit = base + automatic_memory() if asked is None else asked
    plan = make_plan(sizes, needs, memory=limit, context=max_tokens)
    if plan.ring_slots:
        least = needs.fixed + plan.total_bytes + needs.kv_bytes(plan.context)
        raise ConfigError(
            f"random weights are on no disk to be streamed from, and all in memory need {format_size(least)}; "
            f"there are {format_size(limit)}. Ask for fewer layers, or write them with `moss-convert synth`."
        )
    store = synthetic_store(config, progress=progress)
    nowhere = Checkpoint(Path(f"{config.name} in memory"), config, {})
    budget = Budget(plan, sizes, store)
    return Model(nowhere, store, compute=compute, device="cpu", max_tokens=plan.context, kv=kind, budget=budget)


def require_cpu(device: str, *, vram: int | str | None = None, host_share: float | str = "auto") -> None:
    """Refuse a device and what is said of one: the limits here are those of the processor and its memory.

    Raises:
        ConfigError: another device was asked for by name, or a limit or a share for one was given.
    """
    if device not in ("auto", "cpu"):
        raise ConfigError(
            f'device is "{device}"; bench measures the CPU. benchmarks/gpu_suite.sh measures a CUDA device.'
        )
    if vram is not None or host_share not in (0, "auto"):
        raise ConfigError(
            "vram or host_share was given; bench measures the CPU, whatever devices there are. Leave it out."
        )


def measure(model: Model, settings: Settings, limits: Limits, progress: Progress | None = None) -> dict[str, Any]:
    """Time prefill and decoding of a model, alternating with the limits of the machine.

    Returns:
        What was measured, for a JSON line: rates are medians with their spread.

    Raises:
        ConfigError: the model's context is shorter than what is asked for.
    """
    if settings.longest > model.max_tokens:
        raise ConfigError(
            f"{settings.longest} tokens are asked for; this model holds {model.max_tokens}. Ask for less."
        )
    bench = Bench(model, settings, limits)
    runs = (len(settings.prompt_tokens) + len(settings.contexts)) * settings.pairs
    progress = Quiet() if progress is None else progress
    progress.begin(pick("measuring", "测量中"), runs, "runs")
    try:
        bench.warm_up()
        written = written_bytes()
        prefill = [bench.prefill(count, progress) for count in settings.prompt_tokens]
        decode = [bench.decode(count, progress) for count in settings.contexts]
    finally:
        progress.end()
    return {
        "model": bench.described,
        "prefill": prefill,
        "decode": decode,
        "written_bytes": written_bytes() - written,
        "peak_memory_bytes": peak_memory(),
    }


def written_bytes() -> int:
    """What this process has caused to be written to disks so far; 0 where the system does not tell."""
    try:
        text = Path("/proc/self/io").read_text("ascii")
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("write_bytes:"))


def pass_bytes(sizes: Sequence[MatrixSize]) -> int:
    """Bytes of weights that a pass reads."""
    return sum(size.nbytes for size in sizes)


def operations(sizes: Sequence[MatrixSize], tokens: int) -> int:
    """Multiplications and additions with weights in the prefill of a prompt; the head answers its last token."""
    return sum(2 * size.rows * size.inputs * (1 if size.name == HEAD else tokens) for size in sizes)


def ratios(values: Sequence[float], limits: Sequence[float]) -> list[float]:
    """Each value over the mean of the limits before and after it; there is one limit more."""
    assert len(limits) == len(values) + 1, "limits enclose values"
    return [2 * value / (before + after) for value, before, after in zip(values, limits, limits[1:], strict=False)]


class Bench:
    """A model, an engine over it, and the machine's limits.

    Attributes:
        sizes: the matrices of a pass.
        engine: what computes; it keeps `settings.batch` conversations of each length.
    """

    def __init__(self, model: Model, settings: Settings, limits: Limits) -> None:
        self.settings, self.limits, self.model = settings, limits, model
        config = model.config
        stored = {size.name: model.store.layout(size.name) for size in matrix_sizes(config)}
        self.sizes = matrix_sizes(config, {**layouts_of(config), **stored})
        tokens = max(settings.longest, sum(settings.contexts))  # the prompt of every length stays cached
        slots = settings.batch * max(1, len(settings.contexts))
        self.engine = Engine(model, slots=slots, tokens=settings.batch * tokens)
        self.rounds = model.compute == "fast" and config.quantization is not None

    @property
    def described(self) -> dict[str, Any]:
        """What is measured."""
        config = self.model.config
        return {
            "name": config.name or self.model.path.name,
            "layers": config.n_layer,
            "bits": config.quantization.bits if config.quantization else 16,
            "head_bits": config.head_quantization.bits if config.head_quantization else 16,
            "compute": self.model.compute,
            "kv": self.model.kv,
            "batch": self.settings.batch,
            "weight_bytes": pass_bytes(self.sizes),
            "streamed_bytes": self.model.store.streamed_bytes,
            "memory_limit_bytes": self.model.budget.plan.memory if self.model.budget else None,
        }

    def warm_up(self) -> None:
        """Compute a little, so that nothing is done for the first time while it is timed."""
        self.time_prefill(8)

    def prefill(self, tokens: int, progress: Progress) -> dict[str, Any]:
        """Time prompts of so many tokens up to their first new token."""
        ask = self.limits.int8 if self.rounds else self.limits.fp32
        limits, runs = [ask()], []
        for _ in range(self.settings.pairs):
            runs.append(self.time_prefill(tokens))
            limits.append(ask())
            progress.advance(1)
        work = operations(self.sizes, tokens)
        return {
            "tokens": tokens,
            "tokens_per_s": spread([tokens / run.seconds for run in runs]),
            "first_token_s": spread([run.seconds for run in runs]),
            "cpu_s": spread([run.cpu_seconds for run in runs]),
            "gop_per_s": spread([work / run.seconds / 1e9 for run in runs]),
            "gop_per_cpu_s": spread([work / run.cpu_seconds / 1e9 for run in runs]),
            "limit": self._limit(limits, "gop_per_s"),
            "of_limit": spread(ratios([work / run.seconds for run in runs], [m.per_second for m in limits])),
        }

    def decode(self, context: int, progress: Progress) -> dict[str, Any]:
        """Time answers that end when so many tokens are cached."""
        prompts = [self.prompt(context - self.settings.new_tokens, n) for n in range(self.settings.batch)]
        self.time_answers(prompts, context, 1)
        memory, disk = [self._memory()], self._disk()
        runs = []
        for _ in range(self.settings.pairs):
            runs.append(self.time_answers(prompts, context, self.settings.new_tokens))
            memory.append(self._memory())
            disk += self._disk()
            progress.advance(1)
        seconds = [run.each_s for run in runs]  # of a pass: one token for each conversation
        cpu = [run.cpu_seconds / run.count for run in runs]
        kv = self.kv_bytes(context)
        moved = pass_bytes(self.sizes) + kv
        found = {
            "context": context,
            "batch": self.settings.batch,
            "tokens_per_s": spread([self.settings.batch / s for s in seconds]),
            "cpu_s_per_pass": spread(cpu),
            "kv_bytes": kv,
            "answer": list(runs[0].answers[0]),
            "same_answers": len({run.answers for run in runs}) == 1,
            "weight_gb_per_s": spread([pass_bytes(self.sizes) / s / 1e9 for s in seconds]),
            "gb_per_s": spread([moved / s / 1e9 for s in seconds]),
            "gb_per_cpu_s": spread([moved / s / 1e9 for s in cpu]),
            "limit": self._limit(memory, "gb_per_s"),
            "of_limit": spread(ratios([moved / s for s in seconds], [m.per_second for m in memory])),
        }
        streamed = self.model.store.streamed_bytes
        if streamed:
            found["streamed_bytes"] = streamed
            found["disk_gb_per_s"] = spread([streamed / s / 1e9 for s in seconds])
            found["disk_limit"] = self._limit(disk, "gb_per_s")
            found["of_disk_limit"] = spread(ratios([streamed / s for s in seconds], [m.per_second for m in disk]))
        return found

    def kv_bytes(self, context: int) -> int:
        """Bytes of keys and values that a pass reads, in the middle of an answer that ends at `context`."""
        cached = self.settings.batch * (context - self.settings.new_tokens // 2)
        return cached * self.engine.runner.cache.token_bytes

    def _limit(self, limits: Sequence[Measured], unit: str) -> dict[str, Any]:
        cpu = unit.replace("_s", "_cpu_s")
        return {
            unit: spread([m.per_second / 1e9 for m in limits]),
            cpu: spread([m.per_cpu_second / 1e9 for m in limits]),
            "how": limits[0].how,
        }

    def _memory(self) -> Measured:
        if self.model.store.streamed_bytes:
            return self.limits.memory(mib=MEMORY_MIB_BESIDE_STREAMS)
        return self.limits.memory()

    def _disk(self) -> list[Measured]:
        """The disk by itself, where weights are streamed from it."""
        if not self.model.store.streamed_bytes:
            return []
        files = sorted(self.model.path.glob("*.safetensors"), key=lambda file: file.stat().st_size)
        return [self.limits.disk(files[-1])]

    def prompt(self, tokens: int, number: int = 0) -> tuple[int, ...]:
        """Random ids, the same for the same length and number: answers of different runs can be compared."""
        random = np.random.default_rng([_SEED, tokens, number])
        return tuple(int(i) for i in random.integers(0, self.model.config.vocab_size, tokens))

    def time_prefill(self, tokens: int) -> Timed:
        """One prompt, up to its first new token."""
        began, cpu = time.perf_counter(), time.process_time()
        self.engine.submit(Request(self.prompt(tokens), _greedy(1)))
        while self.engine.busy:
            self.engine.step()
        return Timed(tokens, time.perf_counter() - began, time.process_time() - cpu)

    def time_answers(self, prompts: Sequence[tuple[int, ...]], context: int, new_tokens: int) -> Timed:
        """An answer to each prompt; the passes after the first token of all are timed."""
        requests = [
            self.engine.submit(Request(ids, _greedy(new_tokens), conversation=f"{context} {number}"))
            for number, ids in enumerate(prompts)
        ]
        passes, seconds, cpu_seconds = 0, 0.0, 0.0
        answers: dict[int, list[int]] = {request: [] for request in requests}
        while self.engine.busy:
            timed = all(answers.values())
            began, cpu = time.perf_counter(), time.process_time()
            events = self.engine.step()
            if timed:
                passes += 1
                seconds += time.perf_counter() - began
                cpu_seconds += time.process_time() - cpu
            for event in events:
                if isinstance(event, TokenEvent):
                    answers[event.request].append(event.id)
        return Timed(passes, seconds, cpu_seconds, tuple(tuple(answer) for answer in answers.values()))


def _greedy(new_tokens: int) -> GenerationConfig:
    return GenerationConfig(do_sample=False, repetition_penalty=1.0, max_new_tokens=new_tokens)
