"""What this machine and this Python offer for compiling and running Jittor: facts, and checks of them.

Functions named `require_…` raise a StartupError with the command that mends the matter; the others
only look. Nothing here imports Jittor or numpy.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from moss_jt.errors import StartupError
from moss_jt.memory import available_memory
from moss_jt.paths import HOME_VARIABLE

JITTOR_VERSION = "1.3.11.0"
JITTOR_SERIES = "1.3.11."
NUMPY_OLDEST = (1, 26)
NUMPY_NEWEST_MAJOR = 2
FREE_BYTES_NEEDED = 1 << 30
BYTES_PER_COMPILER = 700 << 20  # measured: the largest of Jittor's files takes about 600 MiB in g++ 12
_BAD_IN_PATHS = set(" \t\n\"'`$\\;&|<>()*?[]!~#")


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_jittor() -> importlib.metadata.Distribution:
    """The installed Jittor, which must be of the series that the shadow headers were made for."""
    try:
        found = importlib.metadata.distribution("jittor")
    except importlib.metadata.PackageNotFoundError:
        raise StartupError(
            f"Jittor {JITTOR_VERSION} is needed, none is installed for {sys.executable}: "
            f"{pip_install(f'jittor=={JITTOR_VERSION}')}"
        ) from None
    if not found.version.startswith(JITTOR_SERIES):
        raise StartupError(
            f"Jittor {JITTOR_VERSION} is needed, found {found.version}: {pip_install(f'jittor=={JITTOR_VERSION}')}"
        )
    return found


def pip_install(*requirements: str) -> str:
    """The command that installs these for the running interpreter."""
    return f"{sys.executable} -m pip install " + " ".join(f"'{item}'" for item in requirements)


def numpy_version() -> str | None:
    """The version of numpy: that of the imported one, else that of the installed one."""
    loaded = sys.modules.get("numpy")
    return str(loaded.__version__) if loaded is not None else installed_version("numpy")


def is_numpy_supported(version: str) -> bool:
    """Whether Jittor with our shadow header reads arrays of this numpy correctly."""
    parts = version.split(".")
    try:
        major, minor = int(parts[0]), int(parts[1])
    except (IndexError, ValueError):
        return False
    return (major, minor) >= NUMPY_OLDEST and major <= NUMPY_NEWEST_MAJOR


def require_numpy() -> str:
    """The version of numpy, which must be one that Jittor reads correctly."""
    version = numpy_version()
    wanted = f"numpy>={NUMPY_OLDEST[0]}.{NUMPY_OLDEST[1]},<{NUMPY_NEWEST_MAJOR + 1}"
    if version is None or not is_numpy_supported(version):
        raise StartupError(
            f"{wanted} is needed (others would give wrong numbers silently), found {version or 'none'}: "
            f"{pip_install(wanted)}"
        )
    return version


def compiler() -> Path | None:
    """The C++ compiler that Jittor will use."""
    found = shutil.which("g++")
    return Path(found) if found else None


def require_compiler() -> Path:
    """The C++ compiler, or an error that names the package."""
    found = compiler()
    if found is None:
        raise StartupError("a C++ compiler is needed to build Jittor's core, found no g++ on PATH: apt install g++")
    return found


def include_folders() -> list[Path]:
    """The folders of this interpreter's C headers."""
    paths = sysconfig.get_paths()
    return [Path(folder) for folder in dict.fromkeys((paths["include"], paths["platinclude"]))]


def has_python_headers() -> bool:
    """Whether Python.h of this interpreter is there."""
    return any((folder / "Python.h").is_file() for folder in include_folders())


def require_python_headers() -> list[Path]:
    """The folders of this interpreter's C headers, which must hold Python.h."""
    folders = include_folders()
    if not has_python_headers():
        raise StartupError(
            f"the C headers of Python {platform.python_version()} are needed, found no {folders[0] / 'Python.h'}: "
            f"apt install {headers_package()}"
        )
    return folders


def headers_package() -> str:
    """Debian's package with the headers of this interpreter."""
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    return "python3-dev" if _system_python_is(ours) else f"python{ours}-dev"


def _system_python_is(version: str) -> bool:
    return Path("/usr/bin/python3").resolve().name in (f"python{version}", "python3")


def require_usable_home(home: Path) -> None:
    """Jittor writes into its folder at every start: check that it can, and that shells can spell it."""
    bad = sorted(set(str(home)) & _BAD_IN_PATHS)
    if bad:
        raise StartupError(
            f"Jittor cannot work in the folder {str(home)!r} because of the character {bad[0]!r}: "
            f"set {HOME_VARIABLE} to a folder without it"
        )
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home) as file:
            has_locks = _can_lock(file.fileno())
    except OSError as error:
        raise StartupError(
            f"the folder {home} must be writable for Jittor's compiled code, found: {error.strerror or error}; "
            f"set {HOME_VARIABLE} to a folder that you can write"
        ) from error
    if not has_locks:
        raise StartupError(
            f"the folder {home} lies on a file system without locks, which Jittor needs; "
            f"set {HOME_VARIABLE} to a folder on a local disk"
        )
    if os.statvfs(home).f_flag & os.ST_NOEXEC:
        raise StartupError(
            f"the folder {home} lies on a disk mounted noexec, where compiled code cannot run; "
            f"set {HOME_VARIABLE} to a folder elsewhere"
        )


def _can_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def free_bytes(folder: Path) -> int:
    """Free disk space where this folder is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_room(home: Path) -> None:
    """Compiling takes about 400 MB; ask for more so that kernels fit as well."""
    free = free_bytes(home)
    if free < FREE_BYTES_NEEDED:
        raise StartupError(
            f"compiling Jittor needs {FREE_BYTES_NEEDED >> 20} MiB of free disk in {home}, found {free >> 20} MiB; "
            f"make room or set {HOME_VARIABLE} to a folder elsewhere"
        )


def allowed_cpus() -> list[int]:
    """The logical processors that this process may use."""
    return sorted(os.sched_getaffinity(0))


def logical_cores() -> int:
    """How many logical processors may be busy at once: affinity and the container's quota."""
    return max(1, min(len(allowed_cpus()), _cgroup_cores()))


def physical_cores() -> int:
    """How many real cores lie under the allowed processors, within the container's quota."""
    cores = {_core_of(cpu) for cpu in allowed_cpus()}
    return max(1, min(len(cores), _cgroup_cores()))


def _core_of(cpu: int) -> str:
    siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return siblings.read_text("ascii").strip()
    except OSError:
        return str(cpu)


def _cgroup_cores() -> int:
    unlimited = 1 << 20
    for quota_file, period_file in (
        ("/sys/fs/cgroup/cpu.max", None),
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    ):
        try:
            words = Path(quota_file).read_text("ascii").split()
            if period_file:
                words += Path(period_file).read_text("ascii").split()
            quota, period = int(words[0]), int(words[1])
        except (OSError, ValueError, IndexError):  # no such cgroup, or "max"
            continue
        if quota > 0 and period > 0:
            return max(1, round(quota / period))
    return unlimited


def memory_bytes() -> tuple[int, int]:
    """Main memory of the machine, and what this process may still take: less, in a container with a limit."""
    values: dict[str, int] = {}
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) << 10
    free = min(values.get("MemAvailable", values["MemFree"]), available_memory())
    return values["MemTotal"], free


def compile_jobs() -> int:
    """How many compilers to run at once: every core, as far as the free memory goes."""
    return max(1, min(logical_cores(), memory_bytes()[1] // BYTES_PER_COMPILER))


def processor() -> str:
    """Model and instruction sets, on which code made with -march=native depends."""
    wanted = {}
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            name = line.partition(":")[0].strip()
            if name in ("model name", "flags", "Features") and name not in wanted:
                wanted[name] = line
    except OSError:
        return platform.processor()
    return "\n".join(wanted.values())
