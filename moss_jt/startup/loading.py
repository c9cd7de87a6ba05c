"""The import of Jittor itself, in this process, after everything is in place."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from moss_jt.startup.isolation import contained
from moss_jt.startup.plan import FOREIGN_VARIABLES, Plan

RunCommands = Callable[[list[str], str, str, str], None]


def load(
    plan: Plan, run_commands: RunCommands | None = None, *, with_cache: Callable[[Path], None] | None = None
) -> ModuleType:
    """Import Jittor as planned and give the process back as it was.

    Args:
        plan: what to import and how; its files must be there.
        run_commands: called with (commands, cache folder, jittor folder, title) in place of Jittor's pool of
            forked processes; by default each command is run or found done, one after the other.
        with_cache: called with Jittor's cache folder before any compiled code is loaded from it.
    """
    importlib.import_module("numpy")  # first, so that it does not see Jittor's environment
    with (
        contained(
            plan.variables, without=FOREIGN_VARIABLES, executable=plan.tools.python, path_front=plan.source
        ) as handlers,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # its sources warn when they are compiled; nobody here can mend them
        utils: Any = importlib.import_module("jittor_utils")
        utils.run_cmds = _after_mending(run_commands or _one_by_one)
        if with_cache is not None:
            with_cache(Path(utils.cache_path))
        with utils.import_scope(os.RTLD_NOW | os.RTLD_GLOBAL | os.RTLD_DEEPBIND):
            utils.try_import_jit_utils_core()
        handlers.restore()  # at once: with Jittor's handlers any killed child would end this process
        jittor = importlib.import_module("jittor")
    jittor.flags.use_cuda = 1 if plan.device == "cuda" else 0
    _keep_small_numbers(jittor)
    _set_threads(plan)
    return jittor


def _after_mending(run: RunCommands) -> RunCommands:
    """Mend Jittor's two modules for Python 3.13 when the core is there and before any operator is imported.

    Jittor does `exec("import x")` and then `locals()["x"]`, which finds nothing since Python 3.13 (PEP 667).
    """

    def mended(commands: list[str], cache_path: str, jittor_path: str, title: str = "") -> None:
        for name in ("jittor.compiler", "jittor_utils"):
            module: Any = sys.modules[name]
            module.locals = _locals_and_modules
        run(commands, cache_path, jittor_path, title)

    return mended


class _LocalsAndModules(dict[str, Any]):
    """The locals of a function, and the imported modules beyond them."""

    def __missing__(self, name: str) -> ModuleType:
        return sys.modules[name]


def _locals_and_modules() -> dict[str, Any]:
    return _LocalsAndModules(sys._getframe(1).f_locals)


def _one_by_one(commands: list[str], cache_path: str, jittor_path: str, title: str = "") -> None:
    utils: Any = sys.modules["jittor_utils"]
    for command in commands:
        utils.do_compile([command, cache_path, jittor_path])


def _keep_small_numbers(jittor: Any) -> None:
    """Compile kernels without -Ofast.

    Loading a library that GCC linked with it sets the processor of this thread to flush subnormal numbers to
    zero, for numpy too (which then warns), and for good. The parts of it that make sums fast stay.
    """
    fast_sums = "-O3 -fassociative-math -fno-signed-zeros -freciprocal-math -fno-trapping-math -fno-math-errno"
    jittor.flags.cc_flags = jittor.flags.cc_flags.replace("-Ofast", fast_sums)


def _set_threads(plan: Plan) -> None:
    """Tell OpenMP directly: another library may have loaded it before our variables were set."""
    wanted = plan.variables.get("OMP_NUM_THREADS")
    if wanted is not None:
        set_threads(int(wanted))


def set_threads(count: int) -> None:
    """How many threads a kernel takes from now on, in this thread of Python."""
    try:
        openmp = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    except OSError:
        return
    openmp.omp_set_num_threads(ctypes.c_int(count))
