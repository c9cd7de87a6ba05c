"""The check that a started Jittor reads, moves and multiplies numbers correctly.

With a numpy that it was not built for, Jittor imports without a complaint and then gives garbage, so this
runs after every start. It takes a few milliseconds once its kernels are compiled.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moss_jt.errors import StartupError

_DTYPES = ("float32", "float16", "int32", "uint8", "int64")


def check(jittor: Any) -> None:
    """Read arrays back and multiply two matrices.

    Raises:
        StartupError: a number came back wrong.
    """
    for dtype in _DTYPES:
        _check_round_trip(jittor, np.arange(1, 7, dtype=dtype).reshape(2, 3), dtype)
    # only now: with an unfit numpy a transposed array would crash the process
    _check_round_trip(jittor, np.arange(1, 7, dtype="float32").reshape(2, 3).T, "float32 transposed")
    left = np.arange(15, dtype="float32").reshape(5, 3)
    right = np.arange(12, dtype="float32").reshape(3, 4) - 5
    _compare("a matrix product", (jittor.array(left) @ jittor.array(right)).numpy(), left @ right)


def _check_round_trip(jittor: Any, array: np.ndarray[Any, Any], what: str) -> None:
    _compare(f"a {what} array read back", jittor.array(array).numpy(), array)


def _compare(what: str, found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> None:
    if found.shape != wanted.shape or not np.array_equal(found, wanted):
        raise StartupError(
            f"Jittor does not compute correctly with numpy {np.__version__}: {what} should be "
            f"{wanted.ravel().tolist()}, found {found.ravel()[: wanted.size].tolist()}; "
            "start it with moss_jt.startup.import_jittor() before anything else imports jittor"
        )
