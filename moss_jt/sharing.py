"""Sharing: which part of the weights that a device would be sent the host's processor should multiply instead.

The host multiplies the last rows of a matrix while the link brings the rows before them to the device, and the product
is over when both are. So a product takes the longer of the two, and the best share has both end at once. Copying and
multiplying read the same memory: each is measured alone and beside the other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moss_jt.device import Device

LEAST_GAIN = 1.05  # times faster the products must become; the arithmetic of the host's share is a little coarser
_SECONDS, _RUNS = 0.04, 3  # of each measurement, and how many
_TURNS = 9


@dataclass(frozen=True)
class SharingRates:
    """Bytes of weights a second, and what a shared product takes beside them.

    Attributes:
        link: copied to the device while the processor rests.
        link_beside: copied while it multiplies.
        host: multiplied by the processor while nothing is copied.
        host_beside: multiplied while something is.
        turn_s: seconds until the inputs of a product are on the host, and the outputs on their way back.
    """

    link: float
    link_beside: float
    host: float
    host_beside: float
    turn_s: float

    def seconds(self, nbytes: int, share: float) -> float:
        """What a product takes of whose streamed bytes the host multiplies a share, 0 to 1."""
        own = share * nbytes
        if own == 0:
            return nbytes / self.link
        copied = max(0.0, nbytes - own - self.turn_s * self.link)
        if copied == 0:
            return self.turn_s + own / self.host
        if copied * self.host_beside >= own * self.link_beside:  # the processor is through first
            both = own / self.host_beside
            return self.turn_s + both + (copied - both * self.link_beside) / self.link
        both = copied / self.link_beside
        return self.turn_s + both + (own - both * self.host_beside) / self.host

    def balance(self, nbytes: int) -> float:
        """The share with which copying and multiplying end at once."""
        left = nbytes - self.turn_s * self.link
        return max(0.0, left / nbytes * self.host_beside / (self.host_beside + self.link_beside))


def best_share(rates: SharingRates, products: Sequence[int]) -> float:
    """The share with which products take least time together; 0 where sharing does not pay.

    Args:
        products: for each matrix that the host can have a share of, the bytes that would be copied for a token.
    """
    kinds = {nbytes for nbytes in products if nbytes > 0}
    if not kinds:
        return 0.0

    def seconds(share: float) -> float:
        return sum(rates.seconds(nbytes, share) for nbytes in products if nbytes > 0)

    best = min(sorted({1.0, *(rates.balance(nbytes) for nbytes in kinds)}), key=seconds)
    return best if seconds(best) * LEAST_GAIN < seconds(0.0) else 0.0


@dataclass(frozen=True)
class ShareChoice:
    """What was chosen, and what it was chosen by; `rates` is None where nothing had to be measured."""

    share: float
    rates: SharingRates | None = None

    def __str__(self) -> str:
        if self.rates is None:
            return "nothing is copied for a token that the processor could multiply"
        rates = self.rates
        told = (
            f"the link brings {rates.link / 1e9:.1f} GB/s, beside the processor {rates.link_beside / 1e9:.1f}; "
            f"the processor multiplies {rates.host / 1e9:.1f} GB/s, beside the link {rates.host_beside / 1e9:.1f}"
        )
        return f"{told}; it gets {self.share:.2f} of the feed-forward weights that would be copied"


def measure_sharing(
    device: Device, send: Callable[[], int], multiply: Callable[[], int], turn: Callable[[], None]
) -> SharingRates:
    """Copy and multiply, each alone and then at once; medians of a few runs, half a second in all.

    Args:
        device: that `send` copies to; nothing else is queued on it meanwhile.
        send: queues a copy to the device on the copying stream; how many bytes.
        multiply: multiplies weights on the host as a token does; how many bytes of them.
        turn: brings inputs of a product from the device and its outputs there; waits for both.
    """
    for once in (send, multiply, turn):
        once()  # nothing is done for the first time while it is timed
    _finish(device)
    link = statistics.median(_link_rate(device, send) for _ in range(_RUNS))
    host = statistics.median(_host_rate(multiply) for _ in range(_RUNS))
    enough = 3 * link * (_SECONDS + _seconds_of(multiply))
    beside = [_beside(device, send, multiply, link, enough) for _ in range(_RUNS)]
    return SharingRates(
        link=link,
        link_beside=min(link, statistics.median(rate for rate, _ in beside)),
        host=host,
        host_beside=min(host, statistics.median(rate for _, rate in beside)),
        turn_s=statistics.median(_seconds_of(turn) for _ in range(_TURNS)),
    )


def _finish(device: Device) -> None:
    device.wait(device.record("copy"))


def _seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _link_rate(device: Device, send: Callable[[], int]) -> float:
    """Bytes a second of copies, one behind the other; some are waited for together, for as long as the time lasts."""
    began, copied, together = time.perf_counter(), 0, 1
    while time.perf_counter() - began < _SECONDS:
        copied += sum(send() for _ in range(together))
        _finish(device)
        together *= 2
    return copied / (time.perf_counter() - began)


def _host_rate(multiply: Callable[[], int]) -> float:
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < _SECONDS:
        done += multiply()
    return done / (time.perf_counter() - began)


def _beside(
    device: Device, send: Callable[[], int], multiply: Callable[[], int], link: float, enough: float
) -> tuple[float, float]:
    """(link, host) while both work: so many bytes are sent that the link has work for as long as the host.

    Before that and after it the copies go at the link's own rate, so what went meanwhile need not be asked for.
    """
    queued, done, start = 0, 0, time.perf_counter()
    while queued < enough:
        queued += send()
    began = time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        done += multiply()
    ended = time.perf_counter()
    _finish(device)
    alone = began - start + time.perf_counter() - ended
    return max(0.0, queued - alone * link) / (ended - began), done / (ended - began)
