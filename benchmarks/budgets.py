"""The same answers in any memory: a full-size model under small budgets, against the disk and llama.cpp.

    python benchmarks/budgets.py [--budgets 2GiB,4GiB,6GiB] [--reference 16GiB]

Under each budget `moss-jt bench` runs in a process of its own, on a machine that a hog has made as small
(peers/hog.py leaves the budget and a quarter of a GiB); its answers must be those of the reference, its
speed is compared with what the disk gives in the same run, and it must write nothing. Then llama.cpp
maps its own model of that shape (Q4_0) in the same memory. One JSON line comes last; exit code 1 where
an answer differs, something is written, the peak passes the budget, the speed is below 0.9 of the
disk's, or below twice llama.cpp's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from peers.environment import folder_of as peers_folder
from peers.hog import Hog
from peers.llamacpp import PEER, peer_of
from random_model import add_options, folder_of

from moss_jt.bench import parse_synthetic
from moss_jt.memory import GIB, available_memory, parse_size
from moss_jt.record import keep, spread

BESIDE = GIB // 4  # for the measuring process and the system
ASKED_OF_DISK, ASKED_OF_PEER = 0.9, 2.0
PEER_OPTIONS = ["-lm", "mmap", "--repack", "0", "--no-warmup"]  # a repacked copy would not fit


def ours(model: Path, memory: int, *, new_tokens: int, pairs: int, kv: str) -> dict[str, Any]:
    """The results of `moss-jt bench` under a budget."""
    command = [sys.executable, "-m", "moss_jt.cli", "bench", "--model", str(model), "--json", "--kv", kv]
    command += ["--memory", str(memory), "--prompt-tokens", "32", "--context", "64", "--pairs", str(pairs)]
    command += ["--new-tokens", str(new_tokens)]
    root = Path(__file__).resolve().parent.parent
    # its progress must not go to a file: that would count as written
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["results"]
    return results


def small_machine(memory: int) -> contextlib.AbstractContextManager[object]:
    """A machine with so much memory left, and a little more; as it is where it has no more."""
    leave = memory + BESIDE
    return Hog(leave) if available_memory() > leave else contextlib.nullcontext()


def row_of(memory: int, results: dict[str, Any], reference: list[int], peer: list[float]) -> dict[str, Any]:
    """What was measured under a budget, and what was missed."""
    (decode,) = results["decode"]
    row = {
        "memory_bytes": memory,
        "peak_memory_bytes": results["peak_memory_bytes"],
        "written_bytes": results["written_bytes"],
        "same_answer": decode["same_answers"] and decode["answer"] == reference,
        "streamed_bytes": decode.get("streamed_bytes", 0),
        "tokens_per_s": decode["tokens_per_s"],
        "disk_limit": decode.get("disk_limit"),
        "of_disk_limit": decode.get("of_disk_limit"),
        "of_memory_limit": decode["of_limit"],
        "peer_tokens_per_s": spread(peer) if peer else None,
        "peer_ratio": spread([decode["tokens_per_s"]["median"] / rate for rate in peer]) if peer else None,
    }
    return {**row, "missed": missed(row)}


def missed(row: dict[str, Any]) -> list[str]:
    """What a row lacks, in words."""
    found = []
    if not row["same_answer"]:
        found.append("another answer than the reference's")
    if row["written_bytes"]:
        found.append(f"{row['written_bytes']} bytes were written")
    if row["peak_memory_bytes"] > row["memory_bytes"]:
        found.append(f"the peak is {row['peak_memory_bytes'] - row['memory_bytes']} bytes above the budget")
    if row["of_disk_limit"] and row["of_disk_limit"]["median"] < ASKED_OF_DISK:
        found.append(f"{row['of_disk_limit']['median']:.3f} of the disk's speed, {ASKED_OF_DISK} was asked")
    if row["peer_ratio"] and row["peer_ratio"]["median"] < ASKED_OF_PEER:
        found.append(f"{row['peer_ratio']['median']:.2f} times llama.cpp, {ASKED_OF_PEER} was asked")
    return found


def main() -> int:
    """Measure, then print the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser, layers=34)
    parser.add_argument("--budgets", default="2GiB,4GiB,6GiB")
    parser.add_argument("--reference", default="16GiB")
    parser.add_argument("--kv", choices=["fp32", "fp16", "int8"], default="fp16")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--peer", choices=["llamacpp", "none"], default="llamacpp")
    parser.add_argument("--peer-runs", type=int, default=2, help="of llama.cpp under each budget")
    parser.add_argument("--peer-tokens", type=int, default=3)
    parser.add_argument("--peers-folder", type=Path, help="where peers were built; else MOSS_JT_HOME/peers")
    chosen = parser.parse_args()
    model = folder_of(chosen)
    config = parse_synthetic("moss-moon-003-fp16", layers=chosen.layers)
    peer = None
    if chosen.peer == "llamacpp":
        peer = peer_of(peers_folder(PEER, chosen.peers_folder), config, "q4_0", "q4_0")
    settings = {"new_tokens": chosen.new_tokens, "kv": chosen.kv}
    whole = ours(model, parse_size(chosen.reference), pairs=1, **settings)
    reference = whole["decode"][0]["answer"]
    rows = []
    for memory in [parse_size(word) for word in chosen.budgets.split(",")]:
        rates: list[float] = []
        with small_machine(memory):
            results = ours(model, memory, pairs=chosen.pairs, **settings)
            for _ in range(chosen.peer_runs if peer is not None else 0):
                assert peer is not None, "there are runs for a peer only"
                rates += peer.tokens_per_s(new=chosen.peer_tokens, options=PEER_OPTIONS)[0]
        rows.append(row_of(memory, results, reference, rates))
        print(json.dumps(rows[-1]), flush=True)
    line = {"model": model.name, "layers": chosen.layers, "kv": chosen.kv, "answer": reference, "budgets": rows}
    print(keep("budgets", line, save=chosen.save))
    return int(any(row["missed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
