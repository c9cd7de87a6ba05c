"""A pseudo-terminal with moss-jt in it, for tests that type and look."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pexpect

ROOT = Path(__file__).parent.parent
ESCAPES = re.compile(r"\x1b(\[[0-9;?>=]*[A-Za-z]|[()][A-Z0-9]|[=>])|\r")
CTRL_C, CTRL_D, ESC, UP = "\x03", "\x04", "\x1b", "\x1b[A"
PASTE = ("\x1b[200~", "\x1b[201~")
READY, TAKEN = "\x1b[?2004h", "\x1b[?2004l"  # bracketed paste is switched on while a message is typed
TIMEOUT_S = 30


class Terminal:
    """A chat that somebody types into."""

    def __init__(
        self, folder: Path, program: Sequence[str], environment: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        variables = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TERM": "xterm-256color",
            "PROMPT_TOOLKIT_NO_CPR": "1",  # nobody here answers where the cursor is
            **environment,
        }
        self.child: pexpect.spawn[str] = pexpect.spawn(
            sys.executable,
            list(program),
            cwd=folder,
            env=variables,
            encoding="utf-8",
            timeout=TIMEOUT_S,
            dimensions=(40, 120),
        )
        self.child.delaybeforesend = None

    def await_prompt(self) -> str:
        """Everything shown until the program waits for a message, without escape codes."""
        self.child.expect_exact(READY)
        return ESCAPES.sub("", self.child.before or "")

    def type(self, keys: str) -> None:
        """Press keys."""
        self.child.send(keys)

    def say(self, text: str) -> str:
        """Type a message, press Enter, and give what is shown until the next prompt."""
        self.child.send(text + "\r")
        self.child.expect_exact(TAKEN)
        return self.await_prompt()

    def see(self, text: str) -> None:
        """Wait until this is shown."""
        self.child.expect_exact(text)

    def end(self) -> str:
        """Wait until the program is over; its last words. It must leave with 0."""
        self.child.expect(pexpect.EOF)
        self.child.close()
        assert self.child.exitstatus == 0
        return ESCAPES.sub("", self.child.before or "")
