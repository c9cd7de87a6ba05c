"""Model: weights and shape, ready to compute; Runner: one cache and its buffers over them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from moss_jt.adapter import Adapter, AdapterShape
from moss_jt.batch import Batch, single_batch
from moss_jt.budget import Budget
from moss_jt.cache import KVCache, KVType
from moss_jt.checkpoint import Checkpoint
from moss_jt.config import MossConfig
from moss_jt.device_ops import DeviceOps
from moss_jt.errors import CheckpointError, ConfigError, ShapeError
from moss_jt.launch import computing
from moss_jt.memory import memory_for
from moss_jt.model import Moss
from moss_jt.ops import InferenceOps
from moss_jt.placement import Placed
from moss_jt.plan import LOGIT_ROWS, PASS_TOKENS, buffer_bytes
from moss_jt.shortlist import Shortlist, Wish
from moss_jt.weights import WeightStore
from moss_jt.workspace import Workspace

if TYPE_CHECKING:
    from moss_jt.tokenizer import Tokenizer

Compute = Literal["exact", "fast"]
Floats = npt.NDArray[np.float32]

KV_TYPES: dict[str, KVType] = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
SPARE_BLOCKS = 2  # of the cache, kept for what comes next
DEFAULT_KV: dict[Compute, KVType] = {"exact": "float32", "fast": "float16"}


def kv_type(name: str) -> KVType:
    """The type of a cache by its short name.

    Raises:
        ConfigError: there is none.
    """
    if name not in KV_TYPES:
        raise ConfigError(f'kv is "{name}"; known are {", ".join(KV_TYPES)}.')
    return KV_TYPES[name]


class Runner:
    """A KV cache, the buffers of a pass, and the network over them; on a device where there is a `space` on it.

    Attributes:
        buffer_bytes: memory that the buffers take, at most.
    """

    def __init__(
        self,
        config: MossConfig,
        store: WeightStore,
        *,
        slots: int,
        tokens: int,
        kind: KVType,
        capacity: int = PASS_TOKENS,
        rounding: bool = False,
        space: Workspace | None = None,
        adapter: AdapterShape | None = None,
    ) -> None:
        self._ops: InferenceOps | DeviceOps
        if space is None:
            capacity = min(capacity, config.n_positions * slots)
            self.cache = KVCache(config, slots=slots, tokens=tokens, kind=kind)
            with memory_for("activations"):
                self._ops = InferenceOps(config, store, self.cache, capacity=capacity, rounding=rounding)
            self.buffer_bytes = buffer_bytes(config, capacity, slots)
        else:
            self.cache = space.cache(slots=slots, tokens=tokens)
            self._ops = DeviceOps(space, self.cache, inputs=space.inputs(rounding=rounding))
            self.buffer_bytes = 0  # all caches of a model share them
        self.network: Moss[Any] = Moss(config)
        if adapter is not None:
            adapter.attach(self.network)
        self._budget: Budget | None = None

    def keep_to(self, budget: Budget) -> None:
        """Take memory within a budget from now on.

        Raises:
            DeviceMemoryError: the buffers do not fit beside those of others.
        """
        budget.join(self)
        self._budget = budget

    def give_back(self) -> None:
        """Give memory of the cache that nobody uses to the weights that had to leave for it."""
        if self._budget is not None and self._budget.is_tight:
            self.cache.trim(SPARE_BLOCKS * self.cache.block_bytes)

    @property
    def ops(self) -> InferenceOps:
        """The steps, where the CPU computes them."""
        assert isinstance(self._ops, InferenceOps), "a device computes"
        return self._ops

    @property
    def device_ops(self) -> DeviceOps:
        """The steps, where a device computes them."""
        assert isinstance(self._ops, DeviceOps), "the CPU computes"
        return self._ops

    @property
    def on_layer(self) -> Callable[[int], None] | None:
        """Called after each block; may raise to break a pass off."""
        return self._ops.on_layer

    @on_layer.setter
    def on_layer(self, call: Callable[[int], None] | None) -> None:
        self._ops.on_layer = call

    @property
    def capacity(self) -> int:
        """New tokens of one pass, at most."""
        return self._ops.capacity

    def forward(self, batch: Batch) -> Floats:
        """Logits (R, V) of the wanted tokens. Room must be reserved; nothing is committed."""
        with self._passing():
            logits: Floats = self.network.execute(self._ops, batch)
        return logits

    def allow(self, allowed: npt.NDArray[np.bool_] | None) -> None:
        """Say which ids `shortlists` may give, (V,); None for all."""
        if isinstance(self._ops, DeviceOps):
            self._ops.allow(allowed)

    def shortlists(self, batch: Batch, wishes: Sequence[Wish]) -> list[Shortlist] | None:
        """Candidates for the wanted tokens, found where the logits are; None where only `forward` will do.

        Room must be reserved; nothing is committed.
        """
        ops, network = self._ops, self.network
        if not isinstance(ops, DeviceOps) or not all(wish.wanted for wish in wishes):
            return None
        with self._passing():
            network.execute(ops, replace(batch, wanted=batch.wanted[:0]))
            return ops.shortlists(network.ln_f, network.lm_head, batch.wanted, wishes)

    def alone(self) -> AbstractContextManager[object]:
        """What other threads' passes wait for, so that `logits` finds what `forward` left: on a device all share buffers."""
        return self._ops.store.lock

    def logits(self, which: Sequence[int]) -> Floats:
        """Logits (R, V) of some tokens of the last pass, by their places in it; both within one `alone`."""
        network, wanted = self.network, np.array(which, np.int32)
        with self._passing():
            logits: Floats = self._ops.more_logits(network.ln_f, network.lm_head, wanted)
        return logits

    @contextmanager
    def _passing(self) -> Iterator[None]:
        """Have the weights to oneself; what was read of changed files is of no worth."""
        store = self._ops.store
        on_host = isinstance(self._ops, InferenceOps) or self._ops.space.share is not None
        gate = computing() if on_host else nullcontext()
        with store.lock, gate, memory_for("a pass"):
            yield
        store.check_files()


class Model:
    """A loaded MOSS.

    Attributes:
        path: its native folder.
        config: its shape.
        store: its weights.
        compute: "exact" (float32 activations) or "fast".
        kv: type of the cached keys and values.
        device: where it computes.
        max_tokens: positions of a cache, prompt and answer together.
        budget: what keeps it within a limit of memory, on a device of that; None where nothing does.
        placed: where it lies on a device and on its host; None where the CPU computes.
        adapter: the shape of the adapter that it was loaded with, None without.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        store: WeightStore,
        *,
        compute: Compute,
        device: str,
        max_tokens: int | None,
        kv: KVType | None = None,
        budget: Budget | None = None,
        tokenizer: Tokenizer | None = None,
        placed: Placed | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self.placed = placed
        self.path: Path = checkpoint.path
        self.config = checkpoint.config
        self.adapter: AdapterShape | None = None
        if adapter is not None:
            self.adapter = adapter.shape
            self.config = replace(self.config, template=adapter.template or self.config.template)
            adapter.put_into(store)
        self.store = store
        self.compute: Compute = compute
        self.kv: KVType = kv or DEFAULT_KV[compute]
        self.budget = budget
        self._tokenizer = tokenizer
        self.device = device
        self.max_tokens = min(max_tokens or self.config.n_positions, self.config.n_positions)
        self._lock = threading.Lock()  # `logits` has one cache, whatever the number of threads

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model's folder, loaded at first use.

        Raises:
            CheckpointError: the folder has none.
        """
        from moss_jt.tokenizer import load_tokenizer

        return load_tokenizer(self.path) if self._tokenizer is None else self._tokenizer

    @property
    def streamed_bytes(self) -> int:
        """Bytes of weights that every pass brings to where it computes: from disk, or from the host to a device."""
        return self.store.streamed_bytes if self.placed is None else self.placed.space.weights.streamed_bytes

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder holds a tokenizer."""
        return any((self.path / name).is_file() for name in ("vocab.json", "tokenizer.model", "tokenizer.json"))

    def known_ids(self) -> npt.NDArray[np.bool_] | None:
        """Which ids may be generated, (V,): those that the tokenizer has; None for all.

        Raises:
            CheckpointError: no token of the folder's tokenizer is in the vocabulary.
        """
        if not self.has_tokenizer:
            return None
        known = self.tokenizer.known_mask(self.config.vocab_size)
        if not known.any():
            raise CheckpointError(
                f"the tokenizer in {self.path} has no token below {self.config.vocab_size}, the size of the vocabulary. "
                "Is it that of another model?"
            )
        return known

    def runner(self, *, slots: int = 1, tokens: int | None = None) -> Runner:
        """A cache of `slots` sequences over `tokens` positions in all, with its own buffers.

        Raises:
            ConfigError: so many tokens can never fit within the budget.
            DeviceMemoryError: the buffers do not fit beside those of others.
        """
        capacity = PASS_TOKENS
        if tokens is None:
            tokens = self.max_tokens if self.budget is None else min(self.max_tokens, self.budget.most_tokens(slots))
        if self.budget is not None:
            self.budget.check_tokens(tokens, slots)
            capacity = self.budget.plan.capacity
        rounding = self.compute == "fast"
        runner = Runner(
            self.config,
            self.store,
            slots=slots,
            tokens=tokens,
            kind=self.kv,
            capacity=capacity,
            rounding=rounding,
            space=None if self.placed is None else self.placed.space,
            adapter=self.adapter,
        )
        if self.budget is not None:
            runner.keep_to(self.budget)
        return runner

    @cached_property
    def _private(self) -> Runner:
        """For `logits`: the whole model's context where the budget has room for it."""
        most = self.config.n_positions
        return self.runner(tokens=most if self.budget is None else min(most, self.budget.most_tokens(1)))

    def logits(self, ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None = None) -> Floats:
        """Logits at every position of a batch of sequences.

        Padding may stand on either side; positions count the real tokens only.

        Args:
            ids: token ids, (B, T) or (T,).
            attention_mask: 1 for real tokens, 0 for padding, same shape as `ids`; None for no padding.

        Returns:
            (B, T, V) float32; (T, V) ids give B = 1. Zero where the mask is 0. Its memory comes on top of the budget.

        Raises:
            ShapeError: wrong shape, an id outside the vocabulary, or more than n_positions tokens.
        """
        table = _table("ids", ids)
        mask = np.ones(table.shape, bool) if attention_mask is None else _table("attention_mask", attention_mask) != 0
        self._check_ids(table, mask)
        result = np.zeros((*table.shape, self.config.vocab_size), np.float32)
        for row, (ids_of_row, real) in enumerate(zip(table, mask, strict=True)):
            with self._lock:
                self._fill_logits(ids_of_row, np.flatnonzero(real), result[row])
        return result

    def _check_ids(self, table: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_]) -> None:
        if table.ndim != 2 or table.dtype.kind not in "iu":
            raise ShapeError(f"ids must be whole numbers of shape (B, T); got {table.dtype} of shape {table.shape}.")
        if mask.shape != table.shape:
            raise ShapeError(f"attention_mask has shape {mask.shape}, ids have {table.shape}; they must be the same.")
        real = table[mask]
        if real.size and (real.min() < 0 or real.max() >= self.config.vocab_size):
            wrong = real[(real < 0) | (real >= self.config.vocab_size)][0]
            raise ShapeError(
                f"token id {wrong} is outside the vocabulary of {self.config.vocab_size}. "
                "Is the tokenizer that of another model?"
            )
        longest = int(mask.sum(axis=1).max(initial=0))
        if longest > self.config.n_positions:
            raise ShapeError(
                f"{longest} tokens are more than the model's n_positions {self.config.n_positions}. Shorten the input."
            )

    def _fill_logits(self, ids: npt.NDArray[np.int64], real: npt.NDArray[np.int64], into: Floats) -> None:
        """Logits of one row at the places `real` of its tokens, pass by pass, into (T, V)."""
        runner = self._private
        try:
            for start in range(0, len(real), runner.capacity):
                places = real[start : start + runner.capacity]
                runner.cache.reserve(0, len(places))
                with runner.alone():
                    runner.forward(single_batch(ids[places], start=start, wanted=[]))
                    runner.cache.commit(0, len(places))
                    for first in range(0, len(places), LOGIT_ROWS):
                        which = range(first, min(first + LOGIT_ROWS, len(places)))
                        into[places[which.start : which.stop]] = runner.logits(which)
        finally:  # else its memory would be missing to every conversation from here on
            runner.cache.release(0)
            runner.cache.trim()


def _table(name: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
    """A (B, T) array of what was given, a single row included."""
    try:
        table: npt.NDArray[Any] = np.atleast_2d(np.asarray(values))
    except ValueError:  # rows of different lengths
        raise ShapeError(
            f"the rows of {name} are not of one length; pad them, and give an attention_mask that is 0 at the padding."
        ) from None
    return table if table.size else table.astype(np.int64)  # numpy takes an empty list for floats
