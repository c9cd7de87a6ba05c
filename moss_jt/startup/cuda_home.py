"""A private CUDA folder, as Jittor 1.3.11 expects one, made of links to whatever toolkit and wheels are there.

Jittor looks for everything beside nvcc, wants unversioned library names (wheels have only versioned ones),
C++14 (CUDA 13's headers want C++17), headers that newer toolkits dropped, and machine code for sm_90 at most.
The folder mends all of that: `include/`, `lib64/`, and `bin/nvcc`, a wrapper. No installed file is changed.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from moss_jt.errors import StartupError
from moss_jt.startup.gpu import Driver
from moss_jt.startup.jittor_copy import staged
from moss_jt.startup.machine import pip_install
from moss_jt.startup.toolkit import (
    NEWEST_MAJOR,
    OLDEST_MAJOR,
    Toolkit,
    choose_toolkit,
    find_toolkits,
    wheel_folders,
    wheel_names,
)

_NEEDED = {
    "cuda-runtime": ("cudart", "cuda_runtime.h"),
    "cublas": ("cublas", "cublas_v2.h"),
    "curand": ("curand", "curand.h"),
}
_LIBRARY = re.compile(r"lib(cudart|cublas|cublasLt|curand|cudadevrt|cudart_static)\.(so(\.\d+)*|a)")
_SHADOWS = {"npp.h": "npp.h", "cub.cuh": "cub/cub.cuh"}  # used where the toolkit has none at that place
_HOST_COMPILERS = ("g++", *(f"g++-{version}" for version in range(15, 8, -1)))
_PROBE = "#include <cub/cub.cuh>\n__global__ void probe(int* x) { *x = 1; }\n"


@dataclass(frozen=True)
class CudaHome:
    """The folder: where it is (or will be) and what belongs in it."""

    root: Path
    toolkit: Toolkit
    device: str
    include_folders: tuple[Path, ...]
    libraries: dict[str, Path]

    @property
    def nvcc(self) -> Path:
        """The compiler that Jittor is told about."""
        return self.root / "bin" / "nvcc"

    def describe(self) -> str:
        """Device and toolkit in a few words."""
        return f"{self.device}, CUDA {self.toolkit.version_text} in {self.toolkit.top}"


def plan_cuda_home(parent: Path, driver: Driver) -> CudaHome | str:
    """Describe the folder for this driver, or say what is missing; nothing is written yet."""
    newest = driver.version[0] if driver.version else NEWEST_MAJOR
    toolkits = find_toolkits()
    toolkit = choose_toolkit(toolkits, newest)
    if toolkit is None:
        return _no_toolkit(toolkits, min(newest, NEWEST_MAJOR))
    wheels = wheel_folders(toolkit.version[0])
    includes = (*toolkit.include_folders(), *(w / "include" for w in wheels if (w / "include").is_dir()))
    # wheels first: torch and cupy load the same files, and one copy in the process is better than two
    libraries = _libraries([*(w / "lib" for w in wheels), *toolkit.library_folders()])
    missing = _missing(includes, libraries, toolkit)
    if missing:
        names = wheel_names(toolkit.version[0], missing)
        return f"CUDA {toolkit.version_text} in {toolkit.top} has no {' and '.join(missing)}: {pip_install(*names)}"
    device = f"{driver.gpus[0].name} ({driver.gpus[0].sm})" if driver.gpus else "no device"
    return CudaHome(parent / _hash(toolkit, includes, libraries), toolkit, device, includes, libraries)


def _no_toolkit(found: list[Toolkit], newest: int) -> str:
    wanted = f"a CUDA toolkit {OLDEST_MAJOR} to {newest} with nvcc is needed"
    have = ", ".join(f"{toolkit.version_text} in {toolkit.top}" for toolkit in found) or "none"
    remedy = (
        pip_install(*wheel_names(NEWEST_MAJOR, ["cuda-nvcc", "cuda-runtime", "cuda-cccl", "cublas", "curand"]))
        if newest >= NEWEST_MAJOR
        else "apt install nvidia-cuda-toolkit, or a newer driver"
    )
    return f"{wanted}, found {have}: {remedy}"


def _libraries(folders: list[Path]) -> dict[str, Path]:
    """File name -> file of the libraries that Jittor links, the first folder with a library decides."""
    found: dict[str, Path] = {}
    owners: dict[str, Path] = {}
    for folder in folders:
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            match = _LIBRARY.fullmatch(file.name)
            if match and owners.setdefault(match.group(1), folder) == folder:
                found[file.name] = file
    return found


def _missing(includes: tuple[Path, ...], libraries: dict[str, Path], toolkit: Toolkit) -> list[str]:
    system = (Path("/usr/include"),) if toolkit.top.parts[:3] == ("/", "usr", "lib") else ()
    present = {match.group(1) for match in map(_LIBRARY.fullmatch, libraries) if match and ".so" in match.string}
    return [
        name
        for name, (library, header) in _NEEDED.items()
        if library not in present or not any((folder / header).is_file() for folder in (*includes, *system))
    ]


def _hash(toolkit: Toolkit, includes: tuple[Path, ...], libraries: dict[str, Path]) -> str:
    parts = [str(toolkit), _wrapper(toolkit, "g++"), *map(str, includes), *map(str, sorted(libraries.values()))]
    parts += [text for _, text in sorted(_shadow_texts().items())]
    return f"{toolkit.version_text}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:12]}"


def _shadow_texts() -> dict[str, str]:
    shadow = files("moss_jt.startup") / "shadow"
    return {place: (shadow / name).read_text("utf-8") for name, place in _SHADOWS.items()}


def make_cuda_home(home: CudaHome) -> None:
    """Write the folder, unless it is there.

    Raises:
        StartupError: nvcc works with none of the C++ compilers here.
    """
    if home.nvcc.is_file() and _links_hold(home):
        return
    shutil.rmtree(home.root, ignore_errors=True)
    with staged(home.root) as stage:
        _link_headers(home, stage / "include")
        _link_libraries(home, stage / "lib64")
        host = _working_host_compiler(home.toolkit, stage)
        _write_wrapper(stage, home.toolkit, host)


def _links_hold(home: CudaHome) -> bool:
    return all(link.exists() for link in (home.root / "lib64").iterdir())


def _link_headers(home: CudaHome, target: Path) -> None:
    target.mkdir()
    for folder in home.include_folders:
        for entry in sorted(folder.iterdir()):
            link = target / entry.name
            if not link.is_symlink():
                link.symlink_to(entry)
    for place, text in _shadow_texts().items():
        if not (target / place.split("/")[0]).is_symlink():
            (target / place).parent.mkdir(exist_ok=True)
            (target / place).write_text(text, "utf-8")


def _link_libraries(home: CudaHome, target: Path) -> None:
    target.mkdir()
    for name, file in home.libraries.items():
        (target / name).symlink_to(file)
    for name in sorted(home.libraries):
        plain = target / (name.split(".so")[0] + ".so")
        if ".so." in name and not plain.is_symlink():
            plain.symlink_to(name)


def _working_host_compiler(toolkit: Toolkit, stage: Path) -> str:
    """The first C++ compiler that this nvcc accepts: it refuses those that are newer than itself."""
    source, complaint = stage / "probe.cu", ""
    source.write_text(_PROBE, "ascii")
    for host in filter(None, map(shutil.which, _HOST_COMPILERS)):
        _write_wrapper(stage, toolkit, host)
        command = [
            str(stage / "bin" / "nvcc"), "-std=c++14", f"-I{stage / 'include'}", "-w", "-c", str(source),
            "-o", str(stage / "probe.o"),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return host
        complaint = complaint or _first_error(result.stderr + result.stdout)
    raise StartupError(
        f"nvcc {toolkit.version_text} ({toolkit.nvcc}) works with no C++ compiler here ({complaint}): "
        "install an older one beside (apt install g++-12), or use the CPU (device cpu)"
    )


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")


def _write_wrapper(stage: Path, toolkit: Toolkit, host: str) -> None:
    wrapper = stage / "bin" / "nvcc"
    wrapper.parent.mkdir(exist_ok=True)
    wrapper.write_text(_wrapper(toolkit, host), "utf-8")
    wrapper.chmod(0o755)


def _wrapper(toolkit: Toolkit, host: str) -> str:
    """A shell script around nvcc that turns Jittor's options into ones that this release accepts."""
    newer_standard = "    -std=c++11|-std=c++14) word=-std=c++17 ;;\n" if toolkit.version[0] >= 13 else ""
    return (
        "#!/bin/sh\n"
        "ptx=\n"
        'for word do case "$word" in -arch=compute_*) ptx=${word#-arch=} ;; esac; done\n'
        "for word do\n"
        "  shift\n"
        '  case "$word" in\n'
        f"{newer_standard}"
        "    -ccbin=*) continue ;;\n"
        '    -iquote?*) set -- "$@" -Xcompiler ;;\n'
        # portable code beside machine code: Jittor knows no device after sm_90
        '    -code=sm_*) if [ -n "$ptx" ]; then word="$word,$ptx"; ptx=; fi ;;\n'
        "  esac\n"
        '  set -- "$@" "$word"\n'
        "done\n"
        f'exec {shlex.quote(str(toolkit.nvcc))} -ccbin {shlex.quote(host)} "$@"\n'
    )
