"""Placing a model on a device and its host: three tiers, planned together.

    device  the first rows of each matrix, the caches, the buffers
    host    the rows after them, pinned; as many as its memory holds
    disk    the rest

The caches on the device grow at the cost of rows there. So what the host is planned for are the rows that are not on
the device when the caches are full; as long as they are not, some rows are in both, and none has to be read again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moss_jt.budget import Budget
from moss_jt.checkpoint import Checkpoint
from moss_jt.config import MossConfig
from moss_jt.device import Device
from moss_jt.device_weights import STAGING
from moss_jt.errors import ConfigError
from moss_jt.kv_layout import KVType
from moss_jt.layout import PlainLayout, RowsLayout, TileLayout
from moss_jt.memory import MIB
from moss_jt.plan import (
    LOGIT_ROWS,
    MatrixSize,
    Needs,
    Plan,
    make_plan,
    matrix_sizes,
    resident_rows,
    rest_of,
    small_bytes,
)
from moss_jt.progress import Progress
from moss_jt.weights import WeightStore
from moss_jt.workspace import Terms, Workspace, device_needs

_SPARE_BLOCKS = 8  # of caches, that several conversations leave half empty
_HOST_MARGIN = 64 * MIB  # what the driver's copies take, and what nobody foresaw


@dataclass(frozen=True)
class TwoPlans:
    """How both memories are divided.

    Attributes:
        device: of the device.
        host: of main memory, for the rows from `base` on; None where the device holds everything.
        base: the first row of each matrix that the host may be asked for.
    """

    device: Plan
    host: Plan | None
    base: Mapping[str, int]


@dataclass(frozen=True)
class Placed:
    """A model on a device.

    Attributes:
        store: its weights on the host and the disk.
        space: its memory on the device.
        budget: of the device.
        plans: how both were divided.
    """

    store: WeightStore
    space: Workspace
    budget: Budget
    plans: TwoPlans


def plan_both(
    config: MossConfig,
    sizes: Sequence[MatrixSize],
    layouts: Mapping[str, RowsLayout | TileLayout],
    kv: KVType,
    *,
    vram: int,
    device_base: int,
    memory: int,
    host_base: int,
    context: int | None = None,
    terms: Terms | None = None,
) -> TwoPlans:
    """Divide the memory of a device and of its host.

    Args:
        vram: bytes that the process may take on the device, `device_base` of them before anything is loaded.
        memory: bytes that it may take on the host, `host_base` of them before any weight.
        context: tokens that the caches must be able to hold; None for as many as fit.
        terms: low-rank terms of an adapter by name, their factor in them.

    Raises:
        ConfigError: either is too little; says how much would do.
    """
    needs = device_needs(config, sizes, layouts, base=device_base, kv=kv, terms=terms)
    try:
        device = make_plan(sizes, needs, memory=vram, context=context)
    except ConfigError as error:
        raise ConfigError(f"on the device, {error}") from error
    base = resident_rows(sizes, _floor(device))
    rest = rest_of(sizes, base)
    if not rest:
        return TwoPlans(device, None, base)
    buffers = STAGING + 4 * (LOGIT_ROWS + 1) * config.vocab_size + 8 * device.capacity * config.n_embd
    host_needs = Needs(
        base=host_base, buffers=buffers, small=small_bytes(config, sizes), kv_token_bytes=0, margin=_HOST_MARGIN
    )
    return TwoPlans(device, make_plan(rest, host_needs, memory=memory, context=device.context), base)


def place(
    checkpoint: Checkpoint,
    device: Device,
    kv: KVType,
    *,
    vram: int,
    memory: int,
    host_base: int,
    context: int | None = None,
    terms: Terms | None = None,
    progress: Progress | None = None,
) -> Placed:
    """Load a checkpoint onto a device, and onto the host what has no room there.

    Args:
        as for `plan_both`.
        progress: told about reading.

    Raises:
        ConfigError: a memory is too little.
        CheckpointError: the files cannot be read.
        DeviceMemoryError: what was planned is not given.
    """
    config = checkpoint.config
    layouts = {
        name: entry.layout for name, entry in checkpoint.entries.items() if not isinstance(entry.layout, PlainLayout)
    }
    sizes = matrix_sizes(config, layouts)
    plans = plan_both(
        config,
        sizes,
        layouts={size.name: layouts[size.name] for size in sizes},
        kv=kv,
        vram=vram,
        device_base=device.own_bytes,
        memory=memory,
        host_base=host_base,
        context=context,
        terms=terms,
    )
    store = WeightStore(checkpoint, plans.host, progress, base=plans.base)
    return fill(config, store, device, sizes, plans=plans, kv=kv, terms=terms, progress=progress)


def fill(
    config: MossConfig,
    store: WeightStore,
    device: Device,
    sizes: Sequence[MatrixSize],
    *,
    plans: TwoPlans,
    kv: KVType,
    terms: Terms | None = None,
    progress: Progress | None = None,
) -> Placed:
    """Load what is planned onto a device, from a store that holds the rest.

    Raises:
        CheckpointError: the files cannot be read.
        DeviceMemoryError: what was planned is not given.
    """
    for part in store.memory:
        device.pin(part)
    space = Workspace(config, device, store, sizes=sizes, plan=plans.device, kind=kv, terms=terms)
    space.weights.load(plans.device.resident, progress)
    return Placed(store, space, Budget(plans.device, sizes, space, floor=_floor(plans.device)), plans)


def _floor(plan: Plan) -> int:
    """Bytes of weights that stay on the device however full its caches are, so that the host need not have them."""
    if not plan.ring_slots:  # nothing can leave
        return plan.total_bytes
    return plan.budget_beside(plan.kv_bytes(plan.context) + _SPARE_BLOCKS * plan.kv_bytes(1))
