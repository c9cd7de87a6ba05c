"""Which tensors of a Hugging Face folder make up which of ours: data, and the few look-ups into it.

Our names are those of the original. A quantised matrix is one tensor of ours under the name of its
weight; GPTQ keeps it as four. The causal mask is a buffer that the original saved along; it can be
worked out, so it is dropped.
"""

from __future__ import annotations

GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
DROPPED_SUFFIXES = (".attn.causal_mask",)
_WEIGHT = ".weight"


def is_dropped(name: str) -> bool:
    """Whether a tensor of the source holds nothing that a model needs."""
    return name.endswith(DROPPED_SUFFIXES)


def gptq_names(name: str) -> dict[str, str]:
    """The GPTQ tensors of a matrix of ours: part -> name in the source."""
    stem = name.removesuffix(_WEIGHT)
    return {part: f"{stem}.{part}" for part in GPTQ_PARTS}


def source_names(name: str, *, gptq: bool) -> list[str]:
    """The tensors of the source from which one of ours is made."""
    return list(gptq_names(name).values()) if gptq else [name]
