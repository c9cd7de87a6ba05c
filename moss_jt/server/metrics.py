"""What is counted, for Prometheus: requests, tokens, queue, batch, memory by tier, cache hits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moss_jt.messages import FinishedEvent, TokenEvent
from moss_jt.server.link import Happened

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from moss_jt.server.dispatch import Dispatcher

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_MEMORY = {
    "resident": "resident_bytes",
    "streamed": "streamed_bytes",
    "kv": "cached_bytes",
    "limit": "memory_limit",
    "device": "device_bytes",
    "vram_limit": "vram_limit",
}


class Metrics:
    """Counters of one server.

    Args:
        dispatcher: asked at each scrape, and listened to.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._dispatcher = dispatcher
        self._last: dict[int, float] = {}  # request -> when its last token came
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "moss_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "moss_request_seconds", "Time of a request.", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self._tokens = Counter(
            "moss_tokens", "Tokens: of prompts, of these found in a cache, and new.", ["kind"], registry=self.registry
        )
        self._between = Histogram(
            "moss_token_gap_seconds", "Time between tokens of an answer.", buckets=_SECONDS, registry=self.registry
        )
        self._batch = Histogram(
            "moss_batch_size", "Answers that got a token in a pass.", buckets=_BATCHES, registry=self.registry
        )
        self.registry.register(self)
        dispatcher.on_happened = self._happened

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)

    def figures(self) -> dict[str, Any]:
        """Speed, queue and memory at this moment, as JSON."""
        dispatcher, stats = self._dispatcher, self._dispatcher.stats
        return {
            "tokens_per_s": float(stats.get("decode_tokens_per_s", 0.0)),
            "waiting": dispatcher.waiting,
            "running": dispatcher.running,
            "memory": {tier: int(stats.get(key, 0)) for tier, key in _MEMORY.items()},
        }

    def collect(self) -> Iterator[Metric]:
        """What is so at this moment."""
        from prometheus_client.core import GaugeMetricFamily

        dispatcher, stats = self._dispatcher, self._dispatcher.stats
        values = {
            "moss_ready": ("Whether requests are answered.", float(dispatcher.state == "ready")),
            "moss_queue_length": ("Requests that wait.", dispatcher.waiting),
            "moss_running": ("Requests that the engine has.", dispatcher.running),
            "moss_worker_restarts": ("Times the process of the model was started again.", dispatcher.restarts),
            "moss_decode_tokens_per_second": ("Of passes that only answer.", stats.get("decode_tokens_per_s", 0.0)),
            "moss_prefill_tokens_per_second": ("Of passes that read.", stats.get("prefill_tokens_per_s", 0.0)),
            "moss_cached_tokens": ("Tokens in the cache.", stats.get("cached_tokens", 0)),
            "moss_disk_read_bytes": ("Of weights, since the start.", stats.get("disk_bytes", 0)),
        }
        for name, (words, value) in values.items():
            yield GaugeMetricFamily(name, words, value=float(value))
        memory = GaugeMetricFamily("moss_memory_bytes", "Memory of the model by tier.", labels=["tier"])
        for tier, key in _MEMORY.items():
            memory.add_metric([tier], float(stats.get(key, 0)))
        yield memory

    def _happened(self, message: Happened) -> None:
        now = time.monotonic()
        answered = 0
        for number, event in message.events:
            if isinstance(event, TokenEvent):
                answered += 1
                if number in self._last:
                    self._between.observe(now - self._last[number])
                self._last[number] = now
            elif isinstance(event, FinishedEvent):
                self._last.pop(number, None)
                self._tokens.labels("prompt").inc(event.prompt_tokens)
                self._tokens.labels("reused").inc(event.reused_tokens)
                self._tokens.labels("new").inc(event.new_tokens)
        if answered:
            self._batch.observe(answered)
        if not self._dispatcher.running:
            self._last.clear()  # those of requests that failed, too
