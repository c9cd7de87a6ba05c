"""What rounding activations costs: fast compute against the arrays that the original MOSS computed.

`pytest -rP tests/test_fast.py` shows the errors, set by set.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moss_jt.load import load_model
from moss_jt.runner import Model

Load = Callable[[str], Model]
Arrays = dict[str, npt.NDArray[Any]]

INT = (
    "tiny-int4/g32",
    "tiny-int4/g128",
    "tiny-int4/g32-actorder",
    "tiny-int8/g32",
    "tiny-int8/g128",
    "tiny-int8/g128-actorder",
)


def errors(model: Model, want: Arrays) -> npt.NDArray[np.float64]:
    """Differences of all logits from the original's."""
    keys = [key for key in ("b0", "b1", "b2", "b3") if key + "_ids" in want]
    pairs = [(model.logits(want[key + "_ids"]), want[key + "_logits"]) for key in keys]
    return np.concatenate([(got.astype(np.float64) - logits).ravel() for got, logits in pairs])


def greedy(want: Arrays) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]]:
    """Prompt, answer and the lead of each of its tokens over the second best, of every greedy answer."""
    numbers = [key.split("_")[1] for key in want if key.startswith("greedy_") and key.endswith("_margin")]
    assert numbers, "the set has no greedy answers"
    return [(want[f"greedy_{n}_prompt"], want[f"greedy_{n}_out"], want[f"greedy_{n}_margin"]) for n in numbers]


@pytest.mark.parametrize("name", INT)
def test_error_and_greedy_tokens(name: str, golden: Path, golden_model: Load) -> None:
    """A token may change only where it led by less than the largest error of the set.

    Half a step of a block of 128 normal numbers is 1.1 % of their size, and evenly distributed errors are
    0.58 of that: 0.6 % for each of the 8 products, about 1.7 % together.
    """
    want = dict(np.load(golden / name / "expected.npz"))
    model = load_model(golden_model(name).path, compute="fast")
    difference = errors(model, want)
    largest, usual = float(np.abs(difference).max()), float(np.sqrt((difference**2).mean()))
    size = float(want["b2_logits"].std())
    changed = led = 0
    for prompt, answer, margin in greedy(want):
        logits = model.logits(np.concatenate([prompt, answer[:-1]]))[0, len(prompt) - 1 :]
        same = logits.argmax(axis=1) == answer
        assert same[margin > largest].all(), f"a token that led by {margin[~same].max():.3f} changed"
        changed += int((~same).sum())
        led += int((margin > largest).sum())
    print(f"{name}: logits of size {size:.2f} off by {usual:.4f} (rms), {largest:.3f} at most;")
    print(f"  {led} greedy tokens lead by more, none changed; {changed} of the others did")
    assert 0 < usual < 0.03 * size
    assert led > 40
