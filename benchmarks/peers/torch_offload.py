"""transformers with accelerate on a random model of MOSS's shape: in memory, or with its weights on disk.

    python benchmarks/peers/torch_offload.py --build
    python benchmarks/peers/torch_offload.py --mode disk --layers 4 [--dtype bfloat16]

transformers' CodeGen has MOSS's architecture. "plain" keeps every weight in memory, "cpu" is
accelerate's cpu_offload, "disk" its disk_offload from a folder written the first time. The work is
done by torch_child.py in the peer's environment. One JSON line comes last.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers.environment import add_options, built, folder_of, make_environment, python_of, run

from moss_jt.limits import Limits
from moss_jt.record import keep
from moss_jt.startup.machine import logical_cores

PEER = "torch_offload"
PACKAGES = ["torch==2.13.0", "transformers==5.23.0", "accelerate", "numpy"]
CHILD = Path(__file__).with_name("torch_child.py")


def main() -> None:
    """Build, or measure and print the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.add_argument("--mode", choices=["plain", "cpu", "disk"], default="plain")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=8)
    chosen = parser.parse_args()
    folder = folder_of(PEER, chosen.folder)
    if chosen.build:
        folder.mkdir(parents=True, exist_ok=True)
        make_environment(folder, PACKAGES)
        return
    settings = {
        "mode": chosen.mode,
        "dtype": chosen.dtype,
        "layers": chosen.layers,
        "prompt_tokens": chosen.prompt_tokens,
        "new_tokens": chosen.new_tokens,
        "runs": chosen.runs,
        "threads": logical_cores(),
    }
    with Limits() as limits:
        before = limits.memory().per_second
        ended = run(
            [
                str(built(python_of(folder), PEER)),
                str(CHILD),
                json.dumps({**settings, "offload": str(folder / f"offload-{chosen.dtype}-{chosen.layers}")}),
            ]
        )
        after = limits.memory().per_second
    found = json.loads(ended.output.splitlines()[-1])
    found["memory_gb_per_s"] = [round(before / 1e9, 1), round(after / 1e9, 1)]
    print(keep("peer_torch", {"peer": "transformers", **settings, **found}, save=chosen.save))


if __name__ == "__main__":
    main()
