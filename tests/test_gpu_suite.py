"""The parts of the GPU suite about others, as far as they go without a device: who is missing, ratios, the children."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import has_device
from host_device import HostDevice

from moss_jt.bench import parse_synthetic, pass_bytes
from moss_jt.config import MossConfig
from moss_jt.plan import matrix_sizes
from moss_jt.synthetic import layouts_of

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = {"layers": 3, "width": 128, "heads": 4, "vocabulary": 512, "rotary_dim": 16, "prompt": 8}
STACK = [(96, 32), (32, 32), (128, 32), (32, 128), (100, 32)]
Import = Callable[[str], Any]


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Import:
    """Imports a script of benchmarks/ by its name there."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def offload(benchmark_module: Import) -> Any:
    """benchmarks/gpu_offload.py."""
    return benchmark_module("gpu_offload")


@pytest.fixture
def stage(benchmark_module: Import, offload: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device that is the host, with few tokens; caps that hold a half of the weights and all of them."""
    gpu_model = benchmark_module("gpu_model")
    monkeypatch.setattr(offload, "PROMPT", 4)
    monkeypatch.setattr(offload, "NEW", 6)

    class Small(gpu_model.Stage):  # type: ignore[misc, name-defined]
        def config(self, kind: str) -> Any:
            return replace(parse_synthetic(f"tiny-{kind}", layers=1), vocab_size=512, n_positions=256)

    def open_device(limit: int | None) -> HostDevice:
        return HostDevice(tmp_path, capacity=(limit or 1 << 30) - 1000)

    with gpu_model.loaded(Small(open_device), "fp16") as model:
        whole = model.placed.space.weights.resident_bytes
        fixed = model.placed.plans.device.needs.fixed + model.placed.plans.device.kv_bytes(256)
    return Small(open_device, caps=(2 * (fixed + whole), fixed + whole // 2))


def peer(offload: Any, script: Path, *needs: str) -> Any:
    return offload.Peer("another", script, needs, "install it", 2.5, offload.accelerate_settings)


def test_ours_and_theirs_are_compared_under_each_cap(offload: Any, stage: Any) -> None:
    told: list[dict[str, Any]] = []

    def runner(_: Any, settings: dict[str, Any], limits: Any) -> dict[str, Any]:
        told.append(settings)
        return {"steps_s": [9.0, 9.0, 40.0, 50.0, 60.0], "used_bytes": settings["limit"] - 1, "versions": {"x": "1"}}

    found = offload.compare(stage, peer(offload, Path("unused")), offload.Limits(seconds=7, tier="cuda:0"), runner)
    tight, plenty = (found[f"{cap / 2**30:g}GiB"] for cap in sorted(stage.caps))
    assert plenty == {"not_measured": "the device holds everything"}
    assert tight["times"] == pytest.approx(50.0 / tight["ours_s"]["median"], rel=0.01)
    assert tight["theirs_s"] == {"median": 50.0, "min": 40.0, "max": 60.0, "runs": 3}
    assert tight["reached"] and tight["within_cap"] and tight["their_versions"] == {"x": "1"}
    assert 0 < tight["streamed_bytes"] < tight["weight_bytes"]
    (settings,) = told
    assert (settings["limit"], settings["own"], settings["seconds"]) == (min(stage.caps), 1000, 7)
    assert (settings["tier"], settings["device"], settings["layers"]) == ("cuda:0", "cuda", 1)
    json.dumps(settings)


@pytest.mark.parametrize(("seconds", "times", "reached"), [(0.25, 2.5, True), (0.24, 2.4, False), (0.05, 0.5, False)])
def test_a_ratio_is_held_against_the_aim(seconds: float, times: float, reached: bool, offload: Any) -> None:
    ours = {"steps_s": [0.1, 0.2, 0.05], "weight_bytes": 100, "streamed_bytes": 60}
    row = offload.row_of(ours, {"steps_s": [5, 5, seconds], "used_bytes": 0}, 2.5, 1000)
    assert (row["times"], row["reached"], row["aim"]) == (times, reached, 2.5)
    assert "within_cap" not in row


def test_what_swapping_moved_and_took_is_told(offload: Any) -> None:
    ours = {"steps_s": [0.1], "weight_bytes": 100, "streamed_bytes": 60}
    theirs = {"steps_s": [0.4] * 5, "used_bytes": 1001, "swapped_bytes": [200, 120, 120], "start_s": 61.5}
    row = offload.row_of(ours, theirs, 2.0, 1000)
    assert row["swapped_bytes"]["median"] == 120 and row["within_cap"] is False and row["their_start_s"] == 61.5
    assert offload.row_of(ours, {"failed": "another ended with 1: no"}, 2.0, 1000)["failed"].endswith("no")


def test_products_of_training_are_timed(benchmark_module: Import, tmp_path: Path) -> None:
    suite = benchmark_module("gpu_train")
    shape = MossConfig(vocab_size=64, n_embd=128, n_layer=1, n_head=4, rotary_dim=32, dtype="float16")
    found = suite.train(lambda: HostDevice(tmp_path), lambda *_: 1.0, kinds=[4], shape=shape, tokens=[3], runs=1)
    assert len(found) == 4 * 2
    assert found["int4 qkv_proj 3 back"]["tflop_per_s"]["runs"] == 1
    assert found["int4 fc_out 3 forward"]["of_halves"] > 0


def test_both_sides_multiply_with_the_same_bytes(offload: Any) -> None:
    config = parse_synthetic("moss-moon-003-fp16", layers=34)
    settings = offload.swap_settings(config)
    sizes = matrix_sizes(config, layouts_of(config))
    assert 2 * sum(rows * inputs for rows, inputs in settings["shapes"]) == pass_bytes(sizes)
    shape = offload.accelerate_settings(config)
    blocks = 34 * 12 * shape["width"] ** 2
    assert 2 * (blocks + shape["vocabulary"] * shape["width"]) == pass_bytes(sizes)
    assert (shape["layers"], shape["heads"], shape["rotary_dim"]) == (34, 24, 64)


def test_who_is_not_installed_is_named_and_nothing_runs(offload: Any) -> None:
    assert offload.missing(Path(sys.executable), ["json", "not_a_module_at_all"]) == ["not_a_module_at_all"]
    assert offload.missing(Path("/no/such/python"), ["json"]) == ["json"]
    absent = peer(offload, Path("unused"), "not_a_module_at_all")
    found = offload.compare(None, absent, offload.Limits(), lambda *_: pytest.fail("it ran"))
    assert found == {"not_measured": f"{sys.executable} has no not_a_module_at_all: install it"}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import json, sys; print('words'); print(json.dumps({'told': json.loads(sys.argv[1])}))", {"told": {"a": 1}}),
        ("raise SystemExit('out of memory')", {"failed": "another ended with 1: out of memory"}),
        ("", {"failed": "another ended with 0: no word"}),
        ("import time; time.sleep(60)", {"failed": "another was not through within 2 s"}),
    ],
)
def test_how_a_child_ends(
    code: str, found: dict[str, Any], offload: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "child.py"
    script.write_text(code, "utf-8")
    if "sleep" in code:
        monkeypatch.setattr(offload, "START_S", 1)
    limits = offload.Limits(seconds=1 if "sleep" in code else 60)
    assert offload.run(peer(offload, script), {"a": 1}, limits) == found


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed here")
def test_accelerate_divides_a_model_between_memory_and_disk(offload: Any) -> None:
    """The child without a device: main memory stands for it, and the disk for main memory."""
    child = benchmark_child(offload, "ACCELERATE")
    settings = {**TINY, "tier": "cpu", "own": 0, "steps": 5, "seconds": 5}
    room = 384 << 20  # what it keeps for activations
    found = child({**settings, "limit": room + (2 << 20)})
    assert len(found["steps_s"]) == 5 and min(found["steps_s"]) > 0
    assert found["bytes"]["cpu"] <= 2 << 20 and found["bytes"]["disk"] > 0
    whole = child({**settings, "limit": room + (1 << 30)})
    assert whole["bytes"] == {"cpu": sum(found["bytes"].values())}


def benchmark_child(offload: Any, name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Runs the script of a peer with this Python."""

    def run(settings: dict[str, Any]) -> dict[str, Any]:
        found = offload.run(getattr(offload, name), settings, offload.Limits(seconds=120))
        assert "failed" not in found, found
        return dict(found)

    return run


def test_a_stack_of_matrices_in_jittor(offload: Any, jittor: ModuleType) -> None:
    """With the core that is there, which ignores limits: nothing is swapped."""
    settings = {"device": "cpu", "rebuild": False, "dtype": "float32", "shapes": STACK, "bus": None}
    limits = {"limit": 10_000, "own": 0, "steps": 4, "seconds": 60}
    found = benchmark_child(offload, "SWAP")(settings | limits)
    assert len(found["steps_s"]) == 4 and found["swapped_bytes"] == [0] * 4
    assert found["weight_bytes"] == 4 * sum(rows * inputs for rows, inputs in STACK)


@pytest.mark.slow
def test_jittors_swap_moves_what_has_no_room(offload: Any, own_home: Path) -> None:
    """With a core of its own, compiled here; it writes what it drops, and reads it again, in every pass."""
    shapes = [(1024, 512), (512, 1024)] * 6
    settings = {"device": "cpu", "rebuild": True, "dtype": "float32", "shapes": shapes, "bus": None}
    limits = {"limit": 16 << 20, "own": 0, "steps": 4, "seconds": 60}
    found = benchmark_child(offload, "SWAP")(settings | limits)
    assert found["weight_bytes"] == 24 << 20
    assert min(found["swapped_bytes"]) > (24 << 20) - (16 << 20)


def test_checks_of_jittor_are_gathered(benchmark_module: Import) -> None:
    """A process that ends early leaves the rest wrong, with what it said last."""
    suite = benchmark_module("gpu_jittor")
    said = 'noise\n{"start": {"seconds": 1, "wrong": false}}\n{"sort": {"off": 0.0, "wrong": false}}\n'
    whole = suite.gathered(["sort"], said, "unused")
    assert whole == {"start": {"seconds": 1, "wrong": False}, "sort": {"off": 0.0, "wrong": False}, "wrong": False}
    broken = suite.gathered(["sort", "where"], said, "the process ended with -6: abort")
    assert broken["where"] == {"failed": "the process ended with -6: abort", "wrong": True} and broken["wrong"]
    assert suite.gathered(["sort"], '{"not_measured": "no nvcc"}\n', "unused") == {"not_measured": "no nvcc"}


@pytest.mark.parametrize(
    ("found", "wrong"), [(0.0, False), (0.01, False), (0.011, True), (float("nan"), True), (None, True)]
)
def test_a_check_judges(found: float | None, wrong: bool, benchmark_module: Import) -> None:
    suite = benchmark_module("gpu_jittor")

    def run(_: Any) -> float:
        if found is None:
            raise RuntimeError("\nCUBLAS_STATUS_NOT_SUPPORTED\n more")
        return found

    result = suite.result_of(suite.Check(run, 0.01), None)
    assert result["wrong"] is wrong
    if found is None:
        assert result["failed"] == "RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED"


def test_differences_are_told(benchmark_module: Import) -> None:
    class Var:
        def __init__(self, values: Any) -> None:
            self.values = np.array(values)

        def numpy(self) -> Any:
            return self.values

    suite = benchmark_module("gpu_jittor")
    assert suite.off(Var([1.0, 2.5]), np.array([1.0, 2.0])) == 0.25
    assert suite.off(Var([]), np.array([])) == 0.0
    with pytest.raises(AssertionError, match=r"the shape is \(1,\) in place of \(2,\)"):
        suite.off(Var([1.0]), np.array([1.0, 2.0]))


def test_jittor_is_checked_in_a_process_of_its_own(benchmark_module: Import, jittor: ModuleType) -> None:
    found = benchmark_module("gpu_jittor").part("cpu", only=["round_trips", "matmul_float32", "ours_beside"])
    assert found["wrong"] is False, found
    assert found["matmul_float32"]["off"] < 1e-5 and found["start"]["compiled"] is False
    assert "ours_beside" not in found, "that needs a device"


@pytest.mark.slow
def test_all_checks_of_jittor_on_the_cpu(benchmark_module: Import, jittor: ModuleType) -> None:
    found = benchmark_module("gpu_jittor").part("cpu")
    assert found["wrong"] is False, found


def test_jittor_without_a_device_is_not_measured(benchmark_module: Import, offload: Any) -> None:
    if has_device():
        pytest.skip("there is a device: it would be measured")
    for found in (benchmark_module("gpu_jittor").part("cuda", only=["sort"]), offload.swap(None, offload.Limits())):
        assert list(found) == ["not_measured"] and "Jittor cannot use CUDA here: " in found["not_measured"]


def test_parts_run_in_processes_of_their_own(
    benchmark_module: Import, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A fault of the device in one of them left all that followed unmeasured."""
    gpu, rows = benchmark_module("gpu"), benchmark_module("gpu_rows")
    asked: list[list[str]] = []

    def within(line: list[str], environment: dict[str, str], seconds: float) -> tuple[str, str]:
        asked.append(line)
        if line[-1] == "caps":
            with monkeypatch.context() as child:
                child.setenv(rows.FILE, environment[rows.FILE])
                rows.Rows()["int4 8GiB"] = {"wrong": False}
            with Path(environment[rows.FILE]).open("a", encoding="utf-8") as file:
                file.write('{"int4 6GiB": {"wro')
            return "", f"it took longer than {seconds:g} s"
        if line[-1] == "resident":
            return '{"results": {"int4": {"tokens": 5}, "wrong": false}}\na table', ""
        return "", "its process ended with -6"

    monkeypatch.setattr(gpu, "_within", within)
    monkeypatch.setattr(gpu, "keep", lambda name, results, *, save: json.dumps({"benchmark": name, "results": results}))
    monkeypatch.setattr(gpu, "ask_driver", lambda: gpu.argparse.Namespace(problem=None))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "golden,resident,caps", "--caps", "8", "--save"])
    assert gpu.main() == 1
    assert [line[-3:] for line in asked] == [["--here", "--only", name] for name in ("golden", "resident", "caps")]
    assert all("--save" in line and "--caps=8" in line and "--layers=34" in line for line in asked)
    said, rows_said = capfd.readouterr()
    assert json.loads(rows_said) == {"int4 8GiB": {"wrong": False}}
    golden, resident, caps = map(json.loads, said.splitlines()[:3])
    assert golden["results"] == {"failed": "its process ended with -6", "wrong": True}
    assert resident["results"]["int4"] == {"tokens": 5}
    assert caps["results"] == {"int4 8GiB": {"wrong": False}, "failed": "it took longer than 480 s", "wrong": True}


def test_a_part_that_raises_keeps_its_rows(
    benchmark_module: Import, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu, rows = benchmark_module("gpu"), benchmark_module("gpu_rows")

    def part(_: Any) -> None:
        rows.Rows()["int8"] = 7
        raise MemoryError("no room for fp16")

    monkeypatch.setenv(rows.FILE, str(tmp_path / "rows"))
    monkeypatch.setitem(gpu.PARTS, "resident", part)
    assert gpu._measured("resident", gpu.argparse.Namespace(save=False)) == {
        "int8": 7,
        "failed": "MemoryError: no room for fp16",
        "wrong": True,
    }
    assert json.loads(capsys.readouterr().out)["results"]["int8"] == 7


def test_what_a_part_has_started_ends_with_it(benchmark_module: Import, tmp_path: Path) -> None:
    """It kept the device's memory, and the link, from the next part."""
    within = benchmark_module("gpu")._within
    code = "import subprocess as s, sys, time; s.Popen(['sleep', '60'], stdout=s.DEVNULL); print('x', flush=True); "
    assert within([sys.executable, "-c", code], os.environ, 60) == ("x\n", "")
    late = code + "p = s.Popen(['sleep', '60']); open(sys.argv[1], 'w').write(str(p.pid)); time.sleep(60)"
    assert within([sys.executable, "-c", late, str(tmp_path / "pid")], os.environ, 5) == ("", "it took longer than 5 s")
    state = Path("/proc", (tmp_path / "pid").read_text("ascii"), "stat")
    for _ in range(100):  # whoever takes in orphans may be slow to bury them
        if not state.exists() or state.read_text("ascii").split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("it still runs")


def test_the_suite_takes_its_own_options_from_anywhere(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PYTHONPATH|$@"\n', "utf-8")
    python.chmod(0o755)
    line = [
        "sh",
        str(BENCHMARKS / "gpu_suite.sh"),
        "--only",
        "share",
        "--wheels",
        str(tmp_path / "a folder"),
        "--caps",
        "8",
    ]
    environment = {**os.environ, "PYTHON": str(python), "PYTHONPATH": "/site"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=True)
    installed, measured = done.stdout.splitlines()
    assert installed.endswith(f"--no-deps {tmp_path}/a folder/*.whl")
    assert measured == ".:/site|benchmarks/gpu.py --save --only share --caps 8"
