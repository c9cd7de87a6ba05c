"""How a training run goes: one frozen value, checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moss_jt.errors import ConfigError


@dataclass(frozen=True)
class DataSettings:
    """How data becomes tokens and labels.

    Attributes:
        max_length: tokens of a sample at most; conversations end with the last turn that fits whole.
        original: as the original's finetune_moss.py: human turns are learned too, and results from their sixth
            token on are not; markers anywhere in a text are tokens; white space beside added tokens may be lost.
        quality: put the score of an answer before it, where the data has one.
    """

    max_length: int = 2048
    original: bool = False
    quality: bool = False

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ConfigError(f"max_length is {self.max_length}; a sample needs at least 2 tokens.")


@dataclass(frozen=True)
class TrainSettings:
    """The numbers of a run. The defaults are those of the original.

    Attributes:
        epochs: times that the data is gone through.
        batch_size: conversations of a step, on each process, before accumulation.
        accumulation: such batches that make one step.
        learning_rate: the highest.
        warmup: share of the steps in which the rate rises from 0.
        weight_decay: of matrices; of the weights of norms too with `decay_norms`, as the original does.
        betas, eps: of AdamW.
        clip: largest norm of the gradient; 0 for no limit.
        seed: of the order of the data and of new weights.
        max_steps: stop after so many steps, 0 for the end of the epochs.
        eval_step: steps from one validation to the next; 0 for the end only.
        save_step: steps from one checkpoint to the next; 0 for the end only.
        keep: checkpoints that are kept.
        pass_tokens: tokens that are computed at once; larger batches are cut into passes.
        recompute: keep only what enters each block, and compute blocks twice: less memory, a third more time.
        unfreeze_every: embedding, head and last norm are trained from the start, and every so many steps one
            more layer from the top; 0 trains everything from the start.
    """

    epochs: int = 2
    batch_size: int = 4
    accumulation: int = 1
    learning_rate: float = 9e-6
    warmup: float = 0.05
    weight_decay: float = 0.1
    decay_norms: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 1.0
    seed: int = 42
    max_steps: int = 0
    eval_step: int = 200
    save_step: int = 2000
    keep: int = 2
    pass_tokens: int = 4096
    recompute: bool = False
    unfreeze_every: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation", "keep", "pass_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("max_steps", "eval_step", "save_step", "seed", "clip", "weight_decay", "unfreeze_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        if not 0 < self.learning_rate < float("inf"):
            raise ConfigError(f"learning_rate is {self.learning_rate}; it must be above 0.")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup is {self.warmup}; it is a share of the steps, from 0 to 1.")

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "betas": list(self.betas)}
