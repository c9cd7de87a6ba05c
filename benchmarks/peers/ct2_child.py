"""The part of ct2.py that runs in the peer's environment; one JSON object of settings in, one out.

It imports nothing of moss_jt: that environment does not have it.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from ctranslate2.specs import common_spec, transformer_spec

WIDTH, INNER, VOCABULARY = 6144, 24576, 107008
SPREAD = 0.02
FIRST_WORD = 3  # after the three special tokens


def write_model(folder: Path, layers: int) -> None:
    """Write an int8 model, unless it is there; matrices of one shape hold the same numbers."""
    if folder.is_dir():
        return
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        layers,
        24,
        pre_norm=True,
        activation=common_spec.Activation.GELUTanh,
        rotary_dim=64,
        rotary_interleave=True,
        parallel_residual=True,
        shared_layer_norm=True,
    )
    numbers = np.random.default_rng(0)
    known: dict[tuple[int, int], Any] = {}

    def matrix(rows: int, columns: int) -> Any:
        if (rows, columns) not in known:
            known[rows, columns] = (numbers.random((rows, columns), np.float32) - 0.5) * (2 * SPREAD)
        return known[rows, columns]

    def norm(into: Any) -> None:
        into.gamma, into.beta = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)

    decoder = spec.decoder
    decoder.embeddings.weight = matrix(VOCABULARY, WIDTH)
    norm(decoder.layer_norm)
    decoder.projection.weight, decoder.projection.bias = matrix(VOCABULARY, WIDTH), np.zeros(VOCABULARY, np.float32)
    for layer in decoder.layer:
        norm(layer.shared_layer_norm)
        layer.self_attention.linear[0].weight = matrix(3 * WIDTH, WIDTH)
        layer.self_attention.linear[1].weight = matrix(WIDTH, WIDTH)
        layer.ffn.linear_0.weight, layer.ffn.linear_0.bias = matrix(INNER, WIDTH), np.zeros(INNER, np.float32)
        layer.ffn.linear_1.weight, layer.ffn.linear_1.bias = matrix(WIDTH, INNER), np.zeros(WIDTH, np.float32)
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = words(0, 3)
    spec.register_vocabulary(words(0, VOCABULARY))
    spec.validate()
    spec.optimize(quantization="int8")
    scratch = folder.with_suffix(".part")
    scratch.mkdir(parents=True, exist_ok=True)
    spec.save(str(scratch))
    scratch.rename(folder)


def words(first: int, end: int) -> list[str]:
    """Tokens by number."""
    return [f"t{number}" for number in range(first, end)]


def cpu_seconds() -> float:
    """Of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def generate(generator: Any, prompt: int, new: int) -> tuple[float, float]:
    """Seconds and processor seconds of answering a random prompt with so many tokens."""
    ids = [f"t{random.randrange(FIRST_WORD, VOCABULARY)}" for _ in range(prompt)]
    began, cpu = time.perf_counter(), cpu_seconds()
    (found,) = generator.generate_batch(
        [ids], max_length=new, min_length=new, sampling_topk=1, include_prompt_in_result=False, end_token=[]
    )
    assert len(found.sequences_ids[0]) == new, "an answer of another length"
    return time.perf_counter() - began, cpu_seconds() - cpu


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest, largest, and how many."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def main() -> None:
    """Settings from the command line, results to stdout."""
    settings = json.loads(sys.argv[1])
    write_model(Path(settings["model"]), settings["layers"])
    generator = ctranslate2.Generator(
        settings["model"],
        device="cpu",
        compute_type=settings["compute"],
        inter_threads=1,
        intra_threads=settings["threads"],
    )
    generate(generator, 4, 2)
    decode, prefill, decode_cpu = [], [], []
    prompt, new = settings["prompt_tokens"], settings["new_tokens"]
    for _ in range(settings["runs"]):  # by differences: a call cannot be timed in parts
        one, one_cpu = generate(generator, 4, 1)
        many, many_cpu = generate(generator, 4, 1 + new)
        decode.append(new / (many - one))
        decode_cpu.append((many_cpu - one_cpu) / new)
        prefill.append(prompt / (generate(generator, 4 + prompt, 1)[0] - one))
    weights = settings["layers"] * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER) + VOCABULARY * WIDTH
    result = {
        "version": ctranslate2.__version__,
        "compute_in_use": generator.compute_type,
        "pass_bytes": weights,
        "prefill_tokens_per_s": spread(prefill),
        "decode_tokens_per_s": spread(decode),
        "decode_cpu_s_per_token": spread(decode_cpu),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
