"""AdamW over flat memory, in place.

Decay is for matrices: not for biases, and not for the weights of norms unless asked, as the original does it (its
rule looks for "LayerNorm.weight", and MOSS's norms are called ln_1 and ln_f).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from moss_jt.finetune.parameters import Parameters
from moss_jt.finetune.settings import TrainSettings
from moss_jt.launch import run_training, share

_ADAMW = """
    moss_training::adamw(in0_p, out0_p, out1_p, out2_p, out0->num, data["scale"], data["keep"], data["rate"],
        data["root"], data["beta1"], data["beta2"], data["eps"]);
"""
_SQUARES = "*(double*)out0_p = moss_training::sum_squares(in0_p, in0->num);"


def is_decayed(name: str, *, decay_norms: bool) -> bool:
    """Whether weight decay is for this tensor."""
    return "bias" not in name and (decay_norms or ".ln_" not in name)


class AdamW:
    """The optimizer of some parameters.

    Args:
        parameters: whose values are changed, by their gradients.
        settings: of the run.
    """

    def __init__(self, parameters: Parameters, settings: TrainSettings) -> None:
        self.parameters, self.settings = parameters, settings
        flats = (parameters.gradients, parameters.values, *parameters.moments)
        self._shared = {name: [share(slot.of(flat)) for flat in flats] for name, slot in parameters.slots.items()}

    def gradient_norm(self, names: Iterable[str]) -> float:
        """The length of the gradient over these tensors."""
        total = 0.0
        for name in names:
            found = np.zeros(2, np.float32)
            run_training(_SQUARES, [self._shared[name][0]], [share(found)], {})
            total += float(found.view(np.float64)[0])
        return math.sqrt(total)

    def step(self, ages: dict[str, int], *, learning_rate: float, scale: float) -> None:
        """Change values.

        Args:
            ages: for each tensor that is trained, which step of its own this is, from 1.
            learning_rate: of this step.
            scale: of the gradients.
        """
        settings = self.settings
        beta1, beta2 = settings.betas
        for name, age in ages.items():
            decayed = is_decayed(name, decay_norms=settings.decay_norms)
            gradient, value, first, second = self._shared[name]
            numbers = {
                "scale": scale,
                "keep": 1.0 - learning_rate * (settings.weight_decay if decayed else 0.0),
                "rate": learning_rate / (1.0 - beta1**age),
                "root": 1.0 / math.sqrt(1.0 - beta2**age),
                "beta1": beta1,
                "beta2": beta2,
                "eps": settings.eps,
            }
            run_training(_ADAMW, [gradient], [value, first, second], numbers)
