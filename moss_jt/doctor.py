"""What `moss-jt doctor` finds out: a list of findings, as data.

Each finding is made by a small function that only looks; none imports Jittor, and none compiles. `deep`
adds the one that really starts Jittor and computes with it.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from moss_jt.errors import StartupError
from moss_jt.language import pick
from moss_jt.paths import HOME_VARIABLE, home, jittor_home
from moss_jt.progress import Progress, Quiet
from moss_jt.startup import import_jittor, machine, onednn
from moss_jt.startup.compiling import is_built
from moss_jt.startup.gpu import Driver, ask_driver
from moss_jt.startup.plan import cuda_state, make_plan
from moss_jt.startup.toolkit import find_toolkits

State = Literal["ok", "warn", "fail"]
SUPPORTED_PYTHONS = ((3, 10), (3, 13))
LITTLE_MEMORY_BYTES = 4 << 30
LITTLE_DISK_BYTES = 20 << 30  # an int4 MOSS and its download


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        id: a fixed name, for programs.
        title: what was looked at, in the user's language.
        value: what was found.
        state: "ok", "warn" (works, but less well or not for everything) or "fail" (Jittor cannot start).
        fix: the one command or action that mends it, None where there is nothing to mend.
    """

    id: str
    title: str
    value: str
    state: State = "ok"
    fix: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """The finding as plain data."""
        return asdict(self)


def examine(*, deep: bool = False, progress: Progress | None = None) -> list[Finding]:
    """Look at everything that moss-jt needs on this machine.

    Args:
        deep: also start Jittor, compiling it if need be, and check that it computes correctly.
        progress: told about the compilation when `deep`.
    """
    driver = ask_driver()
    findings = [make() for make in _CHECKS]
    findings += [_cuda_driver(driver), _cuda_toolkit(driver), _cuda_use(driver), _cupy(driver)]
    findings += [_memory(), _disk(), _cache()]
    if deep:
        findings.append(_self_check(Quiet() if progress is None else progress))
    return findings


def is_healthy(findings: list[Finding]) -> bool:
    """Whether nothing stands in the way of starting."""
    return all(finding.state != "fail" for finding in findings)


def gib(count: int) -> str:
    """A number of bytes as GiB."""
    return f"{count / (1 << 30):.1f} GiB"


def _python() -> Finding:
    version = f"{platform.python_version()} ({sys.executable})"
    low, high = SUPPORTED_PYTHONS
    if not low <= sys.version_info[:2] <= high:
        fix = "apt install python3 python3-venv"
        return Finding("python", "Python", f"{version}; {low[0]}.{low[1]} – {high[0]}.{high[1]}", "fail", fix)
    return Finding("python", "Python", version)


def _python_headers() -> Finding:
    title = pick("Python headers", "Python 头文件")
    folder = machine.include_folders()[0]
    if machine.has_python_headers():
        return Finding("python_headers", title, str(folder))
    value = pick(f"no Python.h in {folder}", f"{folder} 中没有 Python.h")
    return Finding("python_headers", title, value, "fail", f"apt install {machine.headers_package()}")


def _compiler() -> Finding:
    title = pick("C++ compiler", "C++ 编译器")
    found = machine.compiler()
    if found is None:
        return Finding("compiler", title, pick("no g++ on PATH", "PATH 中没有 g++"), "fail", "apt install g++")
    return Finding("compiler", title, f"g++ {_first_line_of(str(found), '-dumpfullversion')} ({found})")


def _first_line_of(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return (result.stdout.strip().splitlines() or ["?"])[0]


def _jittor() -> Finding:
    try:
        version = machine.require_jittor().version
    except StartupError:
        found = machine.installed_version("jittor") or pick("not installed", "未安装")
        fix = machine.pip_install(f"jittor=={machine.JITTOR_VERSION}")
        return Finding("jittor", "Jittor", found, "fail", fix)
    return Finding("jittor", "Jittor", version)


def _jittor_core() -> Finding:
    title = pick("Jittor's core", "Jittor 内核")
    try:
        compiled = is_built(make_plan("cpu"))
    except StartupError as error:
        value = pick(f"cannot be compiled yet: {error}", f"尚不能编译：{error}")
        return Finding("jittor_core", title, value, "fail", pick("mend the points marked ✗", "先解决标有 ✗ 的各项"))
    if compiled:
        return Finding("jittor_core", title, pick("compiled", "已编译"))
    minutes = max(1, round(5 / machine.logical_cores()))
    value = pick(f"not compiled yet (once, about {minutes} min)", f"尚未编译（仅需一次，约 {minutes} 分钟）")
    return Finding("jittor_core", title, value, "warn", "moss-jt warmup")


def _numpy() -> Finding:
    try:
        return Finding("numpy", "numpy", machine.require_numpy())
    except StartupError:
        found = machine.numpy_version() or pick("not installed", "未安装")
        return Finding("numpy", "numpy", found, "fail", machine.pip_install("numpy>=1.26,<3"))


def _onednn() -> Finding:
    if platform.machine() != "x86_64":
        value = pick(f"not made for {platform.machine()}", f"不支持 {platform.machine()}")
        return Finding("onednn", "oneDNN", value)
    if onednn.find_onednn() is None:
        value = pick(
            "not installed: matrix products on the CPU are 5 to 50 times slower", "未安装：CPU 矩阵乘法慢 5 到 50 倍"
        )
        return Finding("onednn", "oneDNN", value, "warn", machine.pip_install(*onednn.REQUIREMENTS))
    return Finding("onednn", "oneDNN", f"2.2.0 (wheel {onednn.VERSION})")


def _cuda_driver(driver: Driver) -> Finding:
    title = pick("CUDA driver and device", "CUDA 驱动和设备")
    if driver.problem is not None:
        value = pick(f"none: {driver.problem}", f"无：{driver.problem}")
        has_card = Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None
        fix = pick("look at the driver with: nvidia-smi", "用 nvidia-smi 检查驱动") if has_card else None
        return Finding("cuda_driver", title, value, "warn" if has_card else "ok", fix)
    gpus = ", ".join(f"{gpu.name} {gib(gpu.memory_bytes)} {gpu.sm}" for gpu in driver.gpus)
    return Finding("cuda_driver", title, f"CUDA {driver.version_text}: {gpus}")


def _cuda_toolkit(driver: Driver) -> Finding:
    title = pick("CUDA toolkit", "CUDA 工具包")
    found = ", ".join(f"{toolkit.version_text} ({toolkit.top})" for toolkit in find_toolkits())
    if found:
        return Finding("cuda_toolkit", title, found)
    if driver.problem is not None:
        return Finding("cuda_toolkit", title, pick("none (not needed without a device)", "无（没有设备时不需要）"))
    return Finding("cuda_toolkit", title, pick("none", "无"), "warn", _fix_in(cuda_state(jittor_home(), driver)[0]))


def _cuda_use(driver: Driver) -> Finding:
    title = pick("Device for Jittor", "Jittor 可用设备")
    problem, cuda = cuda_state(jittor_home(), driver)
    if cuda is not None:
        return Finding("device", title, f"CUDA: {cuda.describe()}")
    value = pick(
        f"CPU, {machine.physical_cores()} cores ({problem})", f"CPU，{machine.physical_cores()} 核（{problem}）"
    )
    if driver.problem is None:
        return Finding("device", title, value, "warn", _fix_in(problem))
    return Finding("device", title, value)


def _fix_in(problem: str) -> str | None:
    """The command that ends a message of the start-up, after its last colon."""
    command = problem.rpartition(": ")[2]
    return command if " install " in command else None


def _cupy(driver: Driver) -> Finding:
    installed = [
        name for name in ("cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x", "cupy") if machine.installed_version(name)
    ]
    if installed and importlib.util.find_spec("cupy") is not None:
        value = f"{installed[0]} {machine.installed_version(installed[0])}"
        return Finding("cupy", "cupy", value) if driver.problem is not None else _nvrtc(installed[0], value)
    if driver.problem is not None or driver.version is None:
        return Finding("cupy", "cupy", pick("none (not needed without a device)", "无（没有设备时不需要）"))
    wanted = f"cupy-cuda{min(max(driver.version[0], 11), 13)}x"
    value = pick("not installed: our CUDA kernels need it", "未安装：CUDA 内核需要它")
    return Finding("cupy", "cupy", value, "warn", machine.pip_install(wanted))


def _nvrtc(cupy: str, value: str) -> Finding:
    """Whether cupy, of the wheel of that name, finds the compiler of our kernels."""
    from moss_jt.kernels.machine_code import Nvrtc

    try:
        return Finding("cupy", "cupy", f"{value}, NVRTC {Nvrtc().version}")
    except (ImportError, RuntimeError) as error:
        release = re.search(r"1[12]", cupy)
        wheel = "nvidia-cuda-nvrtc" if release is None else f"nvidia-cuda-nvrtc-cu{release[0]}"
        problem = pick("it does not find NVRTC, which compiles our kernels", "找不到编译 CUDA 内核的 NVRTC")
        return Finding("cupy", "cupy", f"{value}: {problem} ({error})", "warn", machine.pip_install(wheel))


def _memory() -> Finding:
    total, available = machine.memory_bytes()
    title = pick("Memory", "内存")
    value = pick(f"{gib(total)}, {gib(available)} free", f"{gib(total)}，空闲 {gib(available)}")
    if available < LITTLE_MEMORY_BYTES:
        return Finding("memory", title, value, "warn", pick("close other programs", "关闭其他程序"))
    return Finding("memory", title, value)


def _disk() -> Finding:
    title = pick("Free disk", "可用磁盘")
    free = machine.free_bytes(home())
    value = pick(f"{gib(free)} in {home()}", f"{home()} 中有 {gib(free)}")
    fix = pick(f"make room, or set {HOME_VARIABLE} to another disk", f"清理磁盘，或将 {HOME_VARIABLE} 设到其他磁盘")
    if free < machine.FREE_BYTES_NEEDED:
        return Finding("disk", title, value, "fail", fix)
    if free < LITTLE_DISK_BYTES:
        return Finding(
            "disk", title, pick(f"{value}: little for a MOSS model", f"{value}：存放 MOSS 模型可能不够"), "warn", fix
        )
    return Finding("disk", title, value)


def _cache() -> Finding:
    title = pick("Cache folder", "缓存目录")
    try:
        machine.require_usable_home(jittor_home())
    except StartupError as error:
        fix = pick(f"export {HOME_VARIABLE}=/a/folder/that/you/can/write", f"export {HOME_VARIABLE}=可写的目录")
        return Finding("cache", title, str(error), "fail", fix)
    return Finding("cache", title, str(home()))


def _self_check(progress: Progress) -> Finding:
    title = pick("Self-check", "自检")
    try:
        jittor: Any = import_jittor(device="cpu", progress=progress)
    except StartupError as error:
        return Finding("self_check", title, str(error), "fail", _fix_in(str(error)))
    value = pick(f"Jittor {jittor.__version__} computes correctly", f"Jittor {jittor.__version__} 计算正确")
    return Finding("self_check", title, value)


_CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _python_headers,
    _compiler,
    _numpy,
    _jittor,
    _jittor_core,
    _onednn,
)
