"""What a GPTQ checkpoint is, read from the shapes of its tensors rather than believed from its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moss_jt.checkpoint import block_shapes, is_quantized_name
from moss_jt.config import Bits, MossConfig, Quantization
from moss_jt.converters.names import gptq_names
from moss_jt.converters.source import Source, SourceTensor
from moss_jt.errors import CheckpointError
from moss_jt.packing import inputs_per_group, plain_groups

_FLOAT_WBITS = (None, 16, 32)


def find_quantization(
    config: MossConfig, raw: Mapping[str, Any], tensors: Mapping[str, SourceTensor]
) -> Quantization | None:
    """The bits and group size that the tensors have, which must be those that config.json tells.

    Args:
        config: the shape of the model.
        raw: config.json as it is (wbits, groupsize).
        tensors: of the checkpoint.

    Returns:
        None for a checkpoint of floating-point weights.

    Raises:
        CheckpointError: shapes and config disagree, or the shapes fit no format.
    """
    told = raw.get("wbits")
    if not any(name.endswith(".qweight") for name in tensors):
        if told not in _FLOAT_WBITS:
            raise CheckpointError(
                f"config.json says wbits {told}, but the files hold no qweight tensors: the weights are not quantised. "
                "Is config.json from another checkpoint?"
            )
        return None
    bits = _find_bits(config, tensors)
    if "wbits" in raw and told != bits:
        raise CheckpointError(f"config.json says wbits {told}, but {_evidence(config, tensors)}, which is {bits} bits.")
    return Quantization(bits, _find_group_size(config, raw, tensors))


def gptq_shapes(shape: tuple[int, ...], quantization: Quantization) -> dict[str, tuple[int, ...]]:
    """The shapes of the four tensors of a matrix (N, K)."""
    n, k = shape
    per = 32 // quantization.bits
    groups = _count_groups(k, quantization.group_size)
    return {"qweight": (k // per, n), "qzeros": (groups, n // per), "scales": (groups, n), "g_idx": (k,)}


def count_act_order(config: MossConfig, source: Source) -> int:
    """How many quantised matrices have their inputs permuted."""
    if config.quantization is None:
        return 0
    names = [gptq_names(name)["g_idx"] for name, _, _ in _matrices(config, source.tensors)]
    size = config.quantization.group_size
    g_idx = {name: source.read(name) for name in names}
    return sum(not np.array_equal(g, plain_groups(len(g), inputs_per_group(size, len(g)))) for g in g_idx.values())


def _matrices(config: MossConfig, tensors: Mapping[str, SourceTensor]) -> list[tuple[str, int, int]]:
    """The quantised matrices that are there with qweight and scales: (name, N, K)."""
    found = []
    of_block = {
        name: shape for name, shape in block_shapes(config).items() if is_quantized_name(f"transformer.h.0.{name}")
    }
    for layer in range(min(config.n_layer, len(tensors))):
        for end, (n, k) in of_block.items():
            name = f"transformer.h.{layer}.{end}"
            parts = gptq_names(name)
            if all(part in tensors and len(tensors[part].shape) == 2 for part in (parts["qweight"], parts["scales"])):
                found.append((name, n, k))
    return found


def _find_bits(config: MossConfig, tensors: Mapping[str, SourceTensor]) -> Bits:
    """4 or 8, from qweight's rows."""
    seen: dict[int, str] = {}
    for name, _, k in _matrices(config, tensors):
        shape = tensors[gptq_names(name)["qweight"]].shape
        bits = shape[0] * 32 / k
        if bits not in (4, 8):
            raise CheckpointError(
                f"{gptq_names(name)['qweight']} is {shape} for {k} inputs; {k // 8} rows would be 4 bits and {k // 4} rows 8."
            )
        seen.setdefault(int(bits), name)
    if len(seen) != 1:
        words = " and ".join(f"{name} with {bits} bits" for bits, name in sorted(seen.items()))
        raise CheckpointError(f"the quantised matrices do not agree: {words or 'none is complete'}.")
    return 4 if 4 in seen else 8


def _evidence(config: MossConfig, tensors: Mapping[str, SourceTensor]) -> str:
    name, _, k = _matrices(config, tensors)[0]
    words = gptq_names(name)["qweight"]
    return f"{words} has {tensors[words].shape[0]} rows for {k} inputs"


def _count_groups(k: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-k // group_size)


def _find_group_size(config: MossConfig, raw: Mapping[str, Any], tensors: Mapping[str, SourceTensor]) -> int:
    """Inputs in a group; -1 if every matrix has one group a row and config.json does not say more."""
    counts = {name: (tensors[gptq_names(name)["scales"]].shape[0], k) for name, _, k in _matrices(config, tensors)}
    told = raw.get("groupsize")
    if isinstance(told, int) and not isinstance(told, bool) and (told == -1 or told > 0):
        for name, (groups, k) in counts.items():
            if groups != _count_groups(k, told):
                raise CheckpointError(
                    f"config.json says groupsize {told}, but {gptq_names(name)['scales']} has {groups} groups "
                    f"for {k} inputs, which is {_size_in_words(groups, k)}."
                )
        return told
    if told is not None:
        raise CheckpointError(f"config.json says groupsize {told!r}; it must be a positive number, or -1.")
    return _infer_group_size(list(counts.values()))


def _infer_group_size(counts: list[tuple[int, int]]) -> int:
    """The size that gives each matrix, (groups, K), its groups; of several the one that cuts all evenly, else the roundest.

    g_idx is compared with it later, so a wrong choice is an error and never a wrong weight.
    """
    if all(groups == 1 for groups, _ in counts):
        return -1
    low = max(-(-k // max(groups, 1)) for groups, k in counts)
    high = min((k - 1) // (groups - 1) for groups, k in counts if groups > 1)
    if low > high or any(groups < 1 for groups, _ in counts):
        raise CheckpointError(
            f"config.json has no groupsize, and the scales fit no single one ({low} or more, {high} or less)."
        )
    if all(groups == 1 or k % low == 0 for groups, k in counts):
        return low
    step = 1 << high.bit_length()
    while high // step * step < low:
        step >>= 1
    return high // step * step


def _size_in_words(groups: int, k: int) -> str:
    return "one group a row" if groups == 1 else f"groups of {-(-k // max(groups, 1))}"
