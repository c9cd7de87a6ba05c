"""Which samples a step takes, and how they are laid out: flat, one after the other, without padding.

The order of an epoch depends on the seed and the epoch alone, so a run can go on anywhere, and every process
knows what the others compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
        batch: all their tokens; wanted are those that a learned token follows.
        labels: what follows the wanted tokens, (R,) int32.
    """

    batch: Batch
    labels: Ids

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


def passes_of(samples: Samples, numbers: Sequence[int] | npt.NDArray[np.int64], pass_tokens: int) -> Iterator[Pass]:
    """Cut samples into passes of at most `pass_tokens` tokens, in order; a longer sample is one by itself."""
    lengths = samples.lengths
    taken: list[int] = []
    size = 0
    for number in numbers:
        if taken and size + lengths[number] > pass_tokens:
            yield make_pass(samples, taken)
            taken, size = [], 0
        taken.append(int(number))
        size += int(lengths[number])
    if taken:
        yield make_pass(samples, taken)


def make_pass(samples: Samples, numbers: Sequence[int]) -> Pass:
    """Lay samples out one after the other; what comes after the last learned token is left away."""
    parts: list[tuple[Ids, Ids]] = []
    for number in numbers:
        ids, labels = samples.sample(number)
        end = int(np.flatnonzero(labels[1:] != NOT_LEARNED)[-1]) + 1
        parts.append((ids[:end], labels[1 : end + 1]))
    lengths = [len(ids) for ids, _ in parts]
    follow = np.concatenate([labels for _, labels in parts])
    wanted = np.flatnonzero(follow != NOT_LEARNED).astype(np.int32)
    slots = np.repeat(np.arange(len(parts), dtype=np.int32), lengths)
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    return Pass(Batch(np.concatenate([ids for ids, _ in parts]), slots, positions, wanted), follow[wanted])


def learned_tokens(samples: Samples, numbers: npt.NDArray[np.int64]) -> int:
    """Tokens of these samples that are learned."""
    return sum(int((samples.sample(int(number))[1][1:] != NOT_LEARNED).sum()) for number in numbers)
