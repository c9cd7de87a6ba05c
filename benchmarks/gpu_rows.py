"""The rows of a part of the GPU suite, told one by one."""

from __future__ import annotations

import json
import sys
from typing import Any


class Rows(dict[str, Any]):
    """What a part has found. Each row goes to stderr as soon as it is there: so a part that is broken off, by a limit of
    time or by a fault of the device that nothing survives, has told what it had."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        print(json.dumps({name: value}, ensure_ascii=False, default=str), file=sys.stderr, flush=True)
