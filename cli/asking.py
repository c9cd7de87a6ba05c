"""Asking the user yes or no."""

from __future__ import annotations

import sys

import click

from moss_jt.errors import ConfigError


def confirm(question: str) -> bool:
    """Ask on stderr; only a yes is a yes.

    Raises:
        ConfigError: nobody sits at the terminal.
    """
    if not sys.stdin.isatty():
        raise ConfigError(
            f"this asks {question!r}, and nobody can answer here: standard input is not a terminal. Add --yes."
        )
    return click.confirm(question, err=True)
