"""How fast a plan will be on a machine whose rates are known. Arithmetic only; nothing is measured here.

A pass goes through the matrices in their order. Each computes what is resident and then what is streamed, while
the readers fill the ring, and no more than the ring:

    compute = weights / kernel's rate + cached keys and values / theirs + the processor's part in reading
              + a fixed time per layer and per token

What has not been read when it is needed is waited for. So a disk that is slower than the computation decides
everywhere, and one that is faster still decides where little is computed with many bytes: the head after a prompt.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from moss_jt.config import MossConfig
from moss_jt.plan import MatrixSize, Plan, resident_rows

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
        disk: bytes a second read from the model's disk when nothing computes.
        disk_beside: the same while the processor computes and the memory is busy.
        disk_cpu: processor seconds that reading a byte takes.
        cores: that compute.
        kernels: by what matrices are stored as ("int4", "int8", "float16", …), in the way of computing chosen.
        attention: bytes of cached keys and values a second, decoding, of the type chosen.
        layer_s: that a layer takes beside its bytes.
        token_s: that a pass takes beside its layers.
    """

    disk: float
    disk_beside: float
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


class Flow:
    """Reading and computing side by side.

    Args:
        disk, beside: bytes a second while computing waits, and while it goes on.
        ring: bytes that the readers may be ahead; at the start they are.

    Attributes:
        seconds: until all that was computed so far was done.
    """

    def __init__(self, disk: float, beside: float, ring: int) -> None:
        self.seconds = 0.0
        self._disk, self._beside, self._ring = disk, beside, float(ring)
        self._ahead = self._ring

    def compute(self, seconds: float, streamed: int = 0) -> None:
        """Compute for so long, and use up so many bytes meanwhile."""
        ahead = self._ahead + self._beside * seconds - streamed
        self.seconds += seconds + max(0.0, -ahead) / self._disk
        self._ahead = min(self._ring, max(0.0, ahead))


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
        attention = tokens * plan.needs.kv_token_bytes / rates.attention
        budget = plan.resident_budget(tokens)
        flow = Flow(rates.disk, rates.disk_beside, plan.ring_bytes)
        resident, streamed, compute = self._run(flow, budget, 1, attention)
        before = flow.seconds
        self._run(flow, budget, 1, attention)  # the one after: reading goes on over the end of a token
        took, disk = flow.seconds - before, streamed / rates.disk
        return Decoding(position, plan.kv_bytes(tokens), resident, streamed, disk, compute, took)

    def prefill(self, tokens: int) -> Prefill:
        """A prompt of `tokens`, cut into passes as the engine cuts it."""
        plan = self._plan
        flow = Flow(self._rates.disk, self._rates.disk_beside, plan.ring_bytes)
        passes, read = 0, 0
        for start in range(0, tokens, plan.capacity):
            count = min(plan.capacity, tokens - start)
            budget = plan.resident_budget(min(start + count, plan.context))
            _, streamed, _ = self._run(flow, budget, count, 0.0)
            passes, read = passes + 1, read + streamed
        return Prefill(tokens, passes, read, flow.seconds)

    def _run(self, flow: Flow, budget: int, count: int, attention: float) -> tuple[int, int, float]:
        """Send a pass over `count` tokens through a flow.

        Args:
            budget: bytes of weights that are resident.
            attention: seconds of it.

        Returns:
            resident bytes, streamed bytes, and seconds of computing alone.
        """
        rates, rows = self._rates, resident_rows(self._sizes, budget)
        fixed = (self._config.n_layer * rates.layer_s + attention) / len(self._sizes)
        flow.compute(rates.token_s)
        held, streamed, computed = 0, 0, rates.token_s
        for size in self._sizes:
            here = size.bytes_of(rows[size.name])
            rest = size.nbytes - here
            seconds = self._product_s(size, count)
            later = seconds * rest / size.nbytes + rest * rates.disk_cpu / rates.cores
            flow.compute(fixed + seconds * here / size.nbytes)
            flow.compute(later, rest)
            held, streamed = held + here, streamed + rest
            computed += fixed + seconds * here / size.nbytes + later
        return held, streamed, computed

    def _product_s(self, size: MatrixSize, count: int) -> float:
        """Seconds of a product with `count` tokens; of the head only the last one's logits are wanted."""
        rate = self._rates.kernels[size.stored]
        tokens = 1 if size.name == HEAD else count
        return max(size.nbytes / rate.decode, 2 * size.rows * size.inputs * tokens / rate.prefill)
