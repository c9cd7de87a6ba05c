"""The names that `import moss_jt` offers, as a program meets them."""

from __future__ import annotations

from importlib import import_module

import pytest

import moss_jt


def test_names_stay_what_they_are() -> None:
    """A submodule of the same name once took the place of the function `generate` at the second look."""
    for name in moss_jt.__all__:
        first = getattr(moss_jt, name)
        module = getattr(first, "__module__", None)
        if module:
            import_module(module)
        assert getattr(moss_jt, name) is first, name
    assert callable(moss_jt.generate) and callable(moss_jt.load_model) and callable(moss_jt.load_tokenizer)


def test_unknown_names_are_told() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        moss_jt.nothing  # noqa: B018
