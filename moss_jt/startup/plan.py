"""Everything that decides how Jittor is started, worked out before anything is written or imported.

A Plan is a value: the device, the folders, the environment variables of the import, and a key that changes
whenever the compiled core would. `prepare` then writes the files that the plan names.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path
from typing import Literal

from moss_jt.errors import StartupError
from moss_jt.paths import jittor_home
from moss_jt.startup import machine
from moss_jt.startup.cuda_home import CudaHome, make_cuda_home, plan_cuda_home
from moss_jt.startup.gpu import OLDEST_CAPABILITY, Driver, ask_driver
from moss_jt.startup.jittor_copy import copy_name, copy_packages
from moss_jt.startup.onednn import OneDnn, find_onednn, is_linked, link_onednn
from moss_jt.startup.tools import Tools, plan_tools, shadow_hash

Device = Literal["cpu", "cuda"]
DeviceWish = Literal["auto", "cpu", "cuda"]

# Settings of Jittor that a user may have set for other programs and that would change our build.
FOREIGN_VARIABLES = (
    "DISABLE_MULTIPROCESSING",
    "JT_SAVE_MEM",
    "OMPI_COMM_WORLD_SIZE",  # with it Jittor takes its MPI for built, which comes later (mpi.py)
    "SKEY",
    "cuda_arch",
    "cuda_archs",
    "cuda_debug",
    "debug",
    "disable_lock",
    "enable_lto",
    "kernel_flags",
    "mkl_include_path",
    "mkl_lib_path",
    "mpicc_path",
    "nvcc_flags",
    "use_data_gz",
)


@dataclass(frozen=True)
class Plan:
    """How Jittor is started in this process."""

    device: Device
    reason: str
    home: Path
    key: str
    source: Path
    tools: Tools
    variables: dict[str, str]
    distribution: Distribution
    onednn: OneDnn | None
    cuda: CudaHome | None


def make_plan(wish: DeviceWish) -> Plan:
    """Check this machine and work out the plan.

    Raises:
        StartupError: something is missing; the message names the command that mends it.
    """
    distribution = machine.require_jittor()
    machine.require_numpy()
    compiler = machine.require_compiler()
    includes = machine.require_python_headers()
    home = jittor_home()
    machine.require_usable_home(home)
    device, reason, cuda = _choose_device(wish, home)
    source = home / "src" / copy_name(distribution)
    tools = plan_tools(home / "tools", source=source, compiler=compiler, includes=includes, jittor_home=home)
    onednn = find_onednn()
    has_onednn = onednn is not None or is_linked(home)  # another venv may have brought it
    variables = _variables(home, tools, compiler=compiler, has_onednn=has_onednn, cuda=cuda)
    return Plan(
        device=device,
        reason=reason,
        home=home,
        key=_key(variables, compiler=compiler, source=source),
        source=source,
        tools=tools,
        variables={**variables, **_thread_variables()},
        distribution=distribution,
        onednn=onednn,
        cuda=cuda,
    )


def prepare(plan: Plan) -> None:
    """Write the files that the plan names, where they are not there yet."""
    copy_packages(plan.distribution, plan.source)
    plan.tools.make()
    if plan.onednn is not None:
        link_onednn(plan.onednn, plan.home)
    if plan.cuda is not None:
        make_cuda_home(plan.cuda)


def is_prepared(plan: Plan) -> bool:
    """Whether all files that the plan names are there."""
    return (
        plan.source.is_dir()
        and plan.tools.root.is_dir()
        and (plan.onednn is None or is_linked(plan.home))
        and (plan.cuda is None or plan.cuda.nvcc.is_file())
    )


def _choose_device(wish: DeviceWish, home: Path) -> tuple[Device, str, CudaHome | None]:
    if wish == "cpu":
        return "cpu", "asked for", None
    problem, cuda = cuda_state(home)
    if cuda is not None:
        return "cuda", cuda.describe(), cuda
    if wish == "cuda":
        raise StartupError(f"CUDA was asked for, but {problem}")
    return "cpu", problem, None


def cuda_state(home: Path, driver: Driver | None = None) -> tuple[str, CudaHome | None]:
    """Why CUDA cannot be used and None, or "" and the CUDA home to use."""
    driver = ask_driver() if driver is None else driver
    if driver.problem is not None or driver.version is None:
        return driver.problem or "the CUDA driver names no version", None
    weakest = min(driver.gpus, key=lambda gpu: gpu.capability)
    if not weakest.is_supported:
        oldest = "sm_{}{}".format(*OLDEST_CAPABILITY)
        hint = "; hide it with CUDA_VISIBLE_DEVICES" if len(driver.gpus) > 1 else ""
        return f"{weakest.name} is {weakest.sm}, our kernels need {oldest} or newer{hint}", None
    found = plan_cuda_home(home / "cuda", driver)
    return ("", found) if isinstance(found, CudaHome) else (found, None)


def _variables(home: Path, tools: Tools, *, compiler: Path, has_onednn: bool, cuda: CudaHome | None) -> dict[str, str]:
    """What the import needs; none of it stays in the environment afterwards."""
    return {
        "HOME": str(home),  # else Jittor writes ~/.cache/jittor/config.json for all programs of the user
        "JITTOR_HOME": str(home),
        # else the git branch around the venv. Jittor compiles with -march=native and knows a processor by the beginning of
        # its name alone: code of another one of that name would be taken, and end in an illegal instruction
        "cache_name": hashlib.sha256(machine.processor().encode()).hexdigest()[:8],
        "cc_path": str(compiler),
        # Jittor's cache key does not cover the shadow headers: the macro does
        "cc_flags": f" -iquote{tools.quoted_headers} -DMOSS_JT_SHADOWS=0x{shadow_hash()}ull ",
        "python_config_path": str(tools.python_config),
        "nvcc_path": "" if cuda is None else str(cuda.nvcc),
        "conv_opt": "1",  # cuDNN, cuFFT, cuSPARSE: 340 MB each on the device, and nothing of ours uses them
        "use_mkl": "1" if has_onednn else "0",
        "use_cutlass": "0",  # this and the next three would download or compile what we do not use
        "use_cutt": "0",
        "use_nccl": "0",
        "use_mpi": "0",
        "FIX_TORCH_ERROR": "0",  # else torch is imported where it is installed
        "gdb_path": "",
        "log_silent": "1",
        "log_v": "0",
        "use_parallel_op_compiler": str(machine.logical_cores()),
    }


def _thread_variables() -> dict[str, str]:
    """OpenMP: one thread per core, asleep when there is nothing to do; the user's own wish goes first.

    Before it sleeps a thread looks a thousand times (some microseconds) whether the next kernel has come: enough to
    bridge the gap between two kernels of a pass, too little to take anything from other programs (docs/kernels.md).
    """
    wanted = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(machine.physical_cores())}
    if "OMP_WAIT_POLICY" not in os.environ:
        wanted["GOMP_SPINCOUNT"] = "1000"
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _key(variables: dict[str, str], *, compiler: Path, source: Path) -> str:
    stat = compiler.resolve().stat()
    parts = [
        *(f"{name}={value}" for name, value in sorted(variables.items()) if name != "use_parallel_op_compiler"),
        f"{compiler.resolve()} {stat.st_size} {stat.st_mtime_ns}",
        source.name,
        sys.version,
        str(sysconfig.get_config_var("EXT_SUFFIX")),
        platform.platform() + platform.node(),
        machine.processor(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
