"""moss-jt: MOSS on Jittor for machines that are too small for it.

Importing this package loads neither Jittor nor cupy; the names below are fetched when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moss_jt.config import GenerationConfig, MossConfig
    from moss_jt.errors import MossError
    from moss_jt.generation import generate
    from moss_jt.load import load_model
    from moss_jt.tokenizer import load_tokenizer

__version__ = "0.1.0"

_HOMES = {
    "GenerationConfig": "moss_jt.config",
    "MossConfig": "moss_jt.config",
    "MossError": "moss_jt.errors",
    "generate": "moss_jt.generation",
    "load_model": "moss_jt.load",
    "load_tokenizer": "moss_jt.tokenizer",
}

__all__ = ["GenerationConfig", "MossConfig", "MossError", "__version__", "generate", "load_model", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    """Fetch a public name from its module at first use."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'moss_jt' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
