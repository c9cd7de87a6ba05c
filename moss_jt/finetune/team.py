"""Several processes that train together, by mpirun: each takes its part of every step, gradients are added up."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt import startup
from moss_jt.finetune.trainer import Alone, Team
from moss_jt.startup.mpi import processes, start_mpi


class MpiTeam:
    """The processes of one mpirun, over Jittor's MPI.

    Attributes:
        rank: this process, from 0.
        size: all of them.
    """

    def __init__(self) -> None:
        self._jt = startup.import_jittor(device="cpu")
        self._mpi = start_mpi()
        self.rank: int = self._mpi.world_rank()
        self.size: int = self._mpi.world_size()

    def add_up(self, values: npt.NDArray[Any]) -> None:
        """Replace values, in place, by their sum over all processes; float32 on the way."""
        given = self._jt.array(np.ascontiguousarray(values, np.float32))
        values[...] = self._mpi.ops.mpi_all_reduce(given, "add").data.reshape(values.shape)


def find_team() -> Team:
    """The processes that mpirun started together with this one.

    Raises:
        StartupError: Jittor's MPI cannot be built here.
    """
    return MpiTeam() if processes() > 1 else Alone()
