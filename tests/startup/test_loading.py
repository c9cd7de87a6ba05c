"""What is mended in Jittor while it is imported."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moss_jt.startup import loading

JITTOR_S_WAY = """
def load():
    if True:
        exec("import json")
    return locals()["json"]

def look(value):
    return locals()["value"]

def miss():
    return locals()["no_such_module"]
"""


@pytest.fixture
def module() -> dict[str, Any]:
    """Functions written as Jittor's, in a namespace that was mended."""
    namespace: dict[str, Any] = {"locals": loading._locals_and_modules}
    exec(JITTOR_S_WAY, namespace)
    return namespace


def test_module_imported_by_exec_is_found_on_every_python(module: dict[str, Any]) -> None:
    assert module["load"]() is json


def test_locals_are_still_the_caller_s(module: dict[str, Any]) -> None:
    assert module["look"](7) == 7


def test_what_is_neither_local_nor_imported_is_missed(module: dict[str, Any]) -> None:
    with pytest.raises(KeyError, match="no_such_module"):
        module["miss"]()


def test_mending_comes_before_the_first_operator(monkeypatch: pytest.MonkeyPatch, jittor: object) -> None:
    import sys

    calls = []
    for name in ("jittor.compiler", "jittor_utils"):
        monkeypatch.delattr(sys.modules[name], "locals", raising=False)
    loading._after_mending(lambda *words: calls.append(words))(["c"], "cache", "jittor", "title")
    assert calls == [(["c"], "cache", "jittor", "title")]
    for name in ("jittor.compiler", "jittor_utils"):
        assert vars(sys.modules[name])["locals"] is loading._locals_and_modules
