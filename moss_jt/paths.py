"""Where moss-jt keeps what it makes: one folder, named in one place.

`MOSS_JT_HOME` if set, else `moss-jt` under XDG_CACHE_HOME, else `~/.cache/moss-jt`.
Nothing is created here: whoever writes makes the folder and reports what went wrong.
"""

from __future__ import annotations

import os
from pathlib import Path

from moss_jt.errors import StartupError

HOME_VARIABLE = "MOSS_JT_HOME"
EMBEDDED_MODEL = "moss-tiny"  # the name of the model that comes with the package


def expand(text: str) -> Path:
    """A path as typed, "~" and "~user" spelled out; "~" of a user who is not there stays as it is."""
    path = Path(text)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def home() -> Path:
    """The folder of everything that moss-jt stores for this user.

    Raises:
        StartupError: the user has no home folder, and no other is named.
    """
    chosen = os.environ.get(HOME_VARIABLE)
    if chosen:
        return expand(chosen).absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path.home() / ".cache").absolute() / "moss-jt"
    except RuntimeError as error:
        raise StartupError(
            f"this user has no home folder: set {HOME_VARIABLE} to a folder that you can write"
        ) from error


def jittor_home() -> Path:
    """Jittor's compiled code and its helpers; safe to delete, made again at the next start.

    Links are followed: the path is part of Jittor's own key, and one folder must not count as two.
    """
    return (home() / "jittor").resolve()


def models_dir() -> Path:
    """Native checkpoints: pulled, made by `synth`, or converted on the fly."""
    return home() / "models"


def state_dir() -> Path:
    """Small things to keep: the line history, calibrations."""
    return home() / "state"


def embedded_model() -> Path:
    """The folder of the small model that comes with the package, to be read only."""
    return Path(__file__).parent / "tiny"
