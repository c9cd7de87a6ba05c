"""quantize: what comes out, from which sources, the same bytes after any kill, in little memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moss_folders import SHAPE, files_of, float_tensors, gptq_tensors, names_in, write_folder, write_shards
from safetensors.numpy import save_file

from moss_jt.checkpoint import Checkpoint, expected_shapes, floats_from_bytes, is_quantized_name
from moss_jt.config import Bits, MossConfig, Quantization
from moss_jt.converters import native_tensors, output
from moss_jt.converters.hf2jittor import hf2jittor
from moss_jt.converters.inspection import inspect
from moss_jt.converters.jittor2hf import jittor2hf
from moss_jt.converters.journal import Workplace, partial_folder
from moss_jt.converters.quantize import MatrixError, quantize, read_errors
from moss_jt.converters.rounding import RoundToNearest
from moss_jt.converters.synth import preset_config, synthesize
from moss_jt.converters.verify import verify
from moss_jt.errors import CheckpointError, ConfigError, DiskError
from moss_jt.layout import RowsLayout, TileLayout
from moss_jt.packing import QuantMatrix, dequantize, unpack
from moss_jt.runner import Model

ROOT = Path(__file__).parents[2]
MATRICES = [name for name in expected_shapes(MossConfig.from_dict(SHAPE)) if is_quantized_name(name)]

# quantises and kills itself when so many bytes have been written
KILLER = """
import os, signal, sys
sys.path.insert(0, {root!r})
from moss_jt.converters import native_tensors, output
from moss_jt.converters.quantize import quantize
output.COMMIT_BYTES = 10_000
native_tensors._NUMBERS_AT_ONCE = 4096
left, write = {limit}, os.pwrite
def counted(fd, data, position):
    global left
    done = write(fd, data[: max(1, min(len(data), left))], position)
    left -= done
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
os.pwrite = counted
quantize({src!r}, {dst!r}, bits=4, group_size=32, head="int8", resume={resume})
"""


def run_killed(src: Path, dst: Path, *, limit: int, resume: bool = False) -> int:
    """Quantise in a process that kills itself; its exit status."""
    code = KILLER.format(root=str(ROOT), src=str(src), dst=str(dst), limit=limit, resume=resume)
    return subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode


def numbers(folder: Path, name: str) -> np.ndarray[Any, Any]:
    """A matrix of a native folder as float32."""
    checkpoint = Checkpoint.open(folder)
    layout = checkpoint.entries[name].layout
    raw = checkpoint.read(name)
    if isinstance(layout, TileLayout):
        return dequantize(unpack(raw, layout))
    assert isinstance(layout, RowsLayout)
    return floats_from_bytes(raw[: layout.shape[0] * layout.row_bytes], layout.dtype).reshape(layout.shape)


@pytest.mark.parametrize("head", [None, "int8"])
@pytest.mark.parametrize(("bits", "size"), [(4, 32), (8, 128), (4, -1), (8, 12)])
def test_matrices_and_head_are_quantised_and_the_rest_is_kept(tmp_path: Path, bits: Bits, size: int, head: Any) -> None:
    tensors = float_tensors()
    source = write_folder(tmp_path / "hf", tensors, wbits=32)
    done = quantize(source, tmp_path / "q", bits=bits, group_size=size, head=head)
    config = done.conversion.config
    assert config.quantization == Quantization(bits, size)
    assert config.head_quantization == (Quantization(8, 128) if head else None)
    assert (config.name, config.dtype) == (f"hf-int{bits}", "float16")
    assert verify(tmp_path / "q").tensors == 21
    assert set(done.errors) == {*MATRICES, "lm_head.weight"} if head else set(MATRICES)
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            assert np.array_equal(Checkpoint.open(tmp_path / "q").read_plain(name), tensor.astype(np.float32)), name
            continue
        found, wanted = numbers(tmp_path / "q", name), tensor.astype(np.float64)
        off = float(np.sqrt(np.square(found - wanted).sum() / np.square(wanted).sum()))
        if name not in done.errors:
            assert off == 0, name
            continue
        assert done.errors[name].relative == pytest.approx(off, rel=1e-5), name
        assert off < done.errors[name].plain, name
    raw = json.loads((tmp_path / "q" / "config.json").read_text())
    assert (raw["wbits"], raw["groupsize"], raw["moss_jt"]["version"]) == (bits, size, 2 if head else 1)


@pytest.mark.parametrize("folder", ["tiny-fp/bin-2shards", "tiny-fp/safetensors-bf16", "tiny-fp-h8/bin-single"])
def test_foreign_and_native_sources_give_the_same(golden: Path, tmp_path: Path, folder: str) -> None:
    native = hf2jittor(golden / folder, tmp_path / "native", name="m").path
    one = files_of(quantize(golden / folder, tmp_path / "a", bits=4, head="int8", name="n").conversion.path)
    two = files_of(quantize(native, tmp_path / "b", bits=4, head="int8", name="n").conversion.path)
    config_one, config_two = json.loads(one.pop("config.json")), json.loads(two.pop("config.json"))
    assert config_one["moss_jt"] == config_two["moss_jt"]
    assert one == two
    assert quantize(native, tmp_path / "c", bits=8).conversion.config.name == "m-int8"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_golden_model_says_nearly_the_same(
    golden: Path, golden_model: Callable[[str], Model], tmp_path: Path, jittor: Any, bits: Bits
) -> None:
    from moss_jt.load import load_model

    source = golden / "tiny-fp" / "safetensors-fp16"
    ids = np.load(golden / "tiny-fp" / "expected.npz")["b0_ids"]
    wanted = golden_model("tiny-fp/safetensors-fp16").logits(ids)
    quantized = load_model(quantize(source, tmp_path / "q", bits=bits, group_size=32, head="int8").conversion.path)
    off = quantized.logits(ids) - wanted
    relative = float(np.sqrt(np.square(off).mean() / wanted.var()))
    assert 0 < relative < (0.35 if bits == 4 else 0.02)


def test_an_int8_head_computes_what_its_numbers_say(tmp_path: Path, jittor: Any) -> None:
    from moss_jt.load import load_model

    source = write_folder(tmp_path / "hf", float_tensors("float32"))
    native = hf2jittor(source, tmp_path / "native", head="int8").path
    assert list(read_errors(native)) == ["lm_head.weight"]
    back = jittor2hf(native, tmp_path / "back")
    assert back.head == "float32"
    ids = np.arange(40) % 96
    found, wanted = (load_model(path).logits(ids) for path in (native, hf2jittor(back.path, tmp_path / "again").path))
    assert np.abs(found - wanted).max() < 1e-4
    assert np.abs(wanted - load_model(hf2jittor(source, tmp_path / "as-it-was").path).logits(ids)).max() > 1e-3


def test_only_the_head_of_a_quantised_model_can_change(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", gptq_tensors(4, 32, act_order=True))
    native = hf2jittor(source, tmp_path / "native").path
    done = quantize(native, tmp_path / "q", head="int8")
    assert list(done.errors) == ["lm_head.weight"]
    before, after = Checkpoint.open(native), Checkpoint.open(done.conversion.path)
    for name in before.entries.keys() - {"lm_head.weight"}:
        assert after.entries[name].layout == before.entries[name].layout
        assert np.array_equal(after.read(name), before.read(name)), name
    same = quantize(native, tmp_path / "q2", bits=4, group_size=32, head="int8").conversion.path
    assert np.array_equal(Checkpoint.open(same).read("lm_head.weight"), after.read("lm_head.weight"))
    again = hf2jittor(source, tmp_path / "at-once", head="int8", name="native").path
    assert np.array_equal(Checkpoint.open(again).read("lm_head.weight"), after.read("lm_head.weight"))
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"is int4 in groups of 32 already.*Quantise the floating-point model it was made from", {"bits": 8}),
        (r"Quantise the floating-point model it was made from", {"bits": 4, "group_size": 64, "head": "int8"}),
        (r"Nothing was asked for that could be done: its head can still be made int8", {}),
        (r"Nothing was asked for that could be done", {"bits": 4, "group_size": 32}),
    ]
    for words, options in cases:
        with pytest.raises(ConfigError, match=words):
            quantize(native, tmp_path / "no", **options)
    with pytest.raises(ConfigError, match=r"Its head is quantised too: nothing is left to be done"):
        quantize(done.conversion.path, tmp_path / "no", head="int8")
    with pytest.raises(ConfigError, match=r"Convert it with moss-convert hf2jittor, which can make its head int8 too"):
        quantize(source, tmp_path / "no", bits=4, group_size=32, head="int8")
    assert names_in(tmp_path) == ["at-once", "hf", "native", "q", "q2"]


def test_a_head_that_is_quantised_already(tmp_path: Path) -> None:
    int8 = synthesize(preset_config("tiny", layers=1, head_bits=8), tmp_path / "int8").path
    done = quantize(int8, tmp_path / "q", bits=4, head="int8")
    assert "lm_head.weight" not in done.errors
    kept, head = Checkpoint.open(done.conversion.path), Checkpoint.open(int8).read("lm_head.weight")
    assert np.array_equal(kept.read("lm_head.weight"), head)
    assert kept.config.head_quantization == Quantization(8, 128)
    int4 = synthesize(preset_config("tiny", layers=1, head_bits=4), tmp_path / "int4").path
    with pytest.raises(ConfigError, match=r"the head of .*int4 is int4 in groups of 128 already; int8 would not bring"):
        quantize(int4, tmp_path / "no", bits=4, head="int8")
    with_int4 = quantize(int4, tmp_path / "q4", bits=8).conversion.config
    assert with_int4.head_quantization == Quantization(4, 128)


def test_floats_can_change_their_type_on_the_way(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", float_tensors("float32"))
    done = quantize(source, tmp_path / "q", bits=4, dtype="float16")
    assert done.conversion.config.dtype == "float16"
    assert inspect(done.conversion.path).dtypes == {"float16": 13, "int4": 8}
    kept = quantize(source, tmp_path / "k", bits=4)
    assert kept.conversion.config.dtype == "float32"
    for name in MATRICES:
        assert np.array_equal(numbers(tmp_path / "q", name), numbers(tmp_path / "k", name)), name
    half = hf2jittor(source, tmp_path / "h", head="float16")
    assert inspect(half.path).dtypes == {"float32": 20, "float16": 1}
    assert np.array_equal(
        numbers(tmp_path / "h", "lm_head.weight"), float_tensors("float32")["lm_head.weight"].astype(np.float16)
    )


def test_killed_at_many_points_and_resumed(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "hf", float_tensors(), 3)
    wanted = files_of(quantize(source, tmp_path / "q", bits=4, group_size=32, head="int8").conversion.path)
    shutil.rmtree(tmp_path / "q")
    total = sum(len(data) for name, data in wanted.items() if name.endswith(".safetensors"))
    for point in (1, total // 9, total // 4, total // 3, total // 2, 2 * total // 3, total - 1):
        target = tmp_path / str(point) / "q"
        assert run_killed(source, target, limit=point) == -signal.SIGKILL
        assert not target.exists()
        quantize(source, target, bits=4, group_size=32, head="int8", resume=True)
        assert files_of(target) == wanted, point
        assert not partial_folder(target).exists()


def test_killed_again_and_again(tmp_path: Path) -> None:
    source = hf2jittor(write_folder(tmp_path / "hf", float_tensors()), tmp_path / "native").path
    wanted = files_of(quantize(source, tmp_path / "w" / "q", bits=4, group_size=32, head="int8").conversion.path)
    target = tmp_path / "q"
    rounds = 0
    while not target.exists():
        run_killed(source, target, limit=40_000, resume=rounds > 0)
        rounds += 1
        assert rounds < 30, "it gets further every time"
    assert rounds > 1
    assert files_of(target) == wanted
    assert read_errors(target).keys() == {*MATRICES, "lm_head.weight"}


def test_what_was_begun_otherwise_is_not_gone_on_with(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    target = tmp_path / "q"
    assert run_killed(source, target, limit=40_000) == -signal.SIGKILL
    with pytest.raises(ConfigError, match=r"unfinished run for .*q is in .*\.q\.partial. Go on with it by adding"):
        quantize(source, target, bits=4, group_size=32, head="int8")
    with pytest.raises(ConfigError, match=r"begun with name 'hf-int4', now 'hf-int8'; quantization .*'bits': 4.*now"):
        quantize(source, target, bits=8, group_size=32, head="int8", resume=True)
    with pytest.raises(ConfigError, match=r"begun with quantizer 'nearest, .*', now 'other'"):
        quantize(source, target, bits=4, group_size=32, head="int8", resume=True, quantizer=Halving())
    with pytest.raises(ConfigError, match=r"was begun by quantize, not by hf2jittor"):
        hf2jittor(source, target, resume=True)
    assert quantize(source, target, bits=4, group_size=32, head="int8", resume=True).conversion.resumed > 0
    done = quantize(source, target, bits=4, group_size=32, head="int8", resume=True)
    assert done.conversion.resumed == 21
    assert done.errors.keys() == {*MATRICES, "lm_head.weight"}
    with pytest.raises(ConfigError, match=r"q is finished already, .*name hf-int4, not hf-int8; quantization .*bits=4"):
        quantize(source, target, bits=8, group_size=32, head="int8", resume=True)
    with pytest.raises(ConfigError, match=r"something else: head int8, not floats; dtype float16, not float32\. Name"):
        quantize(source, target, bits=4, group_size=32, head="float16", dtype="float32", resume=True)


class Halving(RoundToNearest):
    """Another way to quantise: scales of half the size."""

    @property
    def label(self) -> str:
        return "other"

    def quantize(self, name: str, rows: Any, quantization: Quantization) -> QuantMatrix:
        assert name in {*MATRICES, "lm_head.weight"}
        made = super().quantize(name, rows, quantization)
        return QuantMatrix(made.codes, (made.scales / 2).astype(np.float16), made.zeros, made.groups)


def test_another_way_to_quantise_can_be_given(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    usual = quantize(source, tmp_path / "a", bits=4)
    other = quantize(source, tmp_path / "b", bits=4, quantizer=Halving())
    name = MATRICES[3]
    assert np.array_equal(numbers(tmp_path / "b", name) * 2, numbers(tmp_path / "a", name))
    assert usual.errors[name].plain == other.errors[name].plain
    assert other.errors[name].relative > 0.4 > usual.errors[name].relative
    assert isinstance(usual.errors[name], MatrixError)


def test_pieces_and_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    wanted = files_of(quantize(source, tmp_path / "a" / "q", bits=4, head="int8").conversion.path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(7)))
    assert files_of(quantize(source, tmp_path / "b" / "q", bits=4, head="int8").conversion.path) == wanted
    monkeypatch.setattr(native_tensors, "_NUMBERS_AT_ONCE", 1)
    found = files_of(quantize(source, tmp_path / "c" / "q", bits=4, head="int8").conversion.path)
    shard = next(name for name in wanted if name.endswith(".safetensors"))
    assert found[shard] == wanted[shard]


@pytest.mark.parametrize(("value", "words"), [(np.nan, "is NaN"), (np.inf, "is inf"), (-np.inf, "is -inf")])
def test_numbers_that_are_not_finite_are_named(tmp_path: Path, value: float, words: str) -> None:
    tensors = float_tensors()
    tensors["transformer.h.1.mlp.fc_in.weight"][33, 5] = value
    source = write_folder(tmp_path / "hf", tensors)
    with pytest.raises(CheckpointError, match=rf"h\.1\.mlp\.fc_in\.weight\[33, 5\] {words}"):
        quantize(source, tmp_path / "q", bits=4)
    assert names_in(tmp_path) == ["hf"]


def test_weights_too_large_for_their_scales_are_named(tmp_path: Path) -> None:
    tensors = float_tensors("float32")
    tensors["transformer.h.0.attn.out_proj.weight"][17, 40] = 2e6
    source = write_folder(tmp_path / "hf", tensors)
    with pytest.raises(
        CheckpointError, match=r"out_proj\.weight: the weights of row 17 from input 32 on are too large for int4"
    ):
        quantize(source, tmp_path / "q", bits=4, group_size=32)


def test_float64_needs_a_type(tmp_path: Path) -> None:
    tensors = {name: tensor.astype(np.float64) for name, tensor in float_tensors().items()}
    source = write_folder(tmp_path / "hf", tensors)
    with pytest.raises(CheckpointError, match=r"is float64, which needs --dtype"):
        quantize(source, tmp_path / "no", bits=4)
    assert quantize(source, tmp_path / "q", bits=4, dtype="float16").conversion.config.dtype == "float16"


def test_bits_must_be_said_and_groups_be_possible(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    with pytest.raises(ConfigError, match=r"hf is in floating point: say whether its matrices shall have 4 bits or 8"):
        quantize(source, tmp_path / "q", head="int8")
    for size in (0, -2):
        with pytest.raises(ConfigError, match=rf"groupsize is {size}; it must be positive, or -1"):
            quantize(source, tmp_path / "q", bits=4, group_size=size)
    with pytest.raises(ConfigError, match=r"wbits is 3"):
        quantize(source, tmp_path / "q", bits=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"hf exists already"):
        quantize(source, source, bits=4)
    with pytest.raises(CheckpointError, match=r"nothing"):
        quantize(tmp_path / "nothing", tmp_path / "q", bits=4)
    assert names_in(tmp_path) == ["hf"]


def test_files_may_arrive_one_by_one(tmp_path: Path) -> None:
    whole = write_shards(tmp_path / "whole" / "hf", float_tensors(), 4)
    wanted = files_of(quantize(whole, tmp_path / "whole" / "q", bits=4).conversion.path)
    source = tmp_path / "arriving" / "hf"
    shutil.copytree(whole, source)
    for file in sorted(source.glob("*.safetensors"))[1:]:
        file.unlink()
    brought: list[str] = []

    def arrive(file: Path) -> None:
        brought.append(file.name)
        shutil.copy(whole / file.name, file)

    done = quantize(source, tmp_path / "arriving" / "q", bits=4, arrive=arrive)
    assert brought == [f"model-{number:05d}-of-00004.safetensors" for number in (2, 3, 4)]
    found = files_of(done.conversion.path)
    assert found == wanted


def test_room_is_looked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    real = os.statvfs

    def small(path: Any) -> Any:
        found = real(path)
        return type("Status", (), {"f_bavail": 10, "f_frsize": 4096, "f_blocks": found.f_blocks})()

    monkeypatch.setattr(os, "statvfs", small)
    with pytest.raises(DiskError, match=r"q needs 0\.\d\d MB more; 0\.04 MB are free on its disk"):
        quantize(source, tmp_path / "q", bits=4)
    assert names_in(tmp_path) == ["hf"]


def test_an_interrupted_run_ends_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    publish = Workplace.publish

    def stop(self: Workplace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "COMMIT_BYTES", 1)
    monkeypatch.setattr(Workplace, "publish", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "q", bits=4)
    monkeypatch.setattr(Workplace, "publish", publish)
    shutil.rmtree(source)
    with pytest.raises(ConfigError, match="begun with"):
        quantize(source, tmp_path / "q", bits=8, resume=True)
    assert quantize(source, tmp_path / "q", bits=4, resume=True).conversion.resumed == 21


MEMORY = """
import os, sys
sys.path.insert(0, {root!r})
from moss_jt.converters.quantize import quantize
import numpy
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # each thread has some 10 MiB of work
def peak():  # of this program alone: ru_maxrss would count its parent's
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
quantize({src!r}, {dst!r}, bits=4, head="int8")
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """The model has 112 MiB."""
    shape = {**SHAPE, "n_embd": 1024, "n_head": 4, "n_layer": 2, "vocab_size": 16384}
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.integers(0x2000, 0x2C00, size, dtype=np.uint16).view(np.float16)
        for name, size in expected_shapes(MossConfig.from_dict(shape)).items()
    }
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(shape))
    code = MEMORY.format(root=str(ROOT), src=str(tmp_path / "hf"), dst=str(tmp_path / "q"))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(run.stdout) < 72 << 10  # KiB
