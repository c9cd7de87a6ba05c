"""Steps of training a small model, beside the matrix products that they cannot do without.

    python benchmarks/training.py [--length 512] [--samples 8] [--layers 4] [--width 256] [--vocabulary 8192] [--save]

A step and its products alone (the same sizes, by the same oneDNN, nothing between them) run in turns; the ratio is told
by the clock and by processor time, which other programs on the machine disturb less. One JSON line comes last.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from moss_jt import nodes, startup
from moss_jt.config import MossConfig
from moss_jt.finetune.data import join
from moss_jt.finetune.encoding import Sample
from moss_jt.finetune.settings import TrainSettings
from moss_jt.finetune.start import from_nothing
from moss_jt.finetune.trainer import Job, Trainer
from moss_jt.launch import computing
from moss_jt.record import keep, spread


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("length", 512),
        ("samples", 8),
        ("layers", 4),
        ("width", 256),
        ("vocabulary", 8192),
        ("runs", 7),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--save", action="store_true")
    return parser.parse_args()


def make_trainer(options: argparse.Namespace) -> Trainer:
    """A new model on random tokens, all of them learned."""
    config = MossConfig(
        vocab_size=options.vocabulary,
        n_positions=max(2048, options.length),
        n_embd=options.width,
        n_layer=options.layers,
        n_head=8,
        rotary_dim=options.width // 8,
    )
    rng = np.random.default_rng(0)
    count = options.samples * (options.runs + 1)
    ids = (rng.integers(0, options.vocabulary, options.length).astype(np.int32) for _ in range(count))
    whole = from_nothing(config, seed=0)
    job = Job(whole.network(), whole.make_ops, whole.parameters, join(Sample(one, ()) for one in ids))
    return Trainer(job, TrainSettings(batch_size=options.samples, learning_rate=1e-3, epochs=1))


def make_products(options: argparse.Namespace) -> tuple[Callable[[], None], float]:
    """What runs the products of a step, forward and back, and their operations."""
    jt = startup.import_jittor(device="cpu")
    rng = np.random.default_rng(1)
    tokens, width = options.samples * options.length, options.width

    def random(rows: int, columns: int) -> Any:
        return jt.array(rng.normal(size=(rows, columns)).astype(np.float32))

    layer = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    sizes = [(tokens, n, k) for n, k in layer] * options.layers + [(1024, options.vocabulary, width)] * (tokens // 1024)
    sets = {size: (random(size[0], size[2]), random(size[1], size[2]), random(size[0], size[1])) for size in sizes}

    def run() -> None:
        with computing():
            for size in sizes:
                x, weight, gradient = sets[size]
                for product in (
                    nodes.multiply(x, weight, turn_b=True),
                    nodes.multiply(gradient, weight),
                    nodes.multiply(gradient, x, turn_a=True),
                ):
                    product.sync()

    return run, sum(6.0 * t * n * k for t, n, k in sizes)


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    clock, used = time.perf_counter(), cpu_seconds()
    run()
    return time.perf_counter() - clock, cpu_seconds() - used


def cpu_seconds() -> float:
    """Processor time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure in turns and tell."""
    options = parse()
    trainer = make_trainer(options)
    products, operations = make_products(options)
    trainer.step()
    products()
    steps, alone = [], []
    for _ in range(options.runs):
        steps.append(timed(trainer.step))
        alone.append(timed(products))
    tokens = options.samples * options.length
    report = {
        "tokens_per_step": tokens,
        "parameters": trainer.job.parameters.count,
        "tokens_per_s": spread([tokens / clock for clock, _ in steps]),
        "tokens_per_cpu_s": spread([tokens / used for _, used in steps]),
        "products_gflop_per_s": spread([operations / clock / 1e9 for clock, _ in alone]),
        "products_gflop_per_cpu_s": spread([operations / used / 1e9 for _, used in alone]),
        "products_of_step": spread([a[0] / s[0] for a, s in zip(alone, steps, strict=True)]),
        "products_of_step_cpu": spread([a[1] / s[1] for a, s in zip(alone, steps, strict=True)]),
    }
    print(keep("training", report, save=options.save))


if __name__ == "__main__":
    main()
