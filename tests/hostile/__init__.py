"""Checkpoints that must be refused: each a folder, with the words that its refusal must hold.

`make_hostile(folder)` writes all of them, for the reader's own test and for those of the commands.
Where a pickle tries to run something, that would leave a file RAN in the checkpoint's folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from hostile.base import Hostile
from hostile.files import FILES, INDEXES, SAFETENSORS, ZIPS
from hostile.pickles import OLD, PICKLES, RUNNING, TENSORS

CONFIG = {
    "model_type": "moss",
    "vocab_size": 4,
    "n_positions": 16,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 4,
    "rotary_dim": 2,
    "wbits": 32,
}

CASES: list[Hostile] = [*RUNNING, *PICKLES, *TENSORS, *ZIPS, *OLD, *SAFETENSORS, *INDEXES, *FILES]


def make_hostile(folder: Path) -> list[tuple[str, Path]]:
    """Write every bad checkpoint into a folder of its own under `folder`; gives (name, folder) of each."""
    made = []
    for case in CASES:
        path = folder / case.name
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(CONFIG))
        case.write(path)
        made.append((case.name, path))
    return made
