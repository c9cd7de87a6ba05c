"""transformers' CodeGen gives the same logits as MOSS from the same tensors: a second opinion on random shapes.

Needs torch and transformers, which moss-jt never installs; skipped without them.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moss_jt
from moss_jt.config import GenerationConfig

pytestmark = pytest.mark.skipif(
    find_spec("torch") is None or find_spec("transformers") is None, reason="torch and transformers are not installed"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a random model."""

    n_layer: int
    n_head: int
    head_dim: int
    rotary_dim: int
    n_inner: int | None
    vocab_size: int


SHAPES = [
    Shape(n_layer=2, n_head=8, head_dim=24, rotary_dim=16, n_inner=None, vocab_size=131),
    Shape(n_layer=3, n_head=12, head_dim=64, rotary_dim=64, n_inner=200, vocab_size=517),
    Shape(n_layer=1, n_head=24, head_dim=32, rotary_dim=10, n_inner=1000, vocab_size=64),
]


def make_codegen(shape: Shape, folder: Path) -> Any:
    """A random CodeGen model, saved as a MOSS checkpoint; returns the model."""
    import torch
    from transformers import CodeGenConfig, CodeGenForCausalLM

    torch.manual_seed(shape.n_head)
    config = CodeGenConfig(
        vocab_size=shape.vocab_size,
        n_positions=256,
        n_ctx=256,
        n_embd=shape.n_head * shape.head_dim,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        rotary_dim=shape.rotary_dim,
        n_inner=shape.n_inner,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = CodeGenForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0 if parameter.ndim == 2 else 0.5, 0.05)
    model.save_pretrained(folder, safe_serialization=True)
    return model


@pytest.mark.filterwarnings("default")  # those of torch and transformers are not ours to mend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_greedy_tokens(shape: Shape, tmp_path: Path, jittor: Any) -> None:
    import torch

    theirs = make_codegen(shape, tmp_path / "source")
    ours = moss_jt.load_model(tmp_path / "source")
    rng = np.random.default_rng(5)
    ids = rng.integers(shape.vocab_size, size=(2, 200))
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(ours.logits(ids) - want).max() < 1e-4
    mask = np.ones_like(ids)
    mask[0, :31] = 0
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    with torch.no_grad():
        padded = theirs(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), position_ids=torch.from_numpy(positions)
        )
    difference = np.abs(ours.logits(ids, mask) - padded.logits.numpy())[mask == 1]
    assert difference.max() < 1e-4
    greedy = GenerationConfig(do_sample=False, repetition_penalty=1.0, max_new_tokens=20)
    prompt = ids[1, :9].tolist()
    got = [token.id for token in moss_jt.generate(ours, prompt, greedy)]
    assert got == greedy_tokens(theirs, prompt, 20)


def greedy_tokens(model: Any, prompt: list[int], count: int) -> list[int]:
    import torch

    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]
