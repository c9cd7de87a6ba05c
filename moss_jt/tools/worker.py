"""What runs in the process that computes for Calculate and Solve.

A line of JSON comes in, {"task": …, "text": …}, a line goes out: {"answer": …} or {"error": …}, and "sound", which is
false where the process ends with this answer, as memory or the stack ran out within it. Before anything is imported,
the process gives up the right to more memory than it is told, to write files and to leave a core dump. The parent
kills it when an answer takes too long (moss_jt.tools.sandbox).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

READY = b'{"ready": true}\n'
MAX_LINE = 1 << 16  # bytes of a request
TOO_LARGE = "the computation needs too much memory."


def limit(memory: int) -> None:
    """Give up memory beyond `memory` bytes, files and core dumps, for good."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def tasks() -> Mapping[str, Callable[[str], str]]:
    """What can be asked for; importing it is what takes long, so it is done before READY is said."""
    from moss_jt.tools.calculate import calculate
    from moss_jt.tools.equations import solve

    calculate("sqrt(2) + sin(1)")
    solve("x^2 - x = 1; x")
    return {"calculate": calculate, "solve": solve}


def answer(known: Mapping[str, Callable[[str], str]], line: bytes) -> tuple[dict[str, str], bool]:
    """The answer to a line, and whether the process is still sound."""
    from moss_jt.errors import ToolError

    try:
        request: dict[str, Any] = json.loads(line)
        return {"answer": known[request["task"]](request["text"])}, True
    except ToolError as error:
        return {"error": str(error)}, True
    except MemoryError:
        return {"error": TOO_LARGE}, False
    except RecursionError:
        return {"error": "the expression is nested too deeply."}, False
    except Exception as error:  # of SymPy, whose errors are of every kind; nothing may pass but an answer
        return {"error": f"{type(error).__name__} within the computation."}, True


def serve(memory: int) -> int:
    """Answer until nothing more comes."""
    limit(memory)
    sys.setrecursionlimit(5000)
    known = tasks()
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    replies.write(READY)
    for line in iter(lambda: sys.stdin.buffer.readline(MAX_LINE), b""):
        reply, sound = answer(known, line)
        replies.write(json.dumps({**reply, "sound": sound}).encode("ascii") + b"\n")
        if not sound:
            return 1
    return 0
