"""The budget of a whole process: its peak memory, its smallest size, what it writes, and what it leaves in the page cache."""

from __future__ import annotations

import json
import mmap
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
from faulty import Runs, build_shim, small_model
from residency import cached_bytes

from moss_jt.memory import MIB, parse_size

CONTEXT = 256
WHOLE = 40 * MIB  # above the smallest budget: then every weight is held, and something is left

CHAT = """
from moss_jt import GenerationConfig, load_model
from moss_jt.chat import ChatSession
from moss_jt.engine import Engine
from moss_jt.template import choose_template
model = load_model(folder, compute=compute, kv=kv, memory=memory, max_tokens=context)
config = GenerationConfig(do_sample=False, max_new_tokens=24)
form = choose_template("auto", model.config, tools=False)
chat = ChatSession(Engine(model), model.tokenizer, form, system="", config=config)
result["turns"] = 0
for turn in range(6):
    for event in chat.reply("more " * (turn + 1)):
        pass
    result["turns"] += 1
chat.close()
"""

ENGINES = """
import numpy as np
from moss_jt import GenerationConfig, load_model
from moss_jt.engine import Engine
from moss_jt.messages import Request, TokenEvent
model = load_model(folder, compute=compute, kv=kv, memory=memory, max_tokens=context)
result["streamed"], result["tokens"] = model.store.streamed_bytes, []
engine = Engine(model)
ids = tuple(np.random.default_rng(0).integers(0, 256, model.max_tokens - 8).tolist())
for prompt in (ids, ids[:5], ids):
    engine.submit(Request(prompt, GenerationConfig(do_sample=False, max_new_tokens=8)))
    while engine.busy:
        result["tokens"] += [event.id for event in engine.step() if isinstance(event, TokenEvent)]
result["positions"] = model.max_tokens
"""

WRITTEN = """
from moss_jt import GenerationConfig, generate, load_model
def counts():
    with open("/proc/self/io") as file:
        return {line.split(":")[0]: int(line.split(":")[1]) for line in file}
model = load_model(folder, compute="fast", memory=memory, max_tokens=256)
list(generate(model, prompt, GenerationConfig(do_sample=False, max_new_tokens=2)))
before = counts()
list(generate(model, prompt, GenerationConfig(do_sample=False, max_new_tokens=16)))
after = counts()
result["written"] = {name: after[name] - before[name] for name in ("wchar", "write_bytes")}
result["read"] = model.store.reading.disk_bytes + model.store.reading.cache_bytes
result["direct"] = model.store.reading.direct
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("budget") / "model")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def found() -> dict[str, int]:
    """The smallest budget, asked for once."""
    return {}


@pytest.fixture
def runs(own_home: Path, tmp_path: Path, model: Path, shim: Path, found: dict[str, int]) -> Runs:
    runs = Runs(tmp_path, model, shim)
    if not found:
        runs.find_smallest()
        found["smallest"] = runs.smallest
    runs.smallest = found["smallest"]
    return runs


def budgets(smallest: int, seed: int, count: int) -> list[int]:
    """Some between the smallest and what holds everything, those two among them."""
    pick = random.Random(seed)
    return [smallest, smallest + WHOLE, *(smallest + pick.randrange(WHOLE) for _ in range(count - 2))]


def assert_within(peak: object, memory: int) -> None:
    assert isinstance(peak, int) and 0 < peak <= memory, f"{peak} bytes at most, {memory} allowed"


def test_generate_stays_within_random_budgets(runs: Runs) -> None:
    ids = ",".join(str(number % 250) for number in range(200))
    told = set()
    for memory in budgets(runs.smallest, 1, 4):
        done = runs.run([*runs.command(memory=memory, tokens=40), "--ids", ids, "--json"])
        assert done.code == 0, done.err
        assert_within(done.peak, memory)
        told.add(tuple(json.loads(done.out)["ids"]))
    assert len(told) == 1


def test_a_long_chat_stays_within_random_budgets(runs: Runs) -> None:
    for memory in budgets(runs.smallest, 2, 4):
        result = runs.evaluate(CHAT, memory=memory, compute="fast", kv=None, context=CONTEXT)
        assert result["turns"] == 6
        assert_within(result["peak"], memory)


def test_the_program_chat_stays_within_a_budget(runs: Runs) -> None:
    memory = runs.smallest + 5 * MIB
    words = [
        "-m",
        "moss_jt.cli",
        "chat",
        "--model",
        str(runs.model),
        "--memory",
        str(memory),
        "--greedy",
        "--system",
        "",
    ]
    done = runs.run([*words, "--context", "256", "--max-new-tokens", "24"], text="hello\n" * 4)
    assert done.code == 0, done.err
    assert_within(done.peak, memory)


@pytest.mark.parametrize(("compute", "kv"), [("fast", "int8"), ("exact", "fp32")])
def test_the_whole_context_fits_into_the_smallest_budget(runs: Runs, compute: str, kv: str) -> None:
    """Which is named where less is given; a byte of the next process more or less does not matter."""
    words = [*runs.command(memory=runs.smallest), "--compute", compute, "--kv", kv]
    refused = runs.run([*words[: words.index("--memory")], "--memory", "1", *words[words.index("--memory") + 2 :]])
    named = re.search(r"give at least ([\d.]+\w+)", refused.error)
    assert named is not None
    memory = parse_size(named.group(1))
    smallest = runs.evaluate(ENGINES, memory=memory, compute=compute, kv=kv, context=CONTEXT)
    assert_within(smallest["peak"], memory)
    assert smallest["positions"] == CONTEXT and smallest["streamed"]
    roomy = runs.evaluate(ENGINES, memory=memory + WHOLE, compute=compute, kv=kv, context=CONTEXT)
    assert roomy["tokens"] == smallest["tokens"] and not roomy["streamed"]


def test_nothing_is_written_while_tokens_are_made(runs: Runs) -> None:
    result: dict[str, Any] = runs.evaluate(WRITTEN)
    assert result["written"] == {"wchar": 0, "write_bytes": 0}
    assert result["read"] > 0


def test_streaming_leaves_nothing_in_the_page_cache(runs: Runs) -> None:
    """Headers, norms and rows of the embedding apart."""
    file = runs.model / "model-00001-of-00001.safetensors"
    forget_pages(file)
    result: dict[str, Any] = runs.evaluate(WRITTEN)
    if not result["direct"]:
        pytest.skip("the file system of the temporary folder does not read past the page cache")
    assert result["read"] > 5 * file.stat().st_size
    assert cached_bytes(file) < 2 * MIB


def forget_pages(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_the_count_of_cached_bytes_counts(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(64 * mmap.PAGESIZE))
    assert cached_bytes(file) == 64 * mmap.PAGESIZE


@pytest.mark.slow
def test_a_long_row_of_random_budgets(runs: Runs) -> None:
    for seed, memory in enumerate(budgets(runs.smallest, 3, 60)):
        program, kv = (CHAT, ENGINES)[seed % 2], (None, "fp16", "int8")[seed % 3]
        compute = ("fast", "exact")[seed // 2 % 2]
        result = runs.evaluate(program, memory=memory + 2 * MIB, compute=compute, kv=kv, context=CONTEXT)
        assert_within(result["peak"], memory + 2 * MIB)
