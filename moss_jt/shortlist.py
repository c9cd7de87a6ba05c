"""Choosing the next id from a few candidates that a device found, as from all logits.

Where a request keeps the `top_k` best tokens, or takes the best, the rest of the vocabulary plays no part. A device
masks and penalises its logits itself and gives what may come into question (kernels/shortlist.cu); what
`moss_jt.sampling` does afterwards is the same, on fewer scores, and gives the same id for the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moss_jt import sampling
from moss_jt.config import GenerationConfig

MOST = 512  # candidates that the kernel gives
_MOST_WANTED = 256
_HOTTEST = 1e3  # a temperature that leaves scores apart which differ by more than rounding

FOUND = np.dtype(
    [
        ("count", np.int32),
        ("is_broken", np.int32),
        ("best", np.float32),
        ("mass", np.float32),
        ("ids", np.int32, (MOST,)),
        ("scores", np.float32, (MOST,)),
    ]
)  # `Found` of the kernel


@dataclass(frozen=True)
class Wish:
    """What is to become of a row of logits.

    Attributes:
        history: the ids so far, prompt included.
        config: how to choose.
    """

    history: Sequence[int]
    config: GenerationConfig

    @property
    def wanted(self) -> int:
        """So many of the best scores decide; 0 where all of them may."""
        if self.config.repetition_penalty != 1.0 and not np.float32(self.config.repetition_penalty):
            return 0
        if self.config.greedy:
            return 1
        if self.config.temperature > _HOTTEST:
            return 0
        return self.config.top_k if 0 < self.config.top_k <= _MOST_WANTED else 0


@dataclass(frozen=True)
class Shortlist:
    """The candidates of a row, scores after masking and penalty.

    Attributes:
        ids: (n,) ascending.
        scores: (n,) float32.
        mass: the sum of exp(score - the best) over the whole vocabulary.
        is_broken: a logit was not a number; the rest then means nothing.
    """

    ids: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]
    mass: float
    is_broken: bool = False


def read_found(found: npt.NDArray[np.void], read_scores: Callable[[], npt.NDArray[np.float32]]) -> Shortlist:
    """The shortlist of one row of what the kernel gave.

    Args:
        found: of type FOUND, without a dimension.
        read_scores: fetches all scores of the row, where more came into question than the kernel gives.
    """
    count, mass, is_broken = int(found["count"]), float(found["mass"]), bool(found["is_broken"])
    if is_broken or count > MOST:
        scores = read_scores()
        return Shortlist(np.arange(len(scores), dtype=np.int32), scores, mass, is_broken)
    ids = found["ids"][:count]
    order = np.argsort(ids)
    return Shortlist(ids[order], found["scores"][:count][order], mass)


def choose_from(shortlist: Shortlist, config: GenerationConfig, rng: np.random.Generator) -> tuple[int, float]:
    """The next id and the logarithm of its probability, as `sampling.choose` gives them."""
    if config.greedy:
        return int(shortlist.ids[shortlist.scores.argmax()]), -math.log(shortlist.mass)
    place, log_probability = sampling.choose(sampling.narrow(shortlist.scores.copy(), config), config, rng)
    return int(shortlist.ids[place]), log_probability
