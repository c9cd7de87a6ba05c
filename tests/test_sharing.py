"""What is left to the host's processor: by arithmetic from known rates, and how these are measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_device import HostDevice

from moss_jt.host_share import TOKENS, HostShare
from moss_jt.layout import TileLayout
from moss_jt.memory import MIB
from moss_jt.plan import MatrixSize
from moss_jt.sharing import LEAST_GAIN, ShareChoice, SharingRates, best_share, measure_sharing
from moss_jt.weights import Stored, WeightStore

MATRIX = 32 * MIB
# a link of 20 GB/s, and a processor that multiplies 30 GB/s, less where both read the same memory
DESKTOP = SharingRates(link=20e9, link_beside=15e9, host=30e9, host_beside=25e9, turn_s=0.0)


def slowly(rates: SharingRates, nbytes: int, share: float, steps: int = 20000) -> float:
    """The same as `SharingRates.seconds`, by small steps of time."""
    copied, own, time = (1 - share) * nbytes, share * nbytes, 0.0
    step = nbytes / rates.link / steps
    waiting = rates.turn_s if own else 0.0
    while copied > 0 or own > 0:
        both = copied > 0 and own > 0 and waiting <= 0
        copied -= step * (rates.link_beside if both else rates.link)
        if waiting > 0:
            waiting -= step
        else:
            own -= step * (rates.host_beside if both else rates.host)
        time += step
    return time


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.625, 0.8, 1.0])
@pytest.mark.parametrize("turn_s", [0.0, 0.0003])
def test_a_product_takes_what_copying_and_multiplying_take(share: float, turn_s: float) -> None:
    rates = SharingRates(20e9, 15e9, 30e9, 25e9, turn_s)
    assert rates.seconds(MATRIX, share) == pytest.approx(slowly(rates, MATRIX, share), rel=2e-3)


def test_the_best_share_has_both_end_at_once() -> None:
    share = best_share(DESKTOP, [MATRIX] * 68)
    assert share == pytest.approx(25 / 40)
    copying, multiplying = (1 - share) * MATRIX / 15e9, share * MATRIX / 25e9
    assert copying == pytest.approx(multiplying)
    others = np.linspace(0, 1, 201)
    assert DESKTOP.seconds(MATRIX, share) <= min(DESKTOP.seconds(MATRIX, float(other)) for other in others)
    assert DESKTOP.seconds(MATRIX, 0.0) / DESKTOP.seconds(MATRIX, share) == pytest.approx(2.0)


def test_a_fast_link_or_a_busy_memory_leaves_nothing_to_the_host() -> None:
    """Where both share one memory, the link may lose what the processor gains."""
    assert best_share(SharingRates(20e9, 10e9, 20e9, 10e9, 0.0), [MATRIX]) == 0.0
    assert best_share(SharingRates(50e9, 50e9, 1e9, 1e9, 0.0), [MATRIX]) == 0.0
    barely = 20e9 * (LEAST_GAIN - 1)
    assert best_share(SharingRates(20e9, 20e9, barely, barely * 0.9, 0.0), [MATRIX]) == 0.0
    assert best_share(SharingRates(20e9, 20e9, 2 * barely, 2 * barely, 0.0), [MATRIX]) > 0.0


def test_a_turn_that_takes_longer_than_the_copy_does_not_pay() -> None:
    slow = SharingRates(20e9, 15e9, 30e9, 25e9, turn_s=0.002)  # a matrix is copied in 1.7 ms
    assert best_share(slow, [MATRIX]) == 0.0
    assert best_share(slow, [8 * MATRIX]) > 0.0


def test_a_link_that_stands_still_beside_the_processor() -> None:
    """Then there is nothing to divide: all or nothing."""
    assert best_share(SharingRates(5e9, 0.0, 30e9, 30e9, 0.0), [MATRIX]) == 1.0
    assert best_share(SharingRates(30e9, 0.0, 5e9, 5e9, 0.0), [MATRIX]) == 0.0


def test_without_anything_to_copy_there_is_nothing_to_share() -> None:
    assert best_share(DESKTOP, []) == best_share(DESKTOP, [0, 0]) == 0.0


def test_matrices_of_different_sizes_are_weighed_together() -> None:
    rates = SharingRates(20e9, 15e9, 30e9, 25e9, turn_s=0.0002)
    products = [MATRIX, MATRIX // 8, MATRIX // 64]
    share = best_share(rates, products)

    def seconds(other: float) -> float:
        return sum(rates.seconds(nbytes, other) for nbytes in products)

    assert 0 < share < 1
    assert seconds(share) <= min(seconds(rates.balance(nbytes)) for nbytes in products)


class Machine:
    """A link and a processor of known rates, by a clock of their own; what is queued is copied while time goes by."""

    def __init__(self, rates: SharingRates) -> None:
        self.rates, self.now, self.queued = rates, 0.0, 0.0

    def pass_time(self, seconds: float, rate: float) -> None:
        self.queued = max(0.0, self.queued - seconds * rate)
        self.now += seconds

    def send(self) -> int:
        self.pass_time(5e-6, self.rates.link)
        self.queued += MIB
        return MIB

    def multiply(self) -> int:
        nbytes = left = MATRIX // 8
        while left > 0:
            rate, link = (
                (self.rates.host_beside, self.rates.link_beside) if self.queued else (self.rates.host, self.rates.link)
            )
            self.pass_time(MIB / rate, link)
            left -= MIB
        return nbytes

    def turn(self) -> None:
        self.pass_time(self.rates.turn_s, self.rates.link)

    def record(self, stream: str) -> float:
        return self.queued if stream == "copy" else 0.0

    def wait(self, queued: float) -> None:
        self.pass_time(queued / self.rates.link, self.rates.link)


@pytest.mark.parametrize("rates", [DESKTOP, SharingRates(12e9, 11e9, 45e9, 31e9, 0.0001)])
def test_rates_are_measured(rates: SharingRates, monkeypatch: pytest.MonkeyPatch) -> None:
    machine: Any = Machine(rates)
    monkeypatch.setattr("moss_jt.sharing.time.perf_counter", lambda: machine.now)
    found = measure_sharing(machine, machine.send, machine.multiply, machine.turn)
    assert found.link == pytest.approx(rates.link, rel=0.05)
    assert found.host == pytest.approx(rates.host, rel=0.05)
    assert found.link_beside == pytest.approx(rates.link_beside, rel=0.05)
    assert found.host_beside == pytest.approx(rates.host_beside, rel=0.05)
    assert found.turn_s == pytest.approx(rates.turn_s)
    assert machine.now < 1.0, "half a second was said"


def test_a_choice_is_told() -> None:
    told = str(ShareChoice(0.3, DESKTOP))
    assert "20.0 GB/s, beside the processor 15.0" in told and "it gets 0.30 of the feed-forward weights" in told
    assert str(ShareChoice(0.0)) == "nothing is copied for a token that the processor could multiply"


@pytest.mark.parametrize("group", [8, 16, 32, 300])
def test_there_is_room_for_the_steps_of_small_groups(group: int, tmp_path: Path, jittor: object) -> None:
    layout = TileLayout((64, 512), 8, group)
    store = WeightStore()
    name = "transformer.h.0.mlp.fc_in.weight"
    store.put(Stored(name, np.zeros(layout.nbytes, np.uint8), layout))
    share = HostShare(HostDevice(tmp_path), store, [MatrixSize(name, 64, 16, layout.nbytes // 4)], 1.0)
    _, steps, sums = (buffer.array.size for buffer in share._rounded)
    assert min(steps, sums) >= TOKENS * layout.n_groups * -(-layout.padded_group // 128)
