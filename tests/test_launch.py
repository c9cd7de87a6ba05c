"""Steps: kernels that run in one launch give what they give one by one, in their order."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from moss_jt import launch
from moss_jt.errors import KernelError
from moss_jt.launch import ADD_BOTH, GELU, LAYER_NORM, STEP_TYPES, Buffer, Steps, aligned, run

WIDTH = 48


def buffer(seed: int, rows: int = 3) -> Buffer:
    made = Buffer(aligned((rows, WIDTH), "float32"))
    made.array[:] = np.random.default_rng(seed).standard_normal((rows, WIDTH))
    return made


def test_steps_give_the_bits_of_single_launches(jittor: Any) -> None:
    x, weight, bias = buffer(1), buffer(2, 1), buffer(3, 1)
    norm = {"tokens": 3, "width": WIDTH, "eps": 1e-5}
    count = {"count": 3 * WIDTH}
    results = []
    for at_once in (False, True):
        normed, total = buffer(4), buffer(5)
        steps = Steps()
        for kernel, inputs, outputs, data in (
            (LAYER_NORM, [x, weight, bias], [normed], norm),
            (GELU, [], [normed], count),
            (ADD_BOTH, [x, normed], [total], count),
        ):
            if at_once:
                steps.add(kernel, [b.address for b in inputs], [b.address for b in outputs], data)
            else:
                run(kernel, [each.var for each in inputs], [each.var for each in outputs], data)
        before = total.array.copy()
        steps.run()
        assert np.array_equal(before, total.array) is not at_once, "nothing runs before run()"
        results.append(total.array.copy())
    assert np.array_equal(results[0], results[1])


def test_more_steps_than_the_table_holds_run_in_order(jittor: Any) -> None:
    x, one = buffer(1), Buffer(np.ones((3, WIDTH), np.float32))
    x.array[:] = 0
    steps = Steps()
    many = launch._MOST_STEPS + 5
    for _ in range(many):
        steps.add(ADD_BOTH, [one.address, one.address], [x.address], {"count": 3 * WIDTH})
    assert (x.array == 2 * launch._MOST_STEPS).all(), "a full table runs"
    steps.run()
    assert (x.array == 2 * many).all()
    steps.run()
    assert (x.array == 2 * many).all(), "what has run is gone"


def test_what_is_forgotten_does_not_run(jittor: Any) -> None:
    x = buffer(1)
    before = x.array.copy()
    steps = Steps()
    steps.add(GELU, [], [x.address], {"count": 3 * WIDTH})
    steps.clear()
    steps.run()
    assert np.array_equal(x.array, before)


def test_what_was_recorded_runs_again(jittor: Any) -> None:
    x, one = buffer(1), Buffer(np.ones((3, WIDTH), np.float32))
    x.array[:] = 0
    steps = Steps()
    steps.record()
    for _ in range(3):
        steps.add(ADD_BOTH, [one.address, one.address], [x.address], {"count": 3 * WIDTH})
    recorded = steps.recorded()
    assert recorded is not None
    steps.run()
    assert (x.array == 6).all()
    for _ in range(launch._MOST_STEPS):  # more than the table holds
        steps.repeat(recorded)
    steps.run()
    assert (x.array == 6 + 6 * launch._MOST_STEPS).all()


def test_what_has_run_in_between_is_not_recorded(jittor: Any) -> None:
    x = buffer(1)
    steps = Steps()
    steps.record()
    steps.add(GELU, [], [x.address], {"count": 3 * WIDTH})
    steps.run()
    assert steps.recorded() is None
    steps.add(GELU, [], [x.address], {"count": 3 * WIDTH})
    assert steps.recorded() is None, "nobody asked for it"


def test_other_threads_go_on_while_steps_run(jittor: Any) -> None:
    """A short thread gets through in the middle of one long launch."""
    x = Buffer(aligned((1 << 22,), "float32"))
    steps = Steps()
    for _ in range(launch._MOST_STEPS):
        steps.add(GELU, [], [x.address], {"count": x.array.size})
    began = time.perf_counter()
    woken: list[float] = []
    thread = threading.Timer(0.02, lambda: woken.append(time.perf_counter()))
    thread.start()
    steps.run()
    ended = time.perf_counter()
    thread.join()
    assert ended - began > 0.1, "too short to tell"
    assert woken[0] < ended


def test_an_error_of_a_kernel_is_told(jittor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_program", lambda: lambda _address, _count: 1)
    steps = Steps()
    steps.add(GELU, [], [0], {"count": 0})
    with pytest.raises(KernelError, match="no memory"):
        steps.run()
    steps.run()


def test_a_program_that_does_not_compile_is_told_in_a_line(jittor: Any, capfd: pytest.CaptureFixture[str]) -> None:
    x = buffer(1)
    with pytest.raises(
        KernelError, match=r"not compile; what the compiler said stands above. `moss-jt doctor`"
    ) as told:
        run("nobody_wrote_this(in0_p);", [x.var], [x.var], {})
    assert len(str(told.value)) < 200
    assert "nobody_wrote_this" in capfd.readouterr().err, "and it does stand above"


@pytest.mark.parametrize("kernel", list(STEP_TYPES), ids=lambda source: source.split("moss::")[-1].split("(")[0])
def test_every_kernel_fits_a_step(kernel: str) -> None:
    """Its source names no more arrays and numbers than the table has places for, and those that are declared."""
    inputs, outputs = (kinds.split() for kinds in STEP_TYPES[kernel])
    assert len(inputs) <= launch._MOST_INPUTS and len(outputs) <= launch._MOST_OUTPUTS
    assert len(launch._STEP_KEYS[kernel]) <= launch._MOST_KEYS
    assert all(f"in{number}_p" in kernel for number in range(len(inputs)))
    assert f"in{len(inputs)}_p" not in kernel and f"out{len(outputs)}_p" not in kernel
