"""Logits to the next id, in numpy.

`process` turns the logits of one step into scores, in the order of transformers' processors:
repetition penalty, then temperature, top-k and top-p (these three only where a token is drawn). What
is removed has -inf. The steps of the chain change the row that they are given and return it; `process`
gives them a copy. `choose` takes the best score or draws one.

A draw uses one number of its generator, whatever the scores are, and looks at one row only: with a
generator per sequence, the answer to a prompt depends on its seed and not on what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from moss_jt.config import GenerationConfig
from moss_jt.errors import ShapeError

Scores = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
History = Sequence[int] | npt.NDArray[np.integer[Any]]

_REMOVED = np.float32(-np.inf)
_MAX = float(np.finfo(np.float32).max)
_FIRST_LOOK = 256  # top-p rarely keeps more tokens than this
_BLOCK = 64


def process(
    logits: npt.ArrayLike,
    history: History | Sequence[History],
    config: GenerationConfig,
    *,
    allowed: Mask | None = None,
) -> Scores:
    """Turn logits into scores for `choose`.

    Args:
        logits: (V,) or (B, V); not changed.
        history: the ids so far, prompt included; for (B, V), one such sequence a row. Ids outside
            the vocabulary are passed over.
        config: how to choose.
        allowed: (V,), False for ids that must not come out, such as those without a token.

    Returns:
        A new float32 array of the same shape; -inf for removed ids.

    Raises:
        ShapeError: shapes do not fit, a row has a logit that is not a number, or nothing is left of it.
    """
    scores = np.array(logits, dtype=np.float32)
    if scores.ndim not in (1, 2) or not scores.size:
        raise ShapeError(f"logits have shape {scores.shape}; wanted is (V,) or (B, V), not empty.")
    if allowed is not None and allowed.shape != scores.shape[-1:]:
        raise ShapeError(f"the mask of allowed ids has shape {allowed.shape}; the logits ask for {scores.shape[-1:]}.")
    if scores.ndim == 1:
        return _process_row(scores, history, config, allowed)  # type: ignore[arg-type]
    if len(history) != len(scores):
        raise ShapeError(f"there are {len(history)} histories for {len(scores)} rows of logits; wanted is one a row.")
    for row, ids in zip(scores, cast("Sequence[History]", history), strict=True):
        row[:] = _process_row(row, ids, config, allowed)
    return scores


def _process_row(scores: Scores, history: History, config: GenerationConfig, allowed: Mask | None) -> Scores:
    """One row; may change `scores`."""
    if allowed is not None:
        scores[~allowed] = _REMOVED
    if not np.isfinite(scores.max()):
        raise ShapeError(
            f"the largest of {scores.size} logits is {scores.max()}; wanted is a number. Are the weights whole?"
            " `moss-convert verify` checks them."
        )
    scores = penalize_repetition(scores, history, config.repetition_penalty)
    return scores if config.greedy else narrow(scores, config)


def narrow(scores: Scores, config: GenerationConfig) -> Scores:
    """What comes after the penalty where a token is drawn: temperature, top-k and top-p of one row; may change it."""
    scores = apply_temperature(scores, config.temperature)
    scores = keep_top_k(scores, config.top_k)
    return keep_top_p(scores, config.top_p)


def penalize_repetition(scores: Scores, history: History, penalty: float) -> Scores:
    """Make tokens of the history less likely (penalty > 1), each once: multiply below 0, else divide."""
    if penalty == 1.0 or not len(history):
        return scores
    ids = np.asarray(history, dtype=np.int64)
    ids = ids[(ids >= 0) & (ids < scores.size)]
    ids = ids[scores[ids] > _REMOVED]
    seen = scores[ids].astype(np.float64)
    factor = float(np.float32(penalty)) or penalty  # rounded as transformers does
    with np.errstate(over="ignore"):
        scores[ids] = np.clip(np.where(seen < 0, seen * factor, seen / factor), -_MAX, _MAX)
    return scores


def apply_temperature(scores: Scores, temperature: float) -> Scores:
    """Divide by the temperature; where that leaves the range of float32, only the best remain."""
    if temperature == 1.0:
        return scores
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        divided: Scores = np.divide(scores, np.float32(temperature))
    if np.isfinite(divided.max()):
        return divided
    return np.where(scores == scores.max(), np.float32(0), _REMOVED)


def keep_top_k(scores: Scores, top_k: int) -> Scores:
    """Keep the `top_k` best and whatever ties with the last of them; 0 keeps all."""
    if not 0 < top_k < scores.size:
        return scores
    scores[scores < _largest(scores, top_k)[-1]] = _REMOVED
    return scores


def keep_top_p(scores: Scores, top_p: float) -> Scores:
    """Keep the smallest set of best tokens whose probability passes `top_p`; 1.0 keeps all.

    Among equals the lower id comes first. The best token always stays.
    """
    if top_p >= 1.0:
        return scores
    values = scores[scores > _REMOVED]
    best = values.max()
    limit = top_p * float(_weights(values, best).sum(dtype=np.float64))
    for count in (_FIRST_LOOK, values.size):
        head = _largest(values, min(count, values.size))
        passed = np.cumsum(_weights(head, best), dtype=np.float64) > limit
        if passed.any():
            break
    kept = int(passed.argmax()) + 1 if passed.any() else head.size
    last = head[kept - 1]
    ties = np.flatnonzero(scores == last)
    beyond = ties[kept - int(np.count_nonzero(head[:kept] > last)) :]
    scores[scores < last] = _REMOVED
    scores[beyond] = _REMOVED
    return scores


def _weights(scores: Scores, best: np.float32) -> Scores:
    """Probabilities before they are divided by their sum; `best` is the largest score."""
    with np.errstate(over="ignore"):
        weights: Scores = np.exp(scores - best)
    return weights


def _largest(values: Scores, count: int) -> Scores:
    """The `count` largest values, the largest first."""
    blocks = values.size // _BLOCK
    if 4 * count <= blocks:
        # The count-th largest of the blocks' maxima is a bound that `count` values reach: few are left to sort.
        maxima = values[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
        values = values[values >= np.partition(maxima, blocks - count)[blocks - count]]
    if 4 * count <= values.size:
        values = np.partition(values, values.size - count)[values.size - count :]
    return np.sort(values)[::-1][:count]


def choose(scores: Scores, config: GenerationConfig, rng: np.random.Generator) -> tuple[int, float]:
    """Take the next id from the scores of one row.

    Args:
        scores: (V,), as `process` gives them.
        config: greedy takes the best score, the lowest id among equals; else a draw.
        rng: of this sequence alone; a draw takes one number from it.

    Returns:
        The id, and the logarithm of its probability among the scores.
    """
    best = int(scores.argmax())
    if config.greedy:
        return best, -math.log(_weights(scores, scores[best]).sum(dtype=np.float64))
    kept = np.flatnonzero(scores > _REMOVED)
    weights = _weights(scores[kept], scores[best])
    sums = np.cumsum(weights, dtype=np.float64)
    at = min(int(np.searchsorted(sums, rng.random() * sums[-1], side="right")), kept.size - 1)
    return int(kept[at]), float(scores[kept[at]]) - float(scores[best]) - math.log(sums[-1])


def model_scores(
    logits: npt.ArrayLike, chosen: int, count: int, *, allowed: Mask | None = None
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Tell what the model itself thought of a token and of the best ones.

    Args:
        logits: (V,); not changed.
        chosen: the id that came out.
        count: how many of the best to name; among equals the lower id comes first.
        allowed: as for `process`; ids that cannot come out have no share.

    Returns:
        The logarithm of the chosen one's probability, and (id, logarithm) of the best.
    """
    values = np.array(logits, dtype=np.float64)
    if allowed is not None:
        values[~allowed] = -np.inf
    values -= values.max()
    values -= math.log(np.exp(values).sum())
    best = np.flatnonzero(values >= np.partition(values, -count)[-count]) if count else np.zeros(0, np.int64)
    best = best[np.lexsort((best, -values[best]))][:count]
    return float(values[chosen]), tuple((int(i), float(values[i])) for i in best if np.isfinite(values[i]))


def step_rng(seed: int, step: int) -> np.random.Generator:
    """The generator of one step, for a caller that keeps no generator per sequence."""
    return np.random.default_rng((seed & (1 << 64) - 1, step))
