"""The parts of the benchmarks that decide: what is counted, compared and refused; files for peers."""

from __future__ import annotations

import importlib
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import has_device
from host_device import HostDevice

from moss_jt.bench import parse_synthetic
from moss_jt.record import spread

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CONFIG = replace(parse_synthetic("tiny-fp16", layers=2), vocab_size=512)
Import = Any


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/ by its name there."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def numbers_of(raw: bytes, kind: str, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What a block format means, written down from its definition."""
    if kind == "f16":
        return np.array(np.frombuffer(raw, "<f2", count), np.float64)
    size = {"q4_0": 18, "q8_0": 34}[kind]
    blocks = np.frombuffer(raw, np.uint8, count // 32 * size).reshape(-1, size)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float64)
    if kind == "q8_0":
        return np.array(blocks[:, 2:].view(np.int8) * scale).reshape(-1)
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.int8) - 8
    return np.array(codes * scale).reshape(-1)


class Reader:
    """Reads a GGUF file as its specification says."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0
        assert self.take("<4sI") == (b"GGUF", 3)
        tensors, values = self.take("<QQ")
        self.values = {self.text(): self.value() for _ in range(values)}
        self.tensors = {}
        for _ in range(tensors):
            name = self.text()
            (dimensions,) = self.take("<I")
            shape = self.take(f"<{dimensions}Q")
            self.tensors[name] = (shape, *self.take("<IQ"))
        self.data = -(-self.at // 32) * 32

    def take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self.raw, self.at)
        self.at += struct.calcsize(form)
        return found

    def text(self) -> str:
        (size,) = self.take("<Q")
        (raw,) = self.take(f"<{size}s")
        return str(raw, "utf-8")

    def value(self) -> Any:
        (kind,) = self.take("<I")
        return self.text() if kind == 8 else self.take({4: "<I", 6: "<f", 7: "<?"}[kind])[0]


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "f16"])
def test_a_gguf_file_holds_a_model_of_the_shape(kind: str, tmp_path: Path, benchmark_module: Import) -> None:
    gguf = benchmark_module("peers.gguf_model")
    file = tmp_path / "model.gguf"
    gguf.write_model(CONFIG, file, kind, "q8_0")
    raw = file.read_bytes()
    read = Reader(raw)
    assert read.values["general.architecture"] == "gptneox"
    assert read.values["gptneox.block_count"] == 2
    assert read.values["gptneox.use_parallel_residual"] is True
    assert read.tensors["blk.1.ffn_down.weight"][0] == (CONFIG.inner_dim, CONFIG.n_embd)
    assert read.tensors["blk.1.attn_qkv.bias"][0] == (3 * CONFIG.n_embd,)
    assert read.tensors["output.weight"][1] == 8
    shape, _, offset = read.tensors["blk.0.ffn_up.weight"]
    weights = numbers_of(raw[read.data + offset :], kind, shape[0] * shape[1])
    assert weights.std() == pytest.approx(0.02, rel=0.1)
    assert abs(weights.mean()) < 0.003
    _, _, last = read.tensors["blk.1.ffn_down.bias"]
    assert read.data + last + -(-CONFIG.n_embd * 4 // 32) * 32 == len(raw)
    assert not list(tmp_path.glob("*.part"))


def test_bytes_of_a_pass_of_llama(benchmark_module: Import) -> None:
    gguf = benchmark_module("peers.gguf_model")
    config = parse_synthetic("moss-moon-003-fp16")
    assert gguf.pass_bytes(config, "q4_0", "q4_0") == 16_058_941_440 // 32 * 18
    head = config.vocab_size * config.n_embd
    assert gguf.pass_bytes(config, "q4_0", "q6_k") == (16_058_941_440 - head) // 32 * 18 + head // 256 * 210


def test_rates_of_llama_bench(benchmark_module: Import) -> None:
    rates_of = benchmark_module("peers.llamacpp").rates_of
    assert rates_of('words\n{"n_gen": 16, "samples_ts": [4.5, 5]}\n') == [4.5, 5.0]


def test_a_peer_that_was_not_built_is_named(tmp_path: Path) -> None:
    script = BENCHMARKS / "peers" / "llamacpp.py"
    done = subprocess.run(
        [sys.executable, str(script), "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "python benchmarks/peers/llamacpp.py --build" in done.stderr


def test_the_hog_takes_memory_and_gives_it_back(benchmark_module: Import) -> None:
    hog = benchmark_module("peers.hog")
    from moss_jt.memory import available_memory

    with hog.Hog(max(0, available_memory() - 2 * hog.CHUNK - (hog.CHUNK >> 1))) as holding:
        process = holding._process
        assert holding.held % hog.CHUNK == 0
        assert process.poll() is None
    assert process.poll() is not None


def found_by(module: ModuleType, **values: Any) -> Any:
    """Measurements of decode.py where everything is well."""
    good: dict[str, Any] = {
        "decode": [4.9, 4.8, 5.0],
        "peer_decode": [4.6, 4.5, 4.4],
        "memory": [46e9] * 6,
        "of_memory": [0.91, 0.95, 0.93],
        "prefill": {128: [40.0, 42.0, 41.0]},
        "peer_prefill": {128: [20.0, 20.0, 20.0]},
        "cpu_s_per_token": [0.4] * 3,
        "peak_memory": [10**10],
    }
    return module.Found(**{**good, **values})


def test_a_speed_is_compared_pair_by_pair(benchmark_module: Import) -> None:
    decode = benchmark_module("decode")
    line = decode.summary(found_by(decode))
    assert line["decode_ratio"]["median"] == pytest.approx(4.8 / 4.5, abs=1e-4)
    assert line["prefill_ratio"]["128"]["median"] == 2.05
    assert decode.missed(line) == []


def test_a_missed_speed_is_told(benchmark_module: Import) -> None:
    decode = benchmark_module("decode")
    slow = found_by(decode, decode=[4.5] * 3, of_memory=[0.8, 0.89, 0.95], prefill={128: [39.0] * 3})
    assert decode.missed(decode.summary(slow)) == [
        "of_memory is 0.890, 0.9 was asked",
        "decode_ratio is 1.000, 1.05 was asked",
        "prefill_ratio of 128 is 1.950, 2.0 was asked",
    ]


def test_pairs_that_were_kept_are_not_measured_again(
    benchmark_module: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = benchmark_module("decode")
    one = {"peak_memory": [10**10], "cpu_s_per_token": [0.4], "memory": [46e9], "of_memory": [0.9]}
    measured = iter(
        found_by(decode, **one, decode=[rate], peer_decode=[4.5], prefill={128: [rate]}, peer_prefill={128: [2.0]})
        for rate in (4.0, 5.0, 6.0)
    )
    monkeypatch.setattr(decode, "_pair", lambda *_: next(measured))
    settings, file = decode.Settings((128,), (64,), 16, pairs=2), tmp_path / "pairs.jsonl"
    whole = decode.separate(4, 34, None, settings, file)
    assert whole.decode == [4.0, 5.0] and whole.prefill == {128: [4.0, 5.0]}
    assert decode.separate(4, 34, None, settings, file) == whole, "from the file alone"
    longer = decode.separate(4, 34, None, replace(settings, pairs=3), file)
    assert longer.decode == [4.0, 5.0, 6.0] and len(longer.peer_prefill[128]) == 3
    assert decode.read_pairs(file, [8, 34, 128, 16, False]) == [], "pairs of int8 are others"
    monkeypatch.setattr(decode, "commit", lambda: "another")
    with pytest.raises(SystemExit, match=r"pairs of commit .*, and this is another"):
        decode.separate(4, 34, None, settings, file)


def test_without_a_peer_only_limits_count(benchmark_module: Import) -> None:
    decode = benchmark_module("decode")
    line = decode.summary(found_by(decode, peer_decode=[], peer_prefill={}))
    assert line["decode_ratio"] is None
    assert line["prefill_ratio"] == {"128": None}
    assert decode.missed(line) == []


def results(**changes: Any) -> dict[str, Any]:
    """What `moss-jt bench` gives under a budget of 1000 bytes."""
    decode = {
        "answer": [1, 2],
        "same_answers": True,
        "streamed_bytes": 500,
        "tokens_per_s": spread([0.5]),
        "disk_limit": {},
        "of_disk_limit": spread([0.95]),
        "of_limit": spread([0.1]),
    }
    return {"peak_memory_bytes": 1000, "written_bytes": 0, **changes, "decode": [{**decode, **changes}]}


def test_a_budget_that_holds(benchmark_module: Import) -> None:
    row = benchmark_module("budgets").row_of(1000, results(), [1, 2], [0.2, 0.25, 0.1])
    assert row["missed"] == []
    assert row["peer_ratio"]["median"] == 2.5


@pytest.mark.parametrize(
    ("changes", "peer", "words"),
    [
        ({"answer": [1, 3]}, [], "another answer than the reference's"),
        ({"same_answers": False}, [], "another answer than the reference's"),
        ({"written_bytes": 4096}, [], "4096 bytes were written"),
        ({"peak_memory_bytes": 1001}, [], "the peak is 1 bytes above the budget"),
        ({"of_disk_limit": spread([0.8])}, [], "0.800 of the disk's speed, 0.9 was asked"),
        ({}, [0.3], "1.67 times llama.cpp, 2.0 was asked"),
    ],
)
def test_a_budget_that_does_not_hold(
    changes: dict[str, Any], peer: list[float], words: str, benchmark_module: Import
) -> None:
    assert benchmark_module("budgets").row_of(1000, results(**changes), [1, 2], peer)["missed"] == [words]


def test_a_model_that_fits_whole_has_no_disk_to_compare_with(benchmark_module: Import) -> None:
    whole = results()
    for key in ("streamed_bytes", "disk_limit", "of_disk_limit"):
        del whole["decode"][0][key]
    assert benchmark_module("budgets").row_of(1000, whole, [1, 2], [])["missed"] == []


def test_peaks_and_failures_are_told(benchmark_module: Import) -> None:
    peak = benchmark_module("peak_memory")
    fine = {"memory_bytes": 1 << 20, "peak_memory_bytes": 1 << 19, "streamed_bytes": 7, "prompt": 2000, "new": 48}
    above = {**fine, "peak_memory_bytes": (1 << 20) + 5, "streamed_bytes": 0}
    line, failures = peak.summary([fine, above, {"memory_bytes": 1 << 30, "error": "no words"}], 1, 2)
    assert failures == ["1GiB: no words", "1MiB: the peak is 5 bytes above it"]
    assert (line["processes"], line["streamed"], line["longest"]) == (3, 1, 2048)
    assert line["unused_bytes_streamed"]["median"] == 1 << 19


def test_a_process_under_a_budget(tmp_path: Path, benchmark_module: Import) -> None:
    from moss_jt.converters.synth import synthesize

    peak = benchmark_module("peak_memory")
    synthesize(parse_synthetic("tiny-int4", layers=1), tmp_path / "model")
    least = peak.smallest(tmp_path / "model", 40, None)
    row = peak.in_process(tmp_path / "model", least + (8 << 20), 24, 16, None)
    assert row["peak_memory_bytes"] <= row["memory_bytes"], row
    assert "give at least" in peak.in_process(tmp_path / "model", least // 2, 24, 16, None)["error"]


def test_a_second_turn_computes_its_own_tokens(benchmark_module: Import, jittor: ModuleType) -> None:
    from moss_jt.bench import synthetic_model

    turn = benchmark_module("long_context").second_turn(
        synthetic_model(parse_synthetic("tiny-int4", layers=1), max_tokens=64), first=24, new=10
    )
    assert turn["computed"] == 11


def test_the_gpu_suite_without_a_device(tmp_path: Path) -> None:
    if has_device():
        pytest.skip("there is a device: the suite would measure it")
    line = ["sh", str(BENCHMARKS / "gpu_suite.sh"), "--only", "golden"]
    variables = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("not measured: ")


def test_the_gpu_suite_compares_caps(benchmark_module: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is the host: the same tokens within every cap, and what a cap costs is told."""
    gpu_model = benchmark_module("gpu_model")
    monkeypatch.setattr(gpu_model, "PROMPT", 5)
    monkeypatch.setattr(gpu_model, "NEW", 7)

    class Small(gpu_model.Stage):  # type: ignore[misc, name-defined]
        def config(self, kind: str) -> Any:
            return replace(parse_synthetic(f"tiny-{kind}", layers=1), vocab_size=512, n_positions=64)

    def open_device(limit: int | None) -> HostDevice:
        return HostDevice(tmp_path, capacity=(limit or 1 << 30) - 1000)

    with gpu_model.loaded(Small(open_device), "int4", context=64) as model:
        whole = model.placed.space.weights.resident_bytes
        fixed = model.placed.plans.device.needs.fixed + model.placed.plans.device.kv_bytes(64)
    stage = Small(open_device, kinds=("int4",), caps=(fixed + whole // 2, 2 * (fixed + whole)))
    found = gpu_model.caps(stage, context=64)
    assert found.pop("wrong") is False
    tight, plenty = sorted(found.values(), key=lambda row: -row["streamed_bytes"])
    assert tight["same_tokens"] and tight["of_link"]["runs"] > 0 < tight["streamed_bytes"]
    assert plenty["streamed_bytes"] == 0 and "of_link" not in plenty
    assert tight["taken_bytes"] <= fixed + whole // 2
    shares = gpu_model.share(stage, limit=fixed + whole // 2)
    assert sorted(shares) == ["0", "0.25", "0.5", "0.75", "1", "auto", "wrong"] and not shares["wrong"]
    assert 0 <= shares["auto"]["share"] <= 1 and shares["auto"]["link_beside_gb_per_s"] >= 0
    assert shares["0"]["times_streaming"] == 1
    found = gpu_model.context(stage, limits=(fixed + whole // 2,))
    (row,) = (row for row in found.values() if isinstance(row, dict))
    assert row["context"] == 64 and row["streamed_bytes"] > 0


def test_the_gpu_suite_measures_attention(
    benchmark_module: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it launches runs on a device that is the host; both kernels leave the same result behind."""
    gpu_attention = benchmark_module("gpu_attention")
    monkeypatch.setattr(gpu_attention, "HEADS", 2)
    monkeypatch.setattr(gpu_attention, "WIDTH", 64)
    monkeypatch.setattr(gpu_attention, "PAST_CACHES", 100_000)
    monkeypatch.setattr(gpu_attention, "CASES", ((1, 300), (40, 64)))

    def once(device: HostDevice, work: Any) -> list[float]:
        work()
        return [1e-6]

    found = gpu_attention.attention(lambda: HostDevice(tmp_path), once)
    assert found.pop("wrong") is False
    assert sorted(found) == ["float16 1 of 300", "float16 40 of 64", "int8 1 of 300", "int8 40 of 64"]
    assert all(0 < row["off"] < 2e-3 for row in found.values()), "two kernels, so not the same to the bit"
    assert found["int8 1 of 300"]["ours_gb_per_s"]["median"] == 163.2, (
        "2 caches of 2 heads, keys and values, 68 bytes each"
    )
