"""The errors that moss-jt raises on purpose.

    MossError
    ├── ConfigError         a config.json or an option has a value that cannot work
    ├── CheckpointError     a file of weights or of a tokenizer is broken, missing or not what it says
    ├── ShapeError          an array handed to a public function has the wrong shape or dtype
    ├── StartupError        Jittor cannot be started correctly on this machine
    ├── KernelError         a compiled kernel could not be built or failed
    ├── DeviceMemoryError   the memory allowed is too small for what was asked
    ├── DiskError           not enough room, or the disk failed while reading or writing
    ├── HubError            a model could not be fetched
    ├── ConversationError   a message is too long, or there is no answer to undo, retry or continue
    ├── ServerError         a server that was asked refused, or cannot be reached
    └── ToolError           a tool cannot be used, or has no result
        └── ToolLimitError  a tool was stopped: it took too long, or needed too much memory

A message says what was wanted, what was found and the next step, with the real values in one line.
The command line prints it as it is and exits with 1.
"""

from __future__ import annotations


class MossError(Exception):
    """Base of everything that moss-jt raises on purpose."""


class ConfigError(MossError):
    """A configuration or option has a value that cannot work."""


class CheckpointError(MossError):
    """A file of weights or of a tokenizer is broken, missing or not what it says."""


class ShapeError(MossError):
    """An array handed to a public function has the wrong shape or dtype."""


class StartupError(MossError):
    """Jittor cannot be started correctly on this machine."""


class KernelError(MossError):
    """A compiled kernel could not be built or failed; `request` is the engine's request that it concerns, if one."""

    def __init__(self, message: str, *, request: int | None = None) -> None:
        super().__init__(message)
        self.request = request


class DeviceMemoryError(MossError):
    """The memory allowed is too small for what was asked."""


class DiskError(MossError):
    """Not enough room on a disk, or the disk failed while reading or writing."""


class HubError(MossError):
    """A model could not be fetched from a hub."""


class ConversationError(MossError):
    """A chat cannot do what was asked: the message is too long, or there is nothing to undo, retry or continue."""


class ServerError(MossError):
    """A server refused, in its own words, or cannot be reached.

    Args:
        status: of its answer; 0 where there was none.
        code: its word for programs.
    """

    def __init__(self, message: str, *, status: int = 0, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class ToolError(MossError):
    """A tool cannot be used as asked, or has no result."""


class ToolLimitError(ToolError):
    """A tool was stopped because it took too long or needed too much memory."""
