"""Numbers go into Jittor and come back: with whichever numpy is installed."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
)  # fmt: skip
NARROWED = {"int64": "int32", "uint64": "int32", "float64": "float32"}  # Jittor's auto_convert_64_to_32

LAYOUTS: dict[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    "contiguous": lambda array: array,
    "transposed": lambda array: array.T,
    "sliced": lambda array: array[1:, ::2],
    "reversed": lambda array: array[::-1],
    "column order": np.asfortranarray,
    "one element": lambda array: array[2:3, 3:4],
    "flat": lambda array: array.ravel(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(jittor: ModuleType, dtype: str, layout: str) -> None:
    array = LAYOUTS[layout](np.arange(20).reshape(4, 5).astype(dtype))
    found = jittor.array(array).numpy()
    assert str(found.dtype) in (dtype, NARROWED.get(dtype))
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "bool"])
def test_numpy_scalar(jittor: ModuleType, dtype: str) -> None:
    assert jittor.array(np.dtype(dtype).type(7)).numpy().tolist() in (7, [7])


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_array_assigned_into_a_var(jittor: ModuleType, dtype: str) -> None:
    var = jittor.zeros((4, 5), dtype)
    var[1:3] = jittor.array(np.arange(20, dtype=dtype).reshape(5, 4).T[1:3])
    wanted = np.zeros((4, 5), dtype)
    wanted[1:3] = np.arange(20, dtype=dtype).reshape(5, 4).T[1:3]
    np.testing.assert_array_equal(var.numpy(), wanted)


def test_matrix_products(jittor: ModuleType) -> None:
    generator = np.random.default_rng(0)
    left = generator.standard_normal((33, 129), "float32")
    right = generator.standard_normal((129, 65), "float32")
    np.testing.assert_allclose((jittor.array(left) @ jittor.array(right)).numpy(), left @ right, atol=1e-4)
    found = jittor.array(left) @ jittor.array(right.T).transpose(1, 0)
    np.testing.assert_allclose(found.numpy(), left @ right, atol=1e-4)
