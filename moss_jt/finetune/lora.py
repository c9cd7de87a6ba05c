"""Adapters in training: low-rank terms over the frozen weights of a folder, which may be quantised and streamed."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.adapter import Adapter, AdapterShape, save_adapter
from moss_jt.checkpoint import Checkpoint
from moss_jt.config import FloatType, MossConfig
from moss_jt.device import Device
from moss_jt.errors import ConfigError
from moss_jt.finetune.disk import writing
from moss_jt.finetune.parameters import Parameters
from moss_jt.finetune.settings import TrainSettings
from moss_jt.finetune.start import hash_of
from moss_jt.frozen import Frozen
from moss_jt.frozen_device import DeviceFrozen, plan_frozen
from moss_jt.memory import memory_for, resident_memory
from moss_jt.model import Moss
from moss_jt.ops_grad import CHUNK_NUMBERS, LossOps
from moss_jt.plan import make_plan, matrix_sizes, needs_of, rest_of
from moss_jt.progress import Progress
from moss_jt.weights import WeightStore

_FLOAT = 4
_COPIES_OF_PARAMETERS = 4  # value, gradient and two moments
_WIDTHS_KEPT = 12  # activations that a block keeps for its gradients, in widths of the model, the MLP's apart


@dataclass(frozen=True)
class Adapted:
    """A frozen model and the terms that are trained.

    Attributes:
        config: of the model.
        shape: of the adapter.
        parameters: its terms.
        store: the model's weights.
        recompute: see TrainSettings.
        origin: a hash of the model.
        frozen: who multiplies by its matrices; None for the host's processor.
    """

    config: MossConfig
    shape: AdapterShape
    parameters: Parameters
    store: WeightStore
    recompute: bool = False
    origin: str = ""
    frozen: Frozen | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        shape = self.shape
        return {
            "model": self.origin,
            "lora_rank": shape.rank,
            "lora_alpha": shape.alpha,
            "lora_targets": sorted({*shape.targets}),
        }

    def network(self) -> Moss[Any]:
        """The network with its terms."""
        network: Moss[Any] = Moss(self.config)
        self.shape.attach(network)
        return network

    def make_ops(self, variables: Mapping[str, Any]) -> LossOps:
        """The steps over Vars of the terms."""
        return LossOps(self.config, variables, self.store, frozen=self.frozen, recompute=self.recompute)

    def write(self, folder: Path, *, tokenizer: Path, dtype: FloatType, name: str, progress: Progress) -> None:
        """Write the adapter; its terms are float32 and the tokenizer is the model's."""
        template = self.config.template or "fields"
        adapter = Adapter(self.shape, self.parameters.arrays(), template, self.config.name)
        with writing(folder):
            save_adapter(folder, adapter, self.config)


def over_folder(
    checkpoint: Checkpoint,
    shape: AdapterShape,
    settings: TrainSettings,
    *,
    longest: int,
    memory: int | None,
    device: Device | None = None,
    progress: Progress,
) -> Adapted:
    """Begin an adapter: A is random, B zero, so the model is what it was.

    Args:
        checkpoint: the model's folder.
        shape: of the adapter.
        settings: of the run.
        longest: tokens of the longest sample.
        memory: of the whole process, bytes; weights that do not fit are read from disk in every pass. None holds all.
        device: multiplies by the model's matrices; as many of their rows as fit lie there, the rest in memory or on disk. It
            stays the caller's. None for the host's processor.
        progress: told about loading.

    Raises:
        ConfigError: a memory is too little; the least that would do is named.
        DeviceMemoryError: the system does not give it.
        KernelError: the device computes wrong.
    """
    config = checkpoint.config
    parameters = Parameters(shape.shapes(config))
    for name, slot in parameters.slots.items():
        if name.endswith(".lora_a"):
            rng = np.random.Generator(np.random.PCG64([settings.seed, zlib.crc32(name.encode())]))
            spread = np.float32(1.0 / np.sqrt(slot.shape[1]))
            parameters.array(name)[...] = rng.standard_normal(slot.shape, np.float32) * spread
    layouts = {name: entry.layout for name, entry in checkpoint.entries.items()}
    sizes = matrix_sizes(config, layouts)
    tokens = min(max(settings.pass_tokens, longest), longest * settings.batch_size * settings.accumulation)
    on_device = None if device is None else plan_frozen(device, sizes, layouts, tokens)
    base = {} if on_device is None else on_device.plan.resident
    plan = None
    if memory is not None:
        extra = _COPIES_OF_PARAMETERS * parameters.values.nbytes + 3 * _FLOAT * CHUNK_NUMBERS
        needs = replace(
            needs_of(config, sizes, base=resident_memory() + extra, kv="float32"),
            kv_token_bytes=token_bytes(config, shape, recompute=settings.recompute),
            positions=tokens,
        )
        try:
            plan = make_plan(rest_of(sizes, base), needs, memory=memory, context=tokens, kv_tokens_now=tokens)
        except ConfigError as error:
            raise ConfigError(f"{error} Smaller --pass_tokens and --recompute need less.") from error
    with memory_for("the weights"):
        store = WeightStore(checkpoint, plan, progress, base=base)
    frozen = None
    if device is not None and on_device is not None:
        frozen = DeviceFrozen(device, store, sizes, on_device, progress)
    return Adapted(config, shape, parameters, store, settings.recompute, hash_of(checkpoint), frozen)


def token_bytes(config: MossConfig, shape: AdapterShape, *, recompute: bool) -> int:
    """Memory that a token of a pass takes, about: activations that are kept, and as much for their gradients."""
    of_block = _WIDTHS_KEPT * config.n_embd + 4 * config.inner_dim + 2 * len(shape.targets) * shape.rank
    blocks = 2 if recompute else config.n_layer
    return 2 * _FLOAT * (blocks * of_block + (config.n_layer if recompute else 2) * config.n_embd)
