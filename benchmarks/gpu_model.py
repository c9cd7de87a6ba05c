"""Parts of gpu.py about a whole model of random weights: resident, many conversations at once, long, and under caps."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gpu_rows import Rows

from moss_jt.batch import Batch
from moss_jt.bench import parse_synthetic
from moss_jt.checkpoint import Checkpoint
from moss_jt.config import GenerationConfig, MossConfig
from moss_jt.device import Device
from moss_jt.memory import GIB
from moss_jt.placement import TwoPlans, fill
from moss_jt.plan import LOGIT_ROWS, make_plan, matrix_sizes
from moss_jt.record import spread
from moss_jt.runner import DEFAULT_KV, Compute, Model, Runner
from moss_jt.sharing import SharingRates
from moss_jt.shortlist import Wish, choose_from
from moss_jt.synthetic import layouts_of, synthetic_store
from moss_jt.weights import WeightStore
from moss_jt.workspace import device_needs

Results = dict[str, Any]
OpenDevice = Callable[[int | None], Device]  # with a limit of its memory

PROMPT, NEW = 32, 17  # tokens of an answer that is compared and timed; the first of it is not timed
SEED = 20230421
COMPUTE: Compute = "fast"
GREEDY = GenerationConfig(do_sample=False, repetition_penalty=1.0)
_LINK_TIMES = 32


@dataclass(frozen=True)
class Stage:
    """What is measured where.

    Attributes:
        open: opens the device.
        shape: of the model, a name for `parse_synthetic` without its kind.
        layers: of it.
        kinds: of weights.
        caps: of the device's memory, bytes.
        used: bytes of the device in use by everybody, where something tells.
    """

    open: OpenDevice
    shape: str = "moss-moon-003"
    layers: int | None = None
    kinds: tuple[str, ...] = ("int4", "int8", "fp16")
    caps: tuple[int, ...] = tuple(gib * GIB for gib in (4, 6, 8, 12, 24))
    used: Callable[[], int | None] = field(default=lambda: None)

    def config(self, kind: str) -> MossConfig:
        """The shape with one kind of weights."""
        return parse_synthetic(f"{self.shape}-{kind}", layers=self.layers)


@cache
def weights_of(config: MossConfig) -> WeightStore:
    """Random weights in main memory; the last ones asked for are kept."""
    weights_of.cache_clear()
    return synthetic_store(config)


@contextmanager
def loaded(stage: Stage, kind: str, *, limit: int | None = None, context: int = 256) -> Iterator[Model]:
    """A model on the device, within a limit of its memory; all that is not there is pinned main memory."""
    config, way = stage.config(kind), COMPUTE
    store, device = weights_of(config), stage.open(limit)
    layouts = {size.name: store.layout(size.name) for size in matrix_sizes(config, layouts_of(config))}
    sizes = matrix_sizes(config, layouts)
    needs = device_needs(config, sizes, layouts, base=device.own_bytes, kv=DEFAULT_KV[way])
    try:
        plan = make_plan(sizes, needs, memory=device.own_bytes + device.capacity, context=context)
        placed = fill(config, store, device, sizes, plans=TwoPlans(plan, None, {}), kv=DEFAULT_KV[way])
        yield Model(
            Checkpoint(Path(f"{config.name} in memory"), config, {}),
            store,
            compute=way,
            device=device.name,
            max_tokens=plan.context,
            budget=placed.budget,
            placed=placed,
        )
    finally:
        device.close()


@dataclass
class Answered:
    """Tokens of each conversation, and what passes took."""

    tokens: list[list[int]]
    prefill_s: float
    steps_s: list[float]
    finite: bool = True


def answer(model: Model, prompts: npt.NDArray[np.int32], new: int) -> Answered:
    """Greedy answers of `new` tokens to prompts (B, T), all together, the first of them from the prefill."""
    count, length = prompts.shape
    runner = model.runner(slots=count, tokens=count * (length + new))
    cache = runner.cache
    for slot in range(count):
        cache.reserve(slot, length)
    began = time.perf_counter()
    picked: list[int] = []
    finite = True
    for slot in range(count):
        for start in range(0, length, runner.capacity):
            places = np.arange(start, min(start + runner.capacity, length), dtype=np.int32)
            wanted = np.array([len(places) - 1] if places[-1] == length - 1 else [], np.int32)
            ids, whole = _best(runner, Batch(prompts[slot, places], np.full_like(places, slot), places, wanted))
            cache.commit(slot, len(places))
            picked += ids
            finite = finite and whole
    found = Answered([[token] for token in picked], time.perf_counter() - began, [], finite)
    for step in range(new - 1):
        for slot in range(count):
            cache.reserve(slot, 1)
        began = time.perf_counter()
        slots = np.arange(count, dtype=np.int32)
        last = np.array([tokens[-1] for tokens in found.tokens], np.int32)
        ids, whole = _best(runner, Batch(last, slots, np.full_like(slots, length + step), slots))
        found.steps_s.append(time.perf_counter() - began)
        found.finite = found.finite and whole
        for slot in range(count):
            cache.commit(slot, 1)
            found.tokens[slot].append(ids[slot])
    return found


def _best(runner: Runner, batch: Batch) -> tuple[list[int], bool]:
    """The best tokens of those that are wanted, found where the logits are if that can be; whether all are numbers."""
    found = runner.shortlists(batch, [Wish((), GREEDY)] * len(batch.wanted))
    if found is None:
        logits = runner.forward(batch)
        return [int(row.argmax()) for row in logits], bool(np.isfinite(logits).all())
    rng = np.random.default_rng(0)  # of no effect
    return [choose_from(each, GREEDY, rng)[0] for each in found], not any(each.is_broken for each in found)


def prompts_for(model: Model, count: int, length: int) -> npt.NDArray[np.int32]:
    """Random prompts (count, length)."""
    high = min(50000, model.config.vocab_size)
    return np.random.default_rng(SEED).integers(0, high, (count, length)).astype(np.int32)


def bytes_of(model: Model) -> int:
    """Weights that a pass multiplies with."""
    assert model.placed is not None
    weights = model.placed.space.weights
    return weights.resident_bytes + weights.streamed_bytes


def resident(stage: Stage, copy_rate: float) -> Results:
    """Prefill and decoding of each kind of weights that the device holds whole, against copies within the device."""
    results: Results = Rows()
    for kind in stage.kinds:
        with loaded(stage, kind, context=640) as model:
            assert model.placed is not None
            if model.placed.plans.device.ring_slots:
                results[kind] = {"not_measured": "the device does not hold it whole"}
                continue
            prefill = {}
            for length in (128, 512):
                runs = [answer(model, prompts_for(model, 1, length), 1).prefill_s for _ in range(3)][1:]
                prefill[str(length)] = spread([length / run for run in runs], 1)
            found = [answer(model, prompts_for(model, 1, PROMPT), NEW) for _ in range(4)][1:]
            steps = [step for run in found for step in run.steps_s[2:]]
            rates = [bytes_of(model) / step for step in steps]
            results[kind] = {
                "prefill_tokens_per_s": prefill,
                "decode_tokens_per_s": spread([1 / step for step in steps], 2),
                "of_copy": spread([rate / copy_rate for rate in rates], 3),
                "wrong": not all(run.finite for run in found),
            }
    return _judged(results)


def batch(stage: Stage) -> Results:
    """What a step of 16 conversations takes against a step of one."""
    results: Results = Rows()
    for kind in stage.kinds:
        with loaded(stage, kind, context=1024) as model:
            steps = {}
            for count in (1, 4, 8, 16):
                found = answer(model, prompts_for(model, count, 8), NEW)
                steps[count] = spread(found.steps_s[2:], 6)
            results[kind] = {
                "step_s": {str(count): step for count, step in steps.items()},
                "sixteen_to_one": round(steps[16]["median"] / steps[1]["median"], 3),
            }
    return results


def context(stage: Stage, limits: Sequence[int] = (12 * GIB, 4 * GIB)) -> Results:
    """int4 with 2048 tokens within limits of memory: whether anything is streamed, and how fast the last tokens are."""
    results: Results = Rows()
    for limit in limits:
        with loaded(stage, "int4", limit=limit, context=stage.config("int4").n_positions) as model:
            found = answer(model, prompts_for(model, 1, model.max_tokens - NEW), NEW)
            assert model.placed is not None
            results[str(limit)] = {
                "context": model.max_tokens,
                "streamed_bytes": model.placed.space.weights.streamed_bytes,
                "prefill_s": round(found.prefill_s, 3),
                "decode_tokens_per_s": spread([1 / step for step in found.steps_s[2:]], 2),
                "wrong": not found.finite,
            }
    return _judged(results)


def link_rate(model: Model) -> float:
    """Bytes a second from pinned main memory to the device, into one of its buffers."""
    assert model.placed is not None
    space = model.placed.space
    device, (source, *_) = space.device, model.store.memory
    nbytes = min(4 * LOGIT_ROWS * space.config.vocab_size, len(source))
    starts = [(turn * nbytes) % max(1, len(source) - nbytes) for turn in range(_LINK_TIMES)]
    began = 0.0
    for _ in range(2):  # the first time warms up
        device.wait(device.record("compute"))
        began = time.perf_counter()
        for start in starts:
            values = source[start : start + nbytes]
            device.write(space.buffers["logits"].place, values, stream="copy", stays=True)
        device.wait(device.record("copy"))
    return nbytes * len(starts) / (time.perf_counter() - began)


def caps(stage: Stage, context: int = 256) -> Results:
    """Each kind of weights under each cap: the same tokens, no more memory, and how near to what the link allows."""
    results: Results = Rows()
    before = stage.used()  # once: what this process takes with its first opening stays
    for kind in stage.kinds:
        want: list[list[int]] | None = None
        for cap in sorted(stage.caps, reverse=True):
            with loaded(stage, kind, limit=cap, context=context) as model:
                assert model.placed is not None
                weights, device = model.placed.space.weights, model.placed.space.device
                rates = [link_rate(model)]
                found = answer(model, prompts_for(model, 1, PROMPT), NEW)
                rates.append(link_rate(model))
                streamed = weights.streamed_bytes
                after = stage.used()
                row: Results = {
                    "streamed_bytes": streamed,
                    "decode_tokens_per_s": spread([1 / step for step in found.steps_s[2:]], 3),
                    "taken_bytes": device.own_bytes + device.taken,
                    "used_bytes": None if before is None or after is None else after - before,
                    "same_tokens": want is None or found.tokens == want,
                }
                want = found.tokens if want is None else want
                if streamed:
                    best = streamed / (sum(rates) / 2)
                    row["link_gb_per_s"] = round(sum(rates) / 2e9, 2)
                    row["of_link"] = spread([best / step for step in found.steps_s[2:]], 3)
                over = max(row["taken_bytes"], row["used_bytes"] or 0) > cap
                row["wrong"] = over or not row["same_tokens"] or not found.finite
                results[f"{kind} {cap / GIB:g}GiB"] = row
    return _judged(results)


def share(stage: Stage, limit: int = 8 * GIB) -> Results:
    """Decoding of int4 within a limit when the host multiplies more and more of what would be copied; and with the
    share that `host_share="auto"` takes, which should be the best of them or better."""
    if importlib.util.find_spec("jittor") is None:
        return {"not_measured": "the host's kernels need Jittor, which is not installed"}
    from moss_jt import launch

    launch.warm_up()
    results: Results = Rows()
    for part in (0.0, 0.25, 0.5, 0.75, 1.0, "auto"):
        with loaded(stage, "int4", limit=limit) as model:
            assert model.placed is not None
            chosen: Results = {}
            if isinstance(part, str):
                choice = model.placed.space.choose_share()
                chosen = {"share": round(choice.share, 3), **_rounded(choice.rates)}
            else:
                model.placed.space.leave_to_host(part)
            found = answer(model, prompts_for(model, 1, PROMPT), NEW)
            steps = found.steps_s[2:]
            results[part if isinstance(part, str) else f"{part:g}"] = {
                **chosen,
                "decode_tokens_per_s": spread([1 / step for step in steps], 3),
                "link_gb_per_s": round(link_rate(model) / 1e9, 2),
                "wrong": not found.finite,
            }
    streaming = results["0"]["decode_tokens_per_s"]["median"]
    for row in results.values():
        row["times_streaming"] = round(row["decode_tokens_per_s"]["median"] / streaming, 3)
    return _judged(results)


def _rounded(rates: SharingRates | None) -> Results:
    """Rates in GB/s."""
    told = {} if rates is None else asdict(rates)
    return {f"{name}_gb_per_s": round(rate / 1e9, 2) for name, rate in told.items() if name != "turn_s"}


def _judged(results: Results) -> Results:
    """With "wrong" for the whole."""
    return {**results, "wrong": any(row.get("wrong") for row in results.values())}
