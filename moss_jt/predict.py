"""How fast a plan will be on a machine whose rates are known. Arithmetic only; nothing is measured here.

A pass computes every matrix and meanwhile reads what is not resident; whichever takes longer decides:

    compute = weights / kernel's rate + cached keys and values / theirs + the processor's part in reading
              + a fixed time per layer and per token
    decode  = overlap(streamed / disk's rate, compute)
    prefill = passes x overlap(streamed / disk's rate, multiplications / kernel's rate + the fixed times)

Where both take nearly as long they no longer hide each other wholly: overlap(a, b) is the p-norm of the
two with p = OVERLAP, which is their maximum but for a band around a = b.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from moss_jt.config import MossConfig
from moss_jt.plan import MatrixSize, Plan, resident_rows

OVERLAP = 8.0
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Spread:
    """A quantity measured several times: its median, and the values a quarter from each end."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of one or more values."""
        ordered = sorted(values)
        quarter = len(ordered) // 4
        return cls(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter])

    def map(self, function: Callable[[float], float]) -> Spread:
        """The same of a rising or falling function of the quantity."""
        low, high = sorted((function(self.low), function(self.high)))
        return Spread(function(self.median), low, high)


@dataclass(frozen=True)
class KernelRate:
    """What a matrix product reaches in one format.

    Attributes:
        decode: bytes of weights a second, one token.
        prefill: operations a second (a multiplication and an addition for each weight and token), many tokens.
    """

    decode: float
    prefill: float


@dataclass(frozen=True)
class Rates:
    """What a machine can do.

    Attributes:
        disk: bytes a second read from the model's disk.
        disk_cpu: processor seconds that reading a byte takes.
        cores: that compute.
        kernels: by what matrices are stored as ("int4", "int8", "float16", …), in the way of computing chosen.
        attention: bytes of cached keys and values a second, decoding, of the type chosen.
        layer_s: that a layer takes beside its bytes.
        token_s: that a pass takes beside its layers.
    """

    disk: float
    disk_cpu: float
    cores: int
    kernels: Mapping[str, KernelRate]
    attention: float
    layer_s: float
    token_s: float


@dataclass(frozen=True)
class Decoding:
    """One token at some place of the context.

    Attributes:
        position: tokens before it.
        kv_bytes: memory of the cache.
        resident_bytes: weights in memory.
        streamed_bytes: read from disk for this token.
        disk_s, compute_s: what each of the two takes.
        seconds: what the token takes.
    """

    position: int
    kv_bytes: int
    resident_bytes: int
    streamed_bytes: int
    disk_s: float
    compute_s: float
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second."""
        return 1 / self.seconds

    @property
    def bound(self) -> str:
        """What decides: "disk" or "compute"."""
        return "disk" if self.disk_s > self.compute_s else "compute"


@dataclass(frozen=True)
class Prefill:
    """A prompt from an empty cache.

    Attributes:
        tokens: of it.
        passes: over the weights.
        streamed_bytes: read from disk in all passes.
        seconds: until its last token is computed.
    """

    tokens: int
    passes: int
    streamed_bytes: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def overlap(a: float, b: float) -> float:
    """The time of two things done at once that now and then wait for each other."""
    longer, shorter = max(a, b), min(a, b)
    return longer * (1 + (shorter / longer) ** OVERLAP) ** (1 / OVERLAP) if longer > 0 else 0.0


class Predictor:
    """Predicts the passes of one plan.

    Args:
        config: the model's shape.
        sizes: its matrices.
        plan: what lies where.
        rates: what the machine can do; a rate for every format in `sizes`.
    """

    def __init__(self, config: MossConfig, sizes: Sequence[MatrixSize], plan: Plan, rates: Rates) -> None:
        self._config = config
        self._sizes = sizes
        self._plan = plan
        self._rates = rates

    def decoding(self, position: int) -> Decoding:
        """A token that comes after `position` others."""
        plan, rates = self._plan, self._rates
        tokens = min(position + 1, plan.context)
        budget = plan.resident_budget(tokens)
        resident, streamed = self._split(budget)
        compute = sum(size.nbytes / rates.kernels[size.stored].decode for size in self._sizes)
        compute += tokens * plan.needs.kv_token_bytes / rates.attention
        return self._decoding(position, plan.kv_bytes(tokens), resident, streamed, compute)

    def _decoding(self, position: int, kv_bytes: int, resident: int, streamed: int, compute: float) -> Decoding:
        rates = self._rates
        compute += self._config.n_layer * rates.layer_s + rates.token_s + self._reading(streamed)
        disk = streamed / rates.disk
        return Decoding(position, kv_bytes, resident, streamed, disk, compute, overlap(disk, compute))

    def prefill(self, tokens: int) -> Prefill:
        """A prompt of `tokens`, cut into passes as the engine cuts it."""
        plan = self._plan
        passes, streamed, seconds = 0, 0, 0.0
        for start in range(0, tokens, plan.capacity):
            count = min(plan.capacity, tokens - start)
            part, time = self._pass(start, count)
            passes, streamed, seconds = passes + 1, streamed + part, seconds + time
        return Prefill(tokens, passes, streamed, seconds)

    def _pass(self, start: int, count: int) -> tuple[int, float]:
        """(bytes read, seconds) of a pass over `count` tokens after `start` others."""
        rates, plan = self._rates, self._plan
        _, streamed = self._split(plan.resident_budget(min(start + count, plan.context)))
        compute = self._config.n_layer * rates.layer_s + rates.token_s + self._reading(streamed)
        for size in self._sizes:
            rate = rates.kernels[size.stored]
            tokens = 1 if size.name == HEAD else count  # only the last token's logits are wanted
            compute += max(size.nbytes / rate.decode, 2 * size.rows * size.inputs * tokens / rate.prefill)
        return streamed, overlap(streamed / rates.disk, compute)

    def _reading(self, nbytes: int) -> float:
        """What the cores cannot compute while they read."""
        return nbytes * self._rates.disk_cpu / self._rates.cores

    def _split(self, budget: int) -> tuple[int, int]:
        """(resident, streamed) bytes of all matrices."""
        rows = resident_rows(self._sizes, budget)
        resident = sum(size.bytes_of(rows[size.name]) for size in self._sizes)
        return resident, sum(size.nbytes for size in self._sizes) - resident
