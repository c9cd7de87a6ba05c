"""The training loop.

A step takes samples, computes loss and gradients pass by pass, adds the gradients up in flat memory, exchanges them
with the other processes, clips, and lets AdamW change the values. The loss of a step is the mean over all its
learned tokens, however they are shared out over passes, batches and processes.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moss_jt import startup
from moss_jt.errors import ConfigError
from moss_jt.finetune import checkpoint
from moss_jt.finetune.batches import Order, Pass, deal, learned_tokens, passes_of
from moss_jt.finetune.data import Samples
from moss_jt.finetune.interrupts import held_back, terminating
from moss_jt.finetune.optimizer import AdamW
from moss_jt.finetune.parameters import Floats, Parameters
from moss_jt.finetune.schedule import rate_factor
from moss_jt.finetune.settings import TrainSettings
from moss_jt.language import pick
from moss_jt.model import Moss
from moss_jt.ops_grad import LossOps
from moss_jt.progress import Progress, Quiet

Scalars = dict[str, float]


class Team(Protocol):
    """The processes that train together."""

    rank: int
    size: int

    def add_up(self, values: npt.NDArray[Any]) -> None:
        """Replace values, in place, by their sum over all processes."""
        ...


class Alone:
    """One process."""

    rank, size = 0, 1

    def add_up(self, values: npt.NDArray[Any]) -> None:
        """Nothing to add."""


class Log(Protocol):
    """Where figures go."""

    def write(self, step: int, figures: Scalars) -> None:
        """Note figures of a step."""
        ...


class NoLog:
    """Nowhere."""

    def write(self, step: int, figures: Scalars) -> None:
        """Forget them."""


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and where it is kept.

    Attributes:
        network: the model, perhaps with low-rank terms.
        make_ops: given Vars of the parameters, the steps over them.
        parameters: what is trained.
        training, validation: data; validation may be None.
        folder: of checkpoints; None keeps none.
        identity: what else than settings and data must be the same for a run to go on.
    """

    network: Moss[Any]
    make_ops: Callable[[dict[str, Any]], LossOps]
    parameters: Parameters
    training: Samples
    validation: Samples | None = None
    folder: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sums:
    """What passes gave together.

    Attributes:
        loss: summed with the tokens' weights.
        right: tokens foretold rightly.
        tokens: of the samples, learned or not.
    """

    loss: float = 0.0
    right: int = 0
    tokens: int = 0


class Trainer:
    """Trains a job; `run` goes on from where it stands.

    Attributes:
        done: steps done.
        total: steps of the whole run.
    """

    def __init__(
        self,
        job: Job,
        settings: TrainSettings,
        *,
        team: Team | None = None,
        log: Log | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.job, self.settings = job, settings
        self.team, self.log, self.progress = team or Alone(), log or NoLog(), progress or Quiet()
        self._jt = startup.import_jittor(device="cpu")
        step_size = settings.batch_size * settings.accumulation * self.team.size
        self.order = Order(len(job.training), step_size, settings.seed)
        self.total = self.order.steps_per_epoch * settings.epochs
        if settings.max_steps:
            self.total = min(self.total, settings.max_steps)
        self.done = 0
        self._optimizer = AdamW(job.parameters, settings)
        self._kept = 0  # steps of the newest checkpoint
        self._is_whole = True  # not within the change of the values
        self._trained: list[str] = []
        self._ops: LossOps | None = None

    def run(self, until: int | None = None) -> Scalars:
        """Train to the end, or to a step; gives the last figures of training and validation.

        An interrupt (Ctrl-C, SIGTERM) stops it at once, but for the time that a checkpoint of the steps done takes; a
        second one does not wait for that.

        Raises:
            ConfigError: gradients are not numbers.
            DiskError: the disk is full or fails.
        """
        end = self.total if until is None else min(until, self.total)
        figures: Scalars = {}
        self.progress.begin(pick("Training", "训练"), end - self.done, pick("steps", "步"))
        with terminating():
            try:
                while self.done < end:
                    figures |= self.step()
                    figures |= self._between_steps(is_last=self.done == self.total)
                    self.progress.advance(1)
            except KeyboardInterrupt:
                if self._is_whole and self.done > self._kept:
                    self.save()
                raise
            finally:
                self.progress.end()
        return figures

    def _between_steps(self, *, is_last: bool) -> Scalars:
        settings, found = self.settings, Scalars()
        if self.job.validation is not None and (is_last or _is_due(self.done, settings.eval_step)):
            found = self.validate()
            self.log.write(self.done, found)
        if is_last or _is_due(self.done, settings.save_step):
            self.save()
        return found

    def step(self) -> Scalars:
        """One step; its figures."""
        settings, began = self.settings, time.monotonic()
        numbers = self.order.step(self.done)
        total = learned_tokens(self.job.training, numbers)
        self._take_up(self.trained_at(self.done))
        mine = numbers[deal(self.job.training.lengths[numbers], self.team.size)[self.team.rank]]
        sums = self._gradients(list(passes_of(self.job.training, mine, settings.pass_tokens)), total)
        names = self._trained
        norm = self._optimizer.gradient_norm(names)
        if not math.isfinite(norm):
            raise ConfigError(
                f"the gradients of step {self.done + 1} are not numbers any more; its values are not taken, and earlier "
                "checkpoints are kept. Train again into another --output_dir with a smaller --learning_rate."
            )
        scale = min(1.0, settings.clip / (norm + 1e-6)) if settings.clip else 1.0
        rate = settings.learning_rate * rate_factor(
            self.done, warmup_steps=round(settings.warmup * self.total), total_steps=self.total
        )
        ages = {name: self.done + 1 - self.first_step(name) for name in names}
        with held_back():
            self._is_whole = False
            self._optimizer.step(ages, learning_rate=rate, scale=scale)
            self.done += 1
            self._is_whole = True
        seconds = time.monotonic() - began
        figures = {
            "loss": sums.loss,
            "acc": sums.right / total,
            "lr": rate,
            "grad_norm": norm,
            "tokens_per_s": sums.tokens / seconds,
        }
        self.log.write(self.done, figures)
        return figures

    def _gradients(self, passes: Sequence[Pass], total: int) -> Sums:
        """Loss and gradients of a step, added up over passes and processes."""
        flat = self.job.parameters.gradients
        flat[:] = 0
        loss, right, tokens = 0.0, 0, 0
        for one in passes:
            self._pass(one, np.full(one.learned, 1.0 / total, np.float32), flat)
            score = self.ops.score
            loss, right, tokens = loss + score.loss, right + score.right, tokens + one.tokens
        self.team.add_up(flat)
        return self._shared(Sums(loss, right, tokens))

    def _pass(self, one: Pass, weights: Floats, into: Floats) -> None:
        """Add the gradients of a pass."""
        ops = self.ops
        ops.labels, ops.weights = one.labels, weights
        loss = self.job.network.execute(ops, one.batch)
        found = self._jt.grad(loss, [ops.parameters[name] for name in self._trained])
        self._jt.sync(found)
        for name, gradient in zip(self._trained, found, strict=True):
            place = self.job.parameters.slots[name].of(into)
            place += gradient.data
        del loss, found

    def validate(self) -> Scalars:
        """Mean loss and share of tokens foretold rightly, on the validation data."""
        assert self.job.validation is not None, "there is validation data"
        self._take_up(self._trained or self.trained_at(self.done))
        count = len(self.job.validation)
        total = learned_tokens(self.job.validation, np.arange(count))
        sums = Sums()
        with self._jt.no_grad():
            for one in passes_of(
                self.job.validation, range(self.team.rank, count, self.team.size), self.settings.pass_tokens
            ):
                ops = self.ops
                ops.labels, ops.weights = one.labels, np.full(one.learned, 1.0 / total, np.float32)
                self.job.network.execute(ops, one.batch).sync()
                sums = Sums(sums.loss + ops.score.loss, sums.right + ops.score.right)
        sums = self._shared(sums)
        return {"val_loss": sums.loss, "val_acc": sums.right / total}

    def _shared(self, sums: Sums) -> Sums:
        """The sums of all processes."""
        values = np.array([sums.loss, sums.right, sums.tokens], np.float64)
        self.team.add_up(values)
        return Sums(float(values[0]), int(values[1]), int(values[2]))

    @property
    def ops(self) -> LossOps:
        """The steps over the parameters as they are trained now."""
        assert self._ops is not None, "something is trained"
        return self._ops

    def _take_up(self, trained: list[str]) -> None:
        """From now on train these."""
        if self._ops is None or trained != self._trained:
            self._trained = trained
            self._ops = self.job.make_ops(self.job.parameters.variables(trained))

    def first_step(self, name: str) -> int:
        """The step from which a tensor is trained: layers thaw one after the other from the top, if so set."""
        every = self.settings.unfreeze_every
        layer = _layer_of(name)
        return 0 if not every or layer is None else every * (self.job.network.config.n_layer - layer)

    def trained_at(self, step: int) -> list[str]:
        """The tensors that a step trains."""
        return [name for name in self.job.parameters.slots if self.first_step(name) <= step]

    def save(self) -> Path | None:
        """Write a checkpoint, where the job has a folder and this is the first process."""
        if self.job.folder is None or self.team.rank:
            return None
        state = checkpoint.State(self.done, self._identity())
        path = checkpoint.save(self.job.folder, self.job.parameters, state, keep=self.settings.keep)
        self._kept = self.done
        return path

    def resume(self) -> bool:
        """Go on from the newest checkpoint; False where there is none.

        Raises:
            ConfigError: it was made with other settings or data.
            CheckpointError: it is broken.
        """
        found = checkpoint.checkpoints(self.job.folder) if self.job.folder is not None else []
        if not found:
            return False
        self.done = self._kept = checkpoint.load(found[-1], self.job.parameters, self._identity()).step
        return True

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on as if it had not stopped."""
        free = ("eval_step", "save_step", "keep", "pass_tokens", "recompute", "max_steps")
        settings = {key: value for key, value in self.settings.to_dict().items() if key not in free}
        told = {**settings, "steps": self.total, "processes": self.team.size, "data": self._data_hash}
        return {**told, **self.job.identity}

    @cached_property
    def _data_hash(self) -> str:
        """Of the training data; taken from where they lie, since they may be most of the memory."""
        data = hashlib.sha256(self.job.training.ids.data)
        data.update(self.job.training.labels.data)
        return data.hexdigest()[:16]


def _is_due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["transformer", "h"] else None
