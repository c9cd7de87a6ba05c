"""Sizes as people write them, and what is free, found in files that stand for a machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from moss_jt.errors import ConfigError, DeviceMemoryError, StartupError
from moss_jt.memory import (
    GIB,
    KIB,
    MIB,
    automatic_memory,
    available_memory,
    format_size,
    memory_for,
    parse_size,
    peak_memory,
    require_room_to_start,
    resident_memory,
    room_in_process,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("6GiB", 6 * GIB),
        ("6g", 6 * GIB),
        ("6 G", 6 * GIB),
        ("6GB", 6 * 10**9),
        ("512MiB", 512 * MIB),
        ("512mb", 512 * 10**6),
        ("1.5GiB", 3 * GIB // 2),
        (".5g", GIB // 2),
        ("2.k", 2 * KIB),
        ("0.1GiB", GIB // 10),
        ("1t", 1024 * GIB),
        ("4096", 4096),
        ("4096B", 4096),
    ],
)
def test_a_size_is_read(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text", ["", "GiB", "six", "6 giga", "6GiBs", "-1g", "1e9", "1,5g", "0x10", "6 6", "\u0666g\n9"]
)
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--memory is .*; give a size like 6GiB, 6GB or 512MiB\.$"):
        parse_size(text, "--memory")


@pytest.mark.parametrize("text", ["0", "0GiB", "0.1B"])
def test_nothing_is_not_a_size(text: str) -> None:
    with pytest.raises(ConfigError, match="must be more than nothing"):
        parse_size(text)


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, MIB - 1, MIB, 10 * MIB + 1, GIB - 1, GIB, 7 * GIB + 12345])
def test_a_size_that_is_written_reads_back_as_no_less(count: int) -> None:
    text = format_size(count)
    assert count <= parse_size(text) <= count * 1.01 + 11
    assert len(text) <= len("1023.99MiB")


def machine(root: Path, *, free_mib: int = 8000, cgroup: str | None = None, **files: str) -> Path:
    """A /proc and /sys; `files` by path with "__" for "/"."""
    proc = root / "proc" / "self"
    proc.mkdir(parents=True)
    root.joinpath("proc", "meminfo").write_text(
        f"MemTotal:       16000000 kB\nMemFree:        1000 kB\nMemAvailable:   {free_mib << 10} kB\nHugePages_Total: 0\n"
    )
    if cgroup is not None:
        (proc / "cgroup").write_text(cgroup)
    for name, text in files.items():
        file = root.joinpath(*name.split("__"))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def group(root: Path, path: str, **values: str) -> None:
    """Files of a control group, "_" for "."."""
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in values.items():
        (folder / name.replace("_", ".", 1)).write_text(text + "\n")


def test_free_is_what_the_machine_says(tmp_path: Path) -> None:
    assert available_memory(machine(tmp_path)) == 8000 * MIB


def test_an_old_kernel_tells_only_what_nobody_uses(tmp_path: Path) -> None:
    root = machine(tmp_path)
    (root / "proc" / "meminfo").write_text("MemTotal: 16000 kB\nMemFree: 1000 kB\n")
    assert available_memory(root) == 1000 << 10


def test_without_meminfo_the_user_is_asked(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="meminfo does not tell the free memory"):
        available_memory(tmp_path)


def test_a_group_of_version_2_limits_what_is_left_of_it(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/user/app\n")
    group(root, "user/app", memory_max="max", memory_current=str(500 * MIB))
    group(
        root,
        "user",
        memory_max=str(3000 * MIB),
        memory_current=str(1200 * MIB),
        memory_stat="anon 5\ninactive_file 209715200",
    )
    assert available_memory(root) == (3000 - 1200 + 200) * MIB


def test_where_a_group_begins_to_swap_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/user/app\n")
    group(root, "user/app", memory_max="max", memory_high=str(900 * MIB), memory_current=str(500 * MIB))
    assert available_memory(root) == 400 * MIB


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/a/b\n")
    group(root, "a", memory_max=str(900 * MIB), memory_current=str(100 * MIB))
    group(root, "a/b", memory_max=str(700 * MIB), memory_current=str(50 * MIB))
    assert available_memory(root) == 650 * MIB


def test_in_a_container_the_group_is_at_the_root_of_the_mount(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/docker/0123456789\n")
    group(root, ".", memory_max=str(2048 * MIB), memory_current=str(48 * MIB))
    assert available_memory(root) == 2000 * MIB


def test_a_group_of_version_1_counts_too(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="5:cpu,cpuacct:/\n4:memory:/box\n1:name=systemd:/\n")
    folder = root / "sys/fs/cgroup/memory"
    for path, limit in (("", 2**63 - 4096), ("box", 1000 * MIB)):
        (folder / path).mkdir(parents=True, exist_ok=True)
        (folder / path / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / path / "memory.usage_in_bytes").write_text(f"{400 * MIB}\n")
    (folder / "box" / "memory.stat").write_text(f"cache 1\ntotal_inactive_file {100 * MIB}\n")
    assert available_memory(root) == 700 * MIB


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/\n")
    group(root, ".", memory_max=str(100 * MIB), memory_current=str(120 * MIB))
    assert available_memory(root) == 0


LIMITS = "Limit   Soft Limit   Hard Limit   Units\nMax data size   {data}   unlimited   bytes\nMax address space   {space}   unlimited   bytes\n"


def test_limits_that_leave_too_little_to_start_are_named(tmp_path: Path) -> None:
    status = f"VmSize:\t{MIB >> 10} kB\nVmData:\t{MIB >> 10} kB\n"
    root = machine(
        tmp_path, proc__self__limits=LIMITS.format(data=100 * MIB, space="unlimited"), proc__self__status=status
    )
    with pytest.raises(DeviceMemoryError, match=r"ulimit -d leaves 99MiB to this process; \S+iB are needed to start"):
        require_room_to_start(root)
    (root / "proc/self/limits").write_text(LIMITS.format(data="unlimited", space=300 * MIB))
    with pytest.raises(DeviceMemoryError, match="ulimit -v leaves 299MiB"):
        require_room_to_start(root)
    assert (room_in_process(root) or 0) < 299 * MIB
    (root / "proc/self/limits").write_text(LIMITS.format(data="unlimited", space="unlimited"))
    require_room_to_start(root)
    assert room_in_process(root) is None


def test_memory_that_cannot_be_had_says_what_it_was_for() -> None:
    with pytest.raises(DeviceMemoryError, match=r"memory for poems \(Unable to allocate 8.00 EiB"), memory_for("poems"):
        raise MemoryError("Unable to allocate 8.00 EiB")
    with pytest.raises(DeviceMemoryError, match=r"memory for poems\. Close"), memory_for("poems"):
        raise MemoryError


def test_limits_of_the_process_count(tmp_path: Path) -> None:
    status = "Name:\tpython\nVmSize:\t 1048576 kB\nVmData:\t 524288 kB\n"
    root = machine(
        tmp_path, proc__self__limits=LIMITS.format(data="unlimited", space=3 * GIB), proc__self__status=status
    )
    assert available_memory(root) == 2 * GIB
    (root / "proc/self/limits").write_text(LIMITS.format(data=GIB, space=3 * GIB))
    assert available_memory(root) == GIB // 2


@pytest.mark.parametrize(("free_mib", "taken_mib"), [(8000, 8000 - 1024), (40000, 36000), (1500, 750)])
def test_the_automatic_budget_leaves_a_reserve(tmp_path: Path, free_mib: int, taken_mib: int) -> None:
    assert automatic_memory(machine(tmp_path, free_mib=free_mib)) == taken_mib * MIB


def test_this_machine_has_memory() -> None:
    assert automatic_memory() > 0


def test_the_memory_of_this_process_is_told() -> None:
    assert MIB < resident_memory() <= peak_memory()
