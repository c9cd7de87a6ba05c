"""The learning rate: it rises evenly, then falls along a cosine to 0."""

from __future__ import annotations

import math


def rate_factor(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """The share of the highest learning rate that step `step` (from 0) takes; step 0 of a warm-up takes none."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))
