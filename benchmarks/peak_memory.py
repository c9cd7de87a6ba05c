"""The budget holds: the peak memory of processes under random budgets, through load, prefill, answers and exit.

    python benchmarks/peak_memory.py                       4 layers, 200 budgets
    python benchmarks/peak_memory.py --layers 34 --count 10 --new-tokens 16 --long

Budgets are drawn between the smallest that is accepted and what holds every weight, and each is given to
a process of its own, which loads the model, answers, ends the conversation and answers again. With --long
the first of them answers a prompt of 2,000 tokens with 48. One JSON line comes last; exit code 1 where
VmHWM passes a budget, or a process fails.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from random_model import add_options, folder_of

from moss_jt.checkpoint import Checkpoint
from moss_jt.config import GenerationConfig
from moss_jt.engine import Engine
from moss_jt.errors import ConfigError
from moss_jt.load import load_model
from moss_jt.memory import MIB, format_size, parse_size, peak_memory
from moss_jt.messages import FinishedEvent, Request
from moss_jt.plan import matrix_sizes
from moss_jt.record import keep, spread

PROMPT = 24  # tokens
SECOND_ANSWER = 2
LONG = (2000, 48)  # tokens of the prompt, of the answer
SPARE = 64 * MIB  # of the largest budget, above what holds everything


def child(folder: Path, memory: int, prompt: int, new: int, kv: str | None) -> dict[str, Any]:
    """Load and answer twice in this process; what it took."""
    began = time.perf_counter()
    model = load_model(folder, compute="fast", memory=memory, kv=kv, max_tokens=prompt + new)
    loaded = time.perf_counter()
    engine = Engine(model)
    for name, length, count in (("first", prompt, new), ("second", PROMPT, SECOND_ANSWER)):
        config = GenerationConfig(do_sample=False, repetition_penalty=1.0, max_new_tokens=count)
        ids = tuple(number % model.config.vocab_size for number in range(3, 3 + length))
        engine.submit(Request(ids, config, conversation=name))
        finished = 0
        while engine.busy:
            finished += sum(isinstance(event, FinishedEvent) for event in engine.step())
        assert finished == 1, "an answer has an end"
        engine.forget(name)
    model.store.close()
    return {
        "memory_bytes": memory,
        "streamed_bytes": model.store.streamed_bytes,
        "load_s": round(loaded - began, 2),
        "seconds": round(time.perf_counter() - began, 2),
        "peak_memory_bytes": peak_memory(),
    }


def in_process(folder: Path, memory: int, prompt: int, new: int, kv: str | None) -> dict[str, Any]:
    """`child` in a process of its own; {"error": …} where it failed."""
    arguments = json.dumps([str(folder), memory, prompt, new, kv])
    done = subprocess.run([sys.executable, __file__, "--child", arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"memory_bytes": memory, "error": (done.stderr.strip().splitlines() or ["no words"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def smallest(folder: Path, tokens: int, kv: str | None) -> int:
    """The least budget that a process of its own accepts, asked of one; see `child` for the rest."""
    refused = in_process(folder, 1, tokens, 1, kv)
    words = re.search(r"give at least ([\d.]+ ?\w+)", refused.get("error", ""))
    if words is None:
        raise SystemExit(f"the smallest budget is not told: {refused}")
    return parse_size(words.group(1)) + MIB  # another process may be a little larger before it loads


def largest(folder: Path, low: int) -> int:
    """A budget that holds every weight of a pass, and a little more; `low` is the smallest."""
    checkpoint = Checkpoint.open(folder)
    sizes = matrix_sizes(checkpoint.config, {name: entry.layout for name, entry in checkpoint.entries.items()})
    return low + sum(size.nbytes for size in sizes) + SPARE


def main() -> int:
    """Draw budgets, run, print the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser, layers=4)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=8, help="of each answer but the long one")
    parser.add_argument("--seed", type=int, default=0, help="of the budgets")
    parser.add_argument("--kv", choices=["fp32", "fp16", "int8"])
    parser.add_argument("--long", action="store_true", help="one long prompt among them")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        folder, memory, prompt, new, kv = json.loads(chosen.child)
        print(json.dumps(child(Path(folder), memory, prompt, new, kv)))
        return 0
    folder = folder_of(chosen)
    numbers = random.Random(chosen.seed)
    short = (PROMPT, chosen.new_tokens)
    low = smallest(folder, sum(short), chosen.kv)
    high = largest(folder, low)
    low_long = smallest(folder, sum(LONG), chosen.kv) if chosen.long else low
    rows = []
    for number in range(chosen.count):
        prompt, new = LONG if chosen.long and number == 0 else short
        memory = numbers.randrange(low_long if prompt == LONG[0] else low, high)
        rows.append({**in_process(folder, memory, prompt, new, chosen.kv), "prompt": prompt, "new": new})
        print(json.dumps(rows[-1]), flush=True)
    line, failures = summary(rows, low, high)
    print(keep("peak_memory", {"model": folder.name, "layers": chosen.layers, **line}, save=chosen.save))
    return int(bool(failures))


def summary(rows: list[dict[str, Any]], low: int, high: int) -> tuple[dict[str, Any], list[str]]:
    """The line, and what went wrong, in words."""
    failures = [f"{format_size(row['memory_bytes'])}: {row['error']}" for row in rows if "error" in row]
    done = [row for row in rows if "error" not in row]
    failures += [
        f"{format_size(row['memory_bytes'])}: the peak is {row['peak_memory_bytes'] - row['memory_bytes']} bytes above it"
        for row in done
        if row["peak_memory_bytes"] > row["memory_bytes"]
    ]
    streamed = [row for row in done if row["streamed_bytes"]]
    line = {
        "smallest_bytes": low,
        "largest_bytes": high,
        "processes": len(rows),
        "streamed": len(streamed),
        "unused_bytes": spread([row["memory_bytes"] - row["peak_memory_bytes"] for row in done]) if done else None,
        "unused_bytes_streamed": spread([row["memory_bytes"] - row["peak_memory_bytes"] for row in streamed])
        if streamed
        else None,
        "longest": max((row["prompt"] + row["new"] for row in done), default=0),
        "missed": failures,
    }
    return line, failures


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        sys.exit(str(error))
