"""The network with gradients, against the original's loss and gradients of one training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt.batch import Batch, single_batch
from moss_jt.config import MossConfig
from moss_jt.errors import ShapeError
from moss_jt.model import Moss
from moss_jt.ops_grad import GradientOps


def test_loss_and_gradients_of_a_step(golden: Path, jittor: Any) -> None:
    jt = jittor
    config = MossConfig.from_file(golden / "train-step" / "config.json")
    data = np.load(golden / "train-step" / "step0.npz")
    weights = {key[5:]: jt.array(data[key].astype(np.float32)) for key in data.files if key.startswith("init.")}
    rows = [(data[f"ids_{i}"], data[f"labels_{i}"]) for i in range(2)]
    length = max(len(ids) for ids, _ in rows)
    ids, labels = np.zeros((2, length), np.int32), np.full((2, length), -100, np.int32)
    for row, (tokens, wanted) in enumerate(rows):
        ids[row, : len(tokens)], labels[row, : len(wanted)] = tokens, wanted
    size = 2 * length
    slots, positions = np.repeat([0, 1], length).astype(np.int32), np.tile(np.arange(length, dtype=np.int32), 2)
    batch = Batch(ids.reshape(-1), slots, positions, np.arange(size, dtype=np.int32))

    logits = Moss(config).execute(GradientOps(config, weights), batch).reshape(2, length, -1)[:, :-1]
    target = jt.array(np.ascontiguousarray(labels[:, 1:]).reshape(-1))
    loss = jt.nn.cross_entropy_loss(logits.reshape(-1, config.vocab_size), target, ignore_index=-100)
    assert abs(loss.item() - float(data["loss"])) < 1e-4
    for name, gradient in zip(weights, jt.grad(loss, list(weights.values())), strict=True):
        difference = np.abs(gradient.numpy() - data[f"grad0.{name}"]).max()
        assert difference < 1e-5, f"{name}: off by {difference:.2e}"


def test_sequences_that_start_later_are_refused(golden: Path, jittor: Any) -> None:
    config = MossConfig.from_file(golden / "train-step" / "config.json")
    with pytest.raises(ShapeError, match="from position 0 on"):
        GradientOps(config, {}).begin(single_batch([1, 2, 3], start=4))
