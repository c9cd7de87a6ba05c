"""A long context: bytes per second with 2,048 tokens cached against 64, and what turn 2 of a chat computes.

    python benchmarks/long_context.py [--synthetic moss-moon-003-int4] [--layers 34] [--kv fp16]

Answers that end at either length alternate in one process, each from its own cached prompt. Bytes are
those of the weights and of the keys and values that a pass reads. One JSON line comes last; exit code 1
where the median ratio is below 0.85, or where a second turn prefills more than its new tokens.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from moss_jt.bench import Bench, Settings, parse_synthetic, pass_bytes, synthetic_model
from moss_jt.config import GenerationConfig
from moss_jt.engine import Engine
from moss_jt.limits import Limits
from moss_jt.memory import peak_memory
from moss_jt.messages import FinishedEvent, Request, TokenEvent
from moss_jt.record import keep, spread
from moss_jt.runner import Model

ASKED = 0.85


def lengths(model: Model, settings: Settings) -> dict[str, Any]:
    """Bytes per second at each length, in turns."""
    with Limits() as limits:
        bench = Bench(model, settings, limits)
        bench.warm_up()
        prompts = {count: [bench.prompt(count - settings.new_tokens)] for count in settings.contexts}
        for count, prompt in prompts.items():
            bench.time_answers(prompt, count, 1)
        weights = pass_bytes(bench.sizes)
        kv = {count: bench.engine.runner.cache.token_bytes * (count - settings.new_tokens // 2) for count in prompts}
        rates: dict[int, list[float]] = {count: [] for count in prompts}
        tokens: dict[int, list[float]] = {count: [] for count in prompts}
        for _ in range(settings.pairs):
            for count, prompt in prompts.items():
                each_s = bench.time_answers(prompt, count, settings.new_tokens).each_s
                rates[count].append((weights + kv[count]) / each_s)
                tokens[count].append(1 / each_s)
    short, long = settings.contexts
    return {
        "weight_bytes": weights,
        "kv_bytes": {str(count): kv[count] for count in prompts},
        "tokens_per_s": {str(count): spread(tokens[count]) for count in prompts},
        "gb_per_s": {str(count): spread([rate / 1e9 for rate in rates[count]]) for count in prompts},
        "ratio": spread([b / a for a, b in zip(rates[short], rates[long], strict=True)]),
    }


def second_turn(model: Model, first: int, new: int) -> dict[str, int]:
    """What is computed for a second turn of `new` tokens, after one of `first` tokens and its answer.

    The last token of an answer is not in the cache: it was said, and nothing came after it yet.
    """
    answer = 8
    engine = Engine(model, slots=1, tokens=first + 2 * answer + new)
    config = GenerationConfig(do_sample=False, repetition_penalty=1.0, max_new_tokens=answer)
    said = [number % model.config.vocab_size for number in range(7, 7 + first)]
    computed = 0
    for message in (range(0), range(new)):
        said += message
        engine.submit(Request(tuple(said), config, conversation="chat"))
        while engine.busy:
            for event in engine.step():
                if isinstance(event, TokenEvent):
                    said.append(event.id)
                elif isinstance(event, FinishedEvent):
                    computed = event.prompt_tokens - event.reused_tokens
    return {"first_turn": first, "new_tokens": new, "last_of_answer": 1, "computed": computed}


def main() -> int:
    """Measure, then print the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--synthetic", default="moss-moon-003-int4")
    parser.add_argument("--layers", type=int, default=34)
    parser.add_argument("--kv", choices=["fp32", "fp16", "int8"], default="fp16")
    parser.add_argument("--short", type=int, default=64)
    parser.add_argument("--long", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--save", action="store_true", help="keep the line under benchmarks/results/")
    chosen = parser.parse_args()
    settings = Settings((8,), (chosen.short, chosen.long), chosen.new_tokens, pairs=chosen.pairs)
    config = parse_synthetic(chosen.synthetic, layers=chosen.layers)
    model = synthetic_model(config, kv=chosen.kv)
    found = lengths(model, settings)
    turn = second_turn(model, first=chosen.short, new=20)
    failures = []
    if found["ratio"]["median"] < ASKED:
        failures.append(f"ratio is {found['ratio']['median']:.3f}, {ASKED} was asked")
    if turn["computed"] != turn["new_tokens"] + turn["last_of_answer"]:
        failures.append(f"turn 2 computed {turn['computed']} tokens for {turn['new_tokens']} new ones")
    described = {"model": config.name, "layers": config.n_layer, "kv": chosen.kv}
    line = {**described, **found, "turn_2": turn, "peak_memory_bytes": peak_memory(), "missed": failures}
    print(keep("long_context", line, save=chosen.save))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
