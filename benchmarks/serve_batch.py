"""Eight answers at once against one, through the server, with weights that are read from disk for each pass.

    python benchmarks/serve_batch.py [--memory 6GiB] [--batch 8] [--prompt 64] [--new 32] [--repeats 3] [--save]

The model is the full-size int4 one of random weights, made once on disk. A run asks for one continuation, or for
`--batch` at the same moment; each has a prompt of its own of `--prompt` tokens and gives exactly `--new`. Its rate is
all new tokens over the time from the first request to the last answer, reading of the prompts included. Runs of one
and of eight take turns, and what counts is the median of the ratios of neighbours. Memory that other programs leave
free would hold the files in the page cache; so it is taken away meanwhile, unless --page-cache is given: let nothing
else run.
Exit code 1 where the median ratio is under 4, as issue "Serving" asks. One JSON line comes last.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from budgets import small_machine
from random_model import add_options, folder_of
from serving import Serving

from moss_jt.bench import parse_synthetic
from moss_jt.memory import parse_size
from moss_jt.record import keep, spread

ASKED = 4.0


def rate(serving: Serving, count: int, chosen: argparse.Namespace, seeds: random.Random) -> float:
    """New tokens a second of `count` continuations at once."""
    vocabulary = parse_synthetic(chosen.synthetic, layers=chosen.layers).vocab_size
    bodies = [
        {
            "prompt": [seeds.randrange(vocabulary) for _ in range(chosen.prompt)],
            "max_tokens": chosen.new,
            "seed": seeds.getrandbits(31),
            "ignore_eos": True,
        }
        for _ in range(count)
    ]
    with ThreadPoolExecutor(count) as pool:
        began = time.monotonic()
        answers = list(pool.map(lambda body: serving.ask("POST", "/v1/completions", body, 0), bodies))
        seconds = time.monotonic() - began
    wrong = [answer for status, answer in answers if status != 200]
    if wrong:
        raise SystemExit(f"the server refused: {wrong[0]}")
    tokens: list[int] = [answer["usage"]["completion_tokens"] for _, answer in answers]
    if set(tokens) != {chosen.new}:
        raise SystemExit(f"answers have {sorted(set(tokens))} tokens where {chosen.new} were asked. Raise --context.")
    return sum(tokens) / seconds


def main() -> int:
    """Measure, then print the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser, layers=34)
    parser.add_argument("--memory", default="6GiB")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--context", type=int, default=256, help="longest conversation, as for moss-jt serve")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--page-cache", action="store_true", help="leave the machine its memory")
    chosen = parser.parse_args()
    model, seeds = folder_of(chosen), random.Random(0)
    options = ["--model", str(model), "--memory", chosen.memory, "--parallel", str(chosen.batch)]
    options += ["--context", str(chosen.context), "--answer-time", "3600", "--wait-time", "3600"]
    single: list[float] = []
    batch: list[float] = []
    with (
        contextlib.nullcontext() if chosen.page_cache else small_machine(parse_size(chosen.memory)),
        tempfile.TemporaryDirectory() as folder,
        Serving(Path(folder), 1, options) as serving,
    ):
        rate(serving, 1, argparse.Namespace(**{**vars(chosen), "new": 2}), seeds)  # everything is in its place
        for _ in range(chosen.repeats):
            single.append(rate(serving, 1, chosen, seeds))
            batch.append(rate(serving, chosen.batch, chosen, seeds))
            print(f"{single[-1]:.3f} tokens/s alone, {batch[-1]:.3f} tokens/s of {chosen.batch}", flush=True)
        memory = serving.memory()
    ratios = [many / one for one, many in zip(single, batch, strict=True)]
    results = {
        "model": model.name,
        "memory": chosen.memory,
        "page_cache": chosen.page_cache,
        "batch": chosen.batch,
        "prompt": chosen.prompt,
        "new": chosen.new,
        "alone_tokens_per_s": spread(single, 3),
        "batch_tokens_per_s": spread(batch, 3),
        "ratio": spread(ratios, 2),
        "memory_mib": {part: size >> 20 for part, size in memory.items()},
    }
    print(keep("serve_batch", results, save=chosen.save))
    return int(statistics.median(ratios) < ASKED)


if __name__ == "__main__":
    sys.exit(main())
