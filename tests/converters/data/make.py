"""Make the small .bin files of this folder with a real torch; run as `python make.py` where torch is installed.

expected.json holds what torch itself reads back from each file: dtype, shape and row-major bytes of
each tensor. Files with the same contents share an entry.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def tensors() -> dict[str, Any]:
    """Views, shared storages, parameters and odd shapes."""
    torch.manual_seed(7)
    base = torch.randn(6, 5)
    shared = torch.arange(12, dtype=torch.int32)
    return {
        "plain": base,
        "transposed": base.t(),
        "column": base[:, 1:3],
        "row": base[4],
        "stepped": base[::2, ::3],
        "permuted": torch.arange(24, dtype=torch.float16).reshape(2, 3, 4).permute(2, 0, 1),
        "parameter": torch.nn.Parameter(torch.randn(3, dtype=torch.float64)),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "expanded": torch.tensor([3, 4], dtype=torch.int64).expand(3, 2),
        "shared": shared,
        "shared_tail": shared[5:].reshape(1, 7, 1),
        "mask": torch.tril(torch.ones(3, 3, dtype=torch.bool)).view(1, 1, 3, 3),
        "old_mask": torch.tril(torch.ones(2, 2, dtype=torch.uint8)),
        "bytes": torch.tensor([-128, 127, 0], dtype=torch.int8),
        "short": torch.tensor([[-300], [301]], dtype=torch.int16),
    }


def state_dict() -> dict[str, Any]:
    """What a module gives: an OrderedDict that carries the versions of its parts."""
    with torch.no_grad():
        module = torch.nn.Linear(3, 2)
        module.weight.copy_(torch.arange(6.0).reshape(2, 3))
        module.bias.copy_(torch.tensor([-1.0, 1.0]))
    state: dict[str, Any] = module.state_dict()
    return state


def main() -> None:
    """Write every file and what torch reads from it."""
    several = OrderedDict(tensors())
    legacy = {"_use_new_zipfile_serialization": False}
    optimizer = {"state": {0: {"step": torch.ones(2)}}}
    new_types = {
        "unsigned": torch.tensor([1, 65535], dtype=torch.uint16),
        "tiny": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn),
    }
    files: dict[str, tuple[str, Any, dict[str, Any]]] = {
        "zip.bin": ("several", several, {}),
        "legacy.bin": ("several", several, legacy),
        "module.bin": ("module", state_dict(), {}),
        "module-legacy.bin": ("module", state_dict(), legacy),
        "protocol4.bin": ("module", state_dict(), {"pickle_protocol": 4}),
        "wrapped.bin": ("module", {"epoch": 3, "lr": 0.5, "state_dict": state_dict(), "optimizer": optimizer}, {}),
        "wrapped-legacy.bin": ("module", {"state_dict": state_dict(), "optimizer": optimizer}, legacy),
        "new-types.bin": ("new-types", new_types, {}),
        "no-checksums.bin": ("module", state_dict(), {}),
    }
    expected: dict[str, Any] = {"contents": {}, "files": {}}
    for name, (contents, value, options) in files.items():
        torch.serialization.set_crc32_options(name != "no-checksums.bin")
        torch.save(value, HERE / name, **options)
        read = torch.load(HERE / name, weights_only=False)  # we wrote it a moment ago
        described = {key: describe(tensor) for key, tensor in read.get("state_dict", read).items()}
        assert expected["contents"].setdefault(contents, described) == described, name
        expected["files"][name] = contents
    (HERE / "expected.json").write_text(json.dumps(expected, separators=(",", ":")).replace('"],"', '"],\n"') + "\n")


def describe(tensor: torch.Tensor) -> list[Any]:
    """Dtype, shape, and the bytes of the numbers in row-major order."""
    flat = tensor.detach().contiguous().reshape(-1)
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), bytes(flat.view(torch.uint8).tolist()).hex()]


if __name__ == "__main__":
    main()
