"""What keeping keys and values in fewer bits costs, on the models whose logits the original computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moss_jt.cache import KVType
from moss_jt.checkpoint import Checkpoint
from moss_jt.runner import Model

Load = Callable[[str], Model]
Arrays = dict[str, npt.NDArray[Any]]

# The largest logit of these is 9. int8 rounds a number to one part in 254 of the largest of its group, half to one in 2048.
ALLOWED: dict[KVType, float] = {"float16": 0.02, "int8": 0.2}
NAMES = ("tiny-fp/safetensors-fp16", "tiny-fp-h8/bin-single", "tiny-int4/g32-actorder", "tiny-int8/g128")


def expected(golden: Path, name: str) -> Arrays:
    folder = golden / name
    path = folder / "expected.npz"
    return dict(np.load(path if path.is_file() else folder.parent / "expected.npz"))


def largest_error(model: Model, want: Arrays) -> float:
    """Over all sequences with known logits."""
    keys = [key for key in ("b0", "b1", "b2", "b3") if key + "_ids" in want]
    return max(float(np.abs(model.logits(want[key + "_ids"]) - want[key + "_logits"]).max()) for key in keys)


def greedy_answers(want: Arrays) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]]:
    """(prompt, answer, by how much each token of the answer was ahead of the next best)."""
    for key in want:
        if key.startswith("greedy_") and key.endswith("_prompt") and "rep" not in key:
            name = key.removesuffix("_prompt")
            yield want[key].astype(int), want[name + "_out"].astype(int), want[name + "_margin"]


@pytest.mark.parametrize("kind", ALLOWED)
@pytest.mark.parametrize("name", NAMES)
def test_small_types_change_logits_little(kind: KVType, name: str, golden: Path, golden_model: Load) -> None:
    """And the best token only where the second best was as near as the error."""
    exact, want = golden_model(name), expected(golden, name)
    model = Model(Checkpoint.open(exact.path), exact.store, compute="exact", device="cpu", max_tokens=None, kv=kind)
    error = largest_error(model, want)
    assert 1e-4 < error <= ALLOWED[kind], f"{name} with {kind}: off by {error:.2e}"
    checked = 0
    for prompt, answer, margin in greedy_answers(want):
        logits = model.logits(np.concatenate([prompt, answer[:-1]]))[0, len(prompt) - 1 :]
        clear = margin > 2 * error
        np.testing.assert_array_equal(logits.argmax(axis=1)[clear], answer[clear])
        checked += int(clear.sum())
    assert checked > 50
