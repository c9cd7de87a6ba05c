"""Which samples a step takes, and how they are laid out: flat, without padding, what they have in common once.

The order of an epoch depends on the seed and the epoch alone, so a run can go on anywhere, and every process
knows what the others compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.batch import Batch
from moss_jt.finetune.data import Samples
from moss_jt.finetune.encoding import NOT_LEARNED

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Pass:
    """Samples that are computed at once.

    Attributes:
        batch: their tokens, those that all samples begin with once; wanted are those that a learned token follows.
        labels: what follows the wanted tokens, (R,) int32.
        tokens: of the samples, each counted by itself.
    """

    batch: Batch
    labels: Ids
    tokens: int

    @property
    def learned(self) -> int:
        """Tokens that are learned."""
        return len(self.labels)


class Order:
    """The samples of every step of a run.

    Args:
        count: samples.
        step_size: samples of a step, over all processes; the last step of an epoch may have fewer.
        seed: of the shuffling.
    """

    def __init__(self, count: int, step_size: int, seed: int) -> None:
        self._count, self._size, self._seed = count, step_size, seed
        self.steps_per_epoch = -(-count // step_size)
        self._known: tuple[int, npt.NDArray[np.int64]] | None = None

    def step(self, number: int) -> npt.NDArray[np.int64]:
        """The samples of a step, counted from 0 over all epochs."""
        epoch, place = divmod(number, self.steps_per_epoch)
        if self._known is None or self._known[0] != epoch:
            rng = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            self._known = (epoch, rng.permutation(self._count))
        return self._known[1][place * self._size : (place + 1) * self._size]


def deal(lengths: npt.NDArray[Any], processes: int) -> list[list[int]]:
    """Share the samples of a step out so that no process has long to wait for another.

    The longest first, each to the process with the fewest tokens.

    Args:
        lengths: tokens of each sample, (N,).
        processes: that take them.

    Returns:
        for each process its samples, as places in `lengths`, in their order.

    Source: Graham 1969, "Bounds on multiprocessing timing anomalies".
    """
    taken: list[list[int]] = [[] for _ in range(processes)]
    tokens = [0] * processes
    for place in np.argsort(-lengths, kind="stable").tolist():
        least = tokens.index(min(tokens))
        taken[least].append(place)
        tokens[least] += int(lengths[place])
    return [sorted(places) for places in taken]


def passes_of(samples: Samples, numbers: Sequence[int] | npt.NDArray[np.int64], pass_tokens: int) -> Iterator[Pass]:
    """Cut samples into passes of at most `pass_tokens` tokens, in order; a longer sample is one by itself."""
    lengths = samples.lengths
    taken: list[int] = []
    shared = total = 0  # tokens in common; all tokens, each sample counted by itself
    for number in map(int, numbers):
        length = int(lengths[number])
        together = common(samples, taken[0], number, shared) if taken else length
        if taken and total + length - len(taken) * together > pass_tokens:
            yield make_pass(samples, taken)
            taken, together, total = [], length, 0
        taken.append(number)
        shared, total = together, total + length
    if taken:
        yield make_pass(samples, taken)


def common(samples: Samples, one: int, other: int, most: int) -> int:
    """How many tokens, at most `most`, two samples have in common at their beginning, before any learned one."""
    (ids, labels), (more, more_labels) = samples.sample(one), samples.sample(other)
    count = min(most, len(ids) - 1, len(more) - 1)
    differs = (ids[:count] != more[:count]) | (labels[1 : count + 1] >= 0) | (more_labels[1 : count + 1] >= 0)
    return int(differs.argmax()) if differs.any() else count


def make_pass(samples: Samples, numbers: Sequence[int]) -> Pass:
    """Lay samples out one after the other; what comes after the last learned token is left away.

    What all of them begin with stands once, in front, and the samples go on after it: conversations with MOSS begin
    with the same thousand characters.
    """
    shared = len(samples.sample(numbers[0])[0])
    for number in numbers[1:]:
        shared = common(samples, numbers[0], number, shared)
    shared = shared if len(numbers) > 1 else 0
    ids, follow, lengths = [samples.sample(numbers[0])[0][:shared]], [np.full(shared, NOT_LEARNED, np.int32)], [shared]
    for number in numbers:
        tokens, labels = samples.sample(number)
        end = int(np.flatnonzero(labels[1:] != NOT_LEARNED)[-1]) + 1
        ids.append(tokens[shared:end])
        follow.append(labels[shared + 1 : end + 1])
        lengths.append(end - shared)
    slots = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    starts = [0, *[shared] * len(numbers)]
    positions = np.concatenate(
        [np.arange(first, first + n, dtype=np.int32) for first, n in zip(starts, lengths, strict=True)]
    )
    after = np.concatenate(follow)
    wanted = np.flatnonzero(after != NOT_LEARNED).astype(np.int32)
    total = sum(len(samples.sample(number)[0]) for number in numbers)
    return Pass(Batch(np.concatenate(ids), slots, positions, wanted), after[wanted], total)


def learned_tokens(samples: Samples, numbers: npt.NDArray[np.int64]) -> int:
    """Tokens of these samples that are learned."""
    return sum(int((samples.sample(int(number))[1][1:] != NOT_LEARNED).sum()) for number in numbers)
