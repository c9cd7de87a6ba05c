"""Interrupted at any moment, a conversion goes on to the same bytes, or is not seen at all."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from moss_folders import files_of, float_tensors, gptq_tensors, names_in, write_folder, write_shards

from moss_jt.converters import output
from moss_jt.converters.hf2jittor import hf2jittor
from moss_jt.converters.jittor2hf import jittor2hf
from moss_jt.converters.journal import JOURNAL_FILE, PLAN_FILE, Workplace, partial_folder
from moss_jt.converters.synth import preset_config, synthesize
from moss_jt.errors import ConfigError, DiskError

# runs a call of the library and kills itself when so many bytes have been written, or at a named call of os
KILLER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import numpy
from moss_jt.converters import output
from moss_jt.converters.hf2jittor import hf2jittor
output.COMMIT_BYTES = 20_000
output.PIECE_BYTES = 4096
left = {limit}
write = os.pwrite
def counted(fd, data, position):
    global left
    part = data[: max(1, min(len(data), left))]
    done = write(fd, part, position)
    left -= done
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
os.pwrite = counted
if {call!r}:
    real = getattr(os, {call!r})
    def killed(*args, **kwargs):
        if {after}:
            real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(os, {call!r}, killed)
hf2jittor({src!r}, {dst!r}, resume={resume}, delete_source={delete})
"""


def run_killed(
    src: Path,
    dst: Path,
    *,
    limit: int = 1 << 60,
    call: str = "",
    after: bool = False,
    resume: bool = False,
    delete: bool = False,
) -> int:
    """Convert in another process that kills itself; its exit status."""
    root = str(Path(__file__).parents[2])
    code = KILLER.format(
        root=root, src=str(src), dst=str(dst), limit=limit, call=call, after=after, resume=resume, delete=delete
    )
    return subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode


@pytest.mark.parametrize("kind", ["floats", "gptq"])
def test_killed_at_many_points_and_resumed(tmp_path: Path, kind: str) -> None:
    tensors = float_tensors() if kind == "floats" else gptq_tensors(8, 32, act_order=True)
    source = write_shards(tmp_path / "hf", tensors, 3)
    wanted = files_of(hf2jittor(source, tmp_path / "wanted").path)
    total = sum(len(data) for name, data in wanted.items() if name.endswith(".safetensors"))
    for point in (1, total // 7, total // 3, total // 2, total - 1):
        target = tmp_path / f"at-{point}"
        assert run_killed(source, target, limit=point) == -signal.SIGKILL
        assert not target.exists()
        assert (partial_folder(target) / PLAN_FILE).exists()
        hf2jittor(source, target, resume=True)
        assert files_of(target) == wanted
        assert not partial_folder(target).exists()


def test_killed_again_and_again(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", gptq_tensors(4, 32))
    wanted = files_of(hf2jittor(source, tmp_path / "wanted").path)
    target = tmp_path / "native"
    rounds = 0
    while not target.exists():
        # a little longer each time: where a busy disk syncs slowly, a short run ends before it has noted anything
        run_killed(source, target, limit=60_000 + 10_000 * rounds, resume=rounds > 0)
        rounds += 1
        assert rounds < 50, "it does not come to an end"
    assert rounds > 1
    assert files_of(target) == wanted


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", ["rename", "fdatasync", "fsync"])
def test_killed_around_a_system_call(tmp_path: Path, call: str, after: bool) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    wanted = files_of(hf2jittor(source, tmp_path / "wanted").path)
    target = tmp_path / "native"
    assert run_killed(source, target, call=call, after=after) == -signal.SIGKILL
    assert target.exists() == (call == "rename" and after)
    hf2jittor(source, target, resume=True)
    assert files_of(target) == wanted
    assert names_in(tmp_path) == ["hf", "native", "wanted"]


def test_resuming_works_without_the_files_that_are_used_up(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "hf", float_tensors(), 5)
    shutil.copytree(source, tmp_path / "again" / "hf")
    wanted = files_of(hf2jittor(source, tmp_path / "wanted").path)
    source, target = tmp_path / "again" / "hf", tmp_path / "again" / "native"
    total = sum(len(data) for name, data in wanted.items() if name.endswith(".safetensors"))
    assert run_killed(source, target, limit=int(total * 0.8), delete=True) == -signal.SIGKILL
    left = list(source.glob("*.safetensors"))
    assert 0 < len(left) < 5
    hf2jittor(source, target, resume=True, delete_source=True)
    assert files_of(target) == wanted
    assert names_in(source) == ["config.json"]


def test_resuming_works_without_any_source_once_all_is_written(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    wanted = files_of(hf2jittor(source, tmp_path / "wanted").path)
    target = tmp_path / "native"
    assert run_killed(source, target, call="rename", delete=True) == -signal.SIGKILL
    shutil.rmtree(source)
    assert hf2jittor(source, target, resume=True).resumed == 21
    assert files_of(target) == wanted


def test_a_lost_file_that_is_still_needed_is_named(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "hf", float_tensors(), 3)
    target = tmp_path / "native"
    run_killed(source, target, limit=100_000)
    (source / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(
        Exception, match=r"lacks model-00003-of-00003\.safetensors, not all of which has been converted"
    ):
        hf2jittor(source, target, resume=True)
    assert (partial_folder(target) / PLAN_FILE).exists()


def interrupted(tmp_path: Path) -> tuple[Path, Path]:
    """A source and the destination of a conversion of it that was killed midway."""
    source = write_folder(tmp_path / "hf", float_tensors())
    target = tmp_path / "native"
    assert run_killed(source, target, limit=150_000) == -signal.SIGKILL
    return source, target


def test_an_unfinished_run_is_not_thrown_away_unasked(tmp_path: Path) -> None:
    source, target = interrupted(tmp_path)
    with pytest.raises(
        ConfigError, match=r"unfinished run for .*native is in .*\.native\.partial. Go on with it by adding --resume"
    ):
        hf2jittor(source, target)
    hf2jittor(source, target, resume=True)


def test_damage_to_what_was_done_is_found_and_mended(tmp_path: Path) -> None:
    source, target = interrupted(tmp_path)
    wanted = files_of(hf2jittor(source, tmp_path / "wanted").path)
    out = partial_folder(target) / "out"
    shard = next(out.glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.seek(4096 + 10)
        file.write(b"\xff\xff")
    with (partial_folder(target) / JOURNAL_FILE).open("ab") as journal:
        journal.write(b"0123 a torn li")
    hf2jittor(source, target, resume=True)
    assert files_of(target) == wanted


def test_a_lost_output_file_is_written_again(tmp_path: Path) -> None:
    source, target = interrupted(tmp_path)
    wanted = files_of(hf2jittor(source, tmp_path / "wanted").path)
    next((partial_folder(target) / "out").glob("*.safetensors")).unlink()
    hf2jittor(source, target, resume=True)
    assert files_of(target) == wanted


def test_other_options_and_other_sources_are_refused(tmp_path: Path) -> None:
    source, target = interrupted(tmp_path)
    with pytest.raises(ConfigError, match=r"was begun with dtype None, now 'float32'"):
        hf2jittor(source, target, resume=True, dtype="float32")
    shutil.rmtree(source)
    write_folder(source, float_tensors(seed=1))
    with pytest.raises(
        ConfigError, match=r"model\.safetensors in .*hf changed since the conversion began. Delete .*partial"
    ):
        hf2jittor(source, target, resume=True)
    with pytest.raises(ConfigError, match=r"was begun by hf2jittor, not by synth"):
        synthesize(preset_config("tiny"), target, resume=True)


def test_a_plan_from_elsewhere_is_refused(tmp_path: Path) -> None:
    source, target = interrupted(tmp_path)
    (partial_folder(target) / PLAN_FILE).write_text('{"version": 99}')
    with pytest.raises(ConfigError, match=r"is not a plan that this program can go on with \(version 99\)"):
        hf2jittor(source, target, resume=True)


def test_resuming_what_is_finished_does_nothing(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    wanted = files_of(hf2jittor(source, tmp_path / "native").path)
    done = hf2jittor(source, tmp_path / "native", resume=True)
    assert done.resumed == 21
    assert files_of(done.path) == wanted


def test_resuming_what_was_never_begun_begins_it(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    (tmp_path / ".native.partial" / "out").mkdir(parents=True)  # killed before the plan was written
    (tmp_path / ".native.partial" / "out" / "vocab.json").write_text("half")
    hf2jittor(source, tmp_path / "native", resume=True)
    assert not (tmp_path / "native" / "vocab.json").exists()


def test_a_mount_point_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last step failed: a folder that a disk is mounted on cannot be replaced."""
    source = write_folder(tmp_path / "hf", float_tensors())
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "disk")
    with pytest.raises(
        ConfigError, match=r"disk is where a disk is mounted.* Name a folder inside it, such as .*disk/"
    ):
        hf2jittor(source, tmp_path / "disk")
    assert names_in(tmp_path) == ["disk", "hf"]
    hf2jittor(source, tmp_path / "disk" / "model")


def test_two_at_once(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    target = tmp_path / "native"
    with Workplace(target, "hf2jittor", resume=False):
        for resume in (False, True):
            with pytest.raises(ConfigError, match=r"another process is writing .*native now"):
                hf2jittor(source, target, resume=resume)
    hf2jittor(source, target)


def test_a_full_disk_is_told_and_resumed_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    wanted = files_of(hf2jittor(source, tmp_path / "wanted").path)
    left = 100_000
    write = os.pwrite

    def limited(fd: int, data: Any, position: int) -> int:
        nonlocal left
        if len(data) > left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= len(data)
        return write(fd, data, position)

    monkeypatch.setattr(output, "COMMIT_BYTES", 1)
    monkeypatch.setattr(os, "pwrite", limited)
    with pytest.raises(
        DiskError, match=r"cannot be written: No space left on device. Make room; --resume then goes on"
    ):
        hf2jittor(source, tmp_path / "native")
    assert not (tmp_path / "native").exists()
    monkeypatch.setattr(os, "pwrite", write)
    done = hf2jittor(source, tmp_path / "native", resume=True)
    assert done.resumed > 0
    assert files_of(done.path) == wanted


def test_a_really_full_disk(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        filler = disk / "filler"
        filler.write_bytes(bytes(5 * 2**20 - 150_000))
        code = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
            "from moss_jt.converters import output\n"
            "output._SPARE_BYTES = -(1 << 40)  # the check beforehand would stop it\n"
            "from moss_jt.converters.hf2jittor import hf2jittor\n"
            f"hf2jittor({str(source)!r}, {str(disk / 'native')!r})\n"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
        assert "DiskError" in run.stderr
        assert "No space left on device" in run.stderr
        assert not (disk / "native").exists()
        with pytest.raises(DiskError, match=r"needs 0\.\d+ MB more; 0\.\d+ MB are free on its disk"):
            hf2jittor(source, disk / "native", resume=True)
        filler.unlink()
        hf2jittor(source, disk / "native", resume=True)
        assert files_of(disk / "native") == files_of(hf2jittor(source, tmp_path / "wanted").path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_size_limit_is_a_disk_error(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", float_tensors())
    code = (
        f"import resource, sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from moss_jt.converters.hf2jittor import hf2jittor\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"hf2jittor({str(source)!r}, {str(tmp_path / 'native')!r})\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert "DiskError" in run.stderr
    assert "File too large" in run.stderr
    hf2jittor(source, tmp_path / "native", resume=True)


def test_the_way_back_and_synth_resume_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = hf2jittor(write_folder(tmp_path / "hf", gptq_tensors(4, 32)), tmp_path / "native").path
    wanted_back = files_of(jittor2hf(native, tmp_path / "wanted-back").path)
    config = preset_config("tiny", bits=8)
    wanted_synth = files_of(synthesize(config, tmp_path / "wanted-synth").path)
    monkeypatch.setattr(output, "COMMIT_BYTES", 1)
    publish = Workplace.publish

    def stop(self: Workplace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Workplace, "publish", stop)
    with pytest.raises(KeyboardInterrupt):
        jittor2hf(native, tmp_path / "back")
    with pytest.raises(KeyboardInterrupt):
        synthesize(config, tmp_path / "synth")
    monkeypatch.setattr(Workplace, "publish", publish)
    assert jittor2hf(native, tmp_path / "back", resume=True).resumed == len(gptq_tensors(4, 32))
    assert files_of(tmp_path / "back") == wanted_back
    assert jittor2hf(native, tmp_path / "back", resume=True).resumed == len(gptq_tensors(4, 32))
    with pytest.raises(ConfigError, match="was begun with other options"):
        synthesize(config, tmp_path / "synth", seed=5, resume=True)
    for _ in range(2):
        synthesize(config, tmp_path / "synth", resume=True)
        assert files_of(tmp_path / "synth") == wanted_synth


def photos(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "a.jpg").write_text("x")
    return ".safetensors"


def cut_weights(folder: Path) -> str:
    shard = next(folder.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    return shard.name


def other_header(folder: Path) -> str:
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes().replace(b"ln_1", b"ln_2", 1))
    return shard.name


def other_config(folder: Path) -> str:
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"n_head": 4', '"n_head": 8'))
    return file.name


@pytest.mark.parametrize("change", [photos, cut_weights, other_header, other_config])
def test_resuming_onto_something_else_is_refused(tmp_path: Path, change: Callable[[Path], str]) -> None:
    """Any folder that was there passed for the finished result."""
    config = preset_config("tiny", layers=1)
    native = synthesize(config, tmp_path / "native").path
    name = change(jittor2hf(native, tmp_path / "back").path)
    with pytest.raises(ConfigError, match=rf"back exists already, and is something else: \S*{name} is not there, or"):
        jittor2hf(native, tmp_path / "back", resume=True)
    name = change(native)
    with pytest.raises(ConfigError, match=rf"native exists already, and is something else: \S*{name} is not there"):
        synthesize(config, native, resume=True)
