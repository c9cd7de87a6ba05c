"""Adapters: low-rank terms that a fine-tuning added to the matrices of a model, and their folder.

y = x W^T + scale * (x A^T) B^T. A folder holds adapter.safetensors (A and B of each matrix, float32) and adapter.json
(what they were trained for). A model with an adapter computes the terms beside its stored matrices, which may be
quantised and streamed: nothing is merged.

Source: Hu et al. 2021 (LoRA), arXiv:2106.09685.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.checkpoint import expected_shapes
from moss_jt.config import MossConfig, TemplateName
from moss_jt.errors import CheckpointError, ConfigError
from moss_jt.model import Moss
from moss_jt.ops import Linear
from moss_jt.safetensors_file import write_tensors
from moss_jt.weights import WeightStore

Floats = npt.NDArray[np.float32]

FORMAT, VERSION = "moss-jt-adapter", 1
WEIGHTS, DESCRIPTION = "adapter.safetensors", "adapter.json"
_NEW = ".new"  # at the end of a name: not whole yet
TARGETS = ("qkv_proj", "out_proj", "fc_in", "fc_out")


@dataclass(frozen=True)
class AdapterShape:
    """Which matrices have a term, and of what rank.

    Attributes:
        rank: of each term.
        alpha: the terms' factor is alpha / rank.
        targets: of TARGETS, in every layer.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"the rank of an adapter is {self.rank}; it must be at least 1.")
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            raise ConfigError(f"an adapter cannot be for {unknown or 'nothing'}; its targets are {', '.join(TARGETS)}.")

    @property
    def scale(self) -> float:
        """The terms' factor."""
        return self.alpha / self.rank

    def shapes(self, config: MossConfig) -> dict[str, tuple[int, int]]:
        """Every A (rank, K) and B (N, rank) by name."""
        matrices = expected_shapes(config)
        found: dict[str, tuple[int, int]] = {}
        for layer in range(config.n_layer):
            for target in self.targets:
                base = _base_name(layer, target)
                n, k = matrices[f"{base}.weight"]
                a, b = term_names(base)
                found[a], found[b] = (self.rank, k), (n, self.rank)
        return found

    def attach(self, network: Moss[Any]) -> None:
        """Let a network compute the terms."""
        for block in network.blocks:
            for target in self.targets:
                linear: Linear = getattr(block, target)
                term = replace(linear, low_rank=term_names(linear.name), low_rank_scale=self.scale)
                setattr(block, target, term)


@dataclass(frozen=True)
class Adapter:
    """A trained adapter.

    Attributes:
        shape: of its terms.
        terms: A and B by name; none any more when a store has taken them over.
        template: the prompt format that it learned, None where nobody said.
        base: the name of the model that it was trained on.
    """

    shape: AdapterShape
    terms: dict[str, Floats]
    template: TemplateName | None = None
    base: str = ""

    def put_into(self, store: WeightStore) -> None:
        """Hand the terms over to a store, where a network with this adapter finds them, so that none is there twice."""
        for name in list(self.terms):
            store.add(name, self.terms.pop(name))

    def scaled(self) -> dict[str, Floats]:
        """A and B by name, the terms' factor in B: for whoever multiplies by one and then the other."""
        return {
            name: values if name.endswith(".lora_a") else values * np.float32(self.shape.scale)
            for name, values in self.terms.items()
        }

    def pairs(self) -> Iterator[tuple[str, Floats, Floats]]:
        """Name of a matrix, its A and its B."""
        for name in self.terms:
            if name.endswith(".lora_a"):
                base = name.removesuffix(".lora_a")
                yield f"{base}.weight", self.terms[name], self.terms[f"{base}.lora_b"]

    @property
    def nbytes(self) -> int:
        """Memory of the terms."""
        return sum(values.nbytes for values in self.terms.values())


def term_names(base: str) -> tuple[str, str]:
    """The names of A and B beside a matrix "transformer.h.0.mlp.fc_in"."""
    return f"{base}.lora_a", f"{base}.lora_b"


def _base_name(layer: int, target: str) -> str:
    part = "attn" if target in ("qkv_proj", "out_proj") else "mlp"
    return f"transformer.h.{layer}.{part}.{target}"


def save_adapter(folder: Path, adapter: Adapter, config: MossConfig) -> None:
    """Write an adapter's two files, each whole or not at all; the description comes last.

    Raises:
        OSError: the disk is full or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "format": FORMAT,
        "version": VERSION,
        "rank": adapter.shape.rank,
        "alpha": adapter.shape.alpha,
        "targets": list(adapter.shape.targets),
        "template": adapter.template,
        "base": {"name": adapter.base, "n_layer": config.n_layer, "n_embd": config.n_embd},
    }
    weights, description = folder / f"{WEIGHTS}{_NEW}", folder / f"{DESCRIPTION}{_NEW}"
    try:
        write_tensors(weights, adapter.terms)
        description.write_text(json.dumps(told, indent=2) + "\n", "utf-8")
        weights.replace(folder / WEIGHTS)
        description.replace(folder / DESCRIPTION)
    finally:
        for scratch in (weights, description):
            scratch.unlink(missing_ok=True)


def is_unfinished(folder: Path) -> bool:
    """Whether all that lies in a folder is what a process left that was killed while it wrote its first adapter."""
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    return bool(names) and names <= {WEIGHTS, f"{WEIGHTS}{_NEW}", f"{DESCRIPTION}{_NEW}"}


def load_adapter(path: str | os.PathLike[str], config: MossConfig) -> Adapter:
    """Read an adapter and see that it fits a model.

    Raises:
        CheckpointError: it is not there, broken, or made for a model of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(path)
    try:
        told = json.loads((folder / DESCRIPTION).read_text("utf-8"))
        if told["format"] != FORMAT or told["version"] != VERSION:
            raise CheckpointError(
                f"{folder} is of format {told['format']} {told['version']}; this reads {FORMAT} {VERSION}."
            )
        shape = AdapterShape(int(told["rank"]), float(told["alpha"]), tuple(told["targets"]))
        terms = load_file(folder / WEIGHTS)
        adapter = Adapter(shape, terms, told["template"], str(told["base"]["name"]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be read as an adapter ({DESCRIPTION}, {WEIGHTS}): {error}. `moss-jt finetune` makes them."
        ) from error
    wanted = shape.shapes(config)
    wrong = [name for name in {*wanted, *terms} if name not in terms or terms[name].shape != wanted.get(name)]
    if wrong:
        raise CheckpointError(f"{folder} does not fit the model: {min(wrong)}. Was it trained on another one?")
    return adapter
