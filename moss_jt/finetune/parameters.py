"""What is trained: float32 tensors side by side in flat memory, with their gradients and moments.

Each tensor is a numpy array and a Jittor Var on the same memory, so that the optimizer works in place,
a checkpoint is a few writes, and processes exchange all gradients at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.launch import aligned, share

Var = Any
Floats = npt.NDArray[np.float32]

_CACHE_LINE = 16  # floats


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in flat memory."""

    start: int
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Its numbers."""
        return int(np.prod(self.shape))

    def of(self, flat: Floats) -> Floats:
        """The tensor within flat memory."""
        return flat[self.start : self.start + self.count].reshape(self.shape)


class Parameters:
    """Trainable tensors by name.

    Attributes:
        slots: where each lies.
        values, gradients: flat memory; gradients of tensors that are not trained yet are not defined.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.slots: dict[str, Slot] = {}
        end = 0
        for name, shape in shapes.items():
            self.slots[name] = slot = Slot(end, tuple(shape))
            end += -(-slot.count // _CACHE_LINE) * _CACHE_LINE
        self.values = aligned((end,), "float32")
        self.gradients = aligned((end,), "float32")

    @cached_property
    def moments(self) -> tuple[Floats, Floats]:
        """Running means of the gradient and of its square, flat."""
        return aligned(self.values.shape, "float32"), aligned(self.values.shape, "float32")

    @property
    def count(self) -> int:
        """All numbers."""
        return sum(slot.count for slot in self.slots.values())

    def array(self, name: str) -> Floats:
        """A tensor's values."""
        return self.slots[name].of(self.values)

    def arrays(self) -> dict[str, Floats]:
        """All values by name."""
        return {name: slot.of(self.values) for name, slot in self.slots.items()}

    def variables(self, trained: Iterable[str]) -> dict[str, Var]:
        """Vars on the values; those not in `trained` take no gradients."""
        chosen = set(trained)
        made = {name: share(slot.of(self.values)) for name, slot in self.slots.items()}
        return {name: var if name in chosen else var.stop_grad() for name, var in made.items()}
