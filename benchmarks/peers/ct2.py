"""CTranslate2 with int8 on a random model of MOSS's shape.

    python benchmarks/peers/ct2.py --build
    python benchmarks/peers/ct2.py --layers 4 [--compute int8]

The work is done by ct2_child.py in the peer's environment; the model is written there the first time.
One JSON line comes last.
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

PEER = "ct2"
PACKAGES = ["ctranslate2==4.8.5", "numpy"]
CHILD = Path(__file__).with_name("ct2_child.py")


def main() -> None:
    """Build, or measure and print the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.add_argument("--compute", default="int8", help="CTranslate2's compute type")
    parser.add_argument("--layers", type=int, default=4)
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
        "compute": chosen.compute,
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
                json.dumps({**settings, "model": str(folder / f"int8-{chosen.layers}")}),
            ]
        )
        after = limits.memory().per_second
    found = json.loads(ended.output.splitlines()[-1])
    found["memory_gb_per_s"] = [round(before / 1e9, 1), round(after / 1e9, 1)]
    print(keep("peer_ct2", {"peer": "ctranslate2", **settings, **found}, save=chosen.save))


if __name__ == "__main__":
    main()
