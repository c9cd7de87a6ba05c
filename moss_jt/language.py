"""Chinese or English, chosen once, for text that a user reads.

`pick(en, zh)` keeps both wordings side by side at the place where they are used, so that neither
is forgotten. Error messages of the library are English; the words around them follow the choice.
"""

from __future__ import annotations

import os
from typing import Literal

Language = Literal["en", "zh"]

_current: Language | None = None


def detect_language(environ: dict[str, str] | None = None) -> Language:
    """The language of the locale: LC_ALL, else LC_MESSAGES, else LANG; English unless it says Chinese."""
    env = os.environ if environ is None else environ
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        value = env.get(name, "")
        if value:
            return "zh" if value.lower().startswith("zh") else "en"
    return "en"


def set_language(language: Language | None) -> None:
    """Use this language from now on; None goes back to that of the locale."""
    global _current
    _current = language


def current_language() -> Language:
    """The language in use."""
    return _current or detect_language()


def pick(en: str, zh: str) -> str:
    """The wording for the language in use."""
    return zh if current_language() == "zh" else en
