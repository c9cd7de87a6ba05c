"""Predictions: arithmetic over a plan and rates, by hand and by laws."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moss_jt.config import MossConfig, Quantization
from moss_jt.memory import GIB, MIB
from moss_jt.plan import MatrixSize, Plan, make_plan, matrix_sizes, needs_of
from moss_jt.predict import Flow, KernelRate, Predictor, Rates, Spread

INT4 = MossConfig(n_embd=6144, n_head=24, n_layer=34, quantization=Quantization(4, 128))
SIZES = matrix_sizes(INT4)
RATES = Rates(
    disk=2e9,
    disk_beside=2e9,
    disk_cpu=0.0,
    cores=2,
    kernels={"int4": KernelRate(40e9, 1e12), "float16": KernelRate(45e9, 4e11)},
    attention=30e9,
    layer_s=0.0002,
    token_s=0.001,
)


def planned(memory: int, *, context: int | None = None) -> Plan:
    needs = needs_of(INT4, SIZES, base=330 * MIB, kv="float16")
    return make_plan(SIZES, needs, memory=memory, context=context)


def predictor(memory: int, rates: Rates = RATES) -> Predictor:
    return Predictor(INT4, SIZES, planned(memory), rates)


def nbytes(stored: str) -> int:
    return sum(size.nbytes for size in SIZES if size.stored == stored)


def test_a_spread_is_the_median_and_the_quarters() -> None:
    assert Spread.of([5.0]) == Spread(5, 5, 5)
    assert Spread.of([9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == Spread(4.5, 3, 6)
    assert Spread.of([1.0, 2.0, 4.0]).map(lambda value: 1 / value) == Spread(0.5, 0.25, 1)


def test_a_flow_waits_for_what_the_readers_could_not_bring() -> None:
    flow = Flow(disk=10, beside=10, ring=20)
    flow.compute(1, 20)
    assert flow.seconds == 1, "the ring was full"
    flow.compute(1, 20)
    assert flow.seconds == 2 + 0, "10 were read during the first second, 10 during this one"
    flow.compute(1, 30)
    assert flow.seconds == 5, "all 30 take the disk 3 seconds"
    flow.compute(100)
    flow.compute(1, 50)
    assert flow.seconds == 105 + 3, "in 100 seconds the ring holds no more than it holds"


def test_a_flow_reads_less_while_it_computes() -> None:
    flow = Flow(disk=10, beside=5, ring=0)
    flow.compute(2, 30)
    assert flow.seconds == 2 + 2, "10 while computing, the other 20 while waiting"


def test_a_slow_disk_decides_alone_and_a_fast_one_not_at_all() -> None:
    for disk, expected in ((1, 60), (1000, 30)):
        flow = Flow(disk=disk, beside=disk, ring=1)
        for _ in range(30):
            flow.compute(0.5)
            flow.compute(0.5, 2)
        assert flow.seconds == pytest.approx(expected, abs=1)


def test_a_resident_model_takes_its_bytes_at_the_rates_of_the_kernels() -> None:
    step = predictor(16 * GIB).decoding(0)
    weights = nbytes("int4") / 40e9 + nbytes("float16") / 45e9
    cached = 2 * 2 * 34 * 6144 / 30e9  # keys and values of one token, fp16
    assert step.seconds == pytest.approx(weights + cached + 34 * 0.0002 + 0.001)
    assert (step.streamed_bytes, step.disk_s, step.bound) == (0, 0, "compute")


def test_a_streamed_model_takes_its_bytes_at_the_rate_of_the_disk() -> None:
    plan, step = planned(4 * GIB), predictor(4 * GIB).decoding(0)
    assert step.streamed_bytes == plan.streamed_bytes > 5e9
    assert step.resident_bytes + step.streamed_bytes == sum(size.nbytes for size in SIZES)
    assert step.seconds == pytest.approx(plan.streamed_bytes / 2e9, rel=1e-3)
    assert step.bound == "disk"


def test_weights_that_leave_for_the_cache_are_read_for_later_tokens() -> None:
    first, last = (predictor(4 * GIB).decoding(position) for position in (0, 2047))
    grown = last.kv_bytes - first.kv_bytes
    assert abs(last.streamed_bytes - first.streamed_bytes - grown) < 20 * MIB
    assert last.seconds > first.seconds


def test_reading_takes_time_of_the_cores() -> None:
    busy = replace(RATES, disk_cpu=1e-9, disk=100e9, disk_beside=100e9)  # a second for each GB, on two cores
    plain = replace(RATES, disk=100e9, disk_beside=100e9)
    more = predictor(4 * GIB, busy).decoding(0).compute_s - predictor(4 * GIB, plain).decoding(0).compute_s
    assert more == pytest.approx(planned(4 * GIB).streamed_bytes * 1e-9 / 2)


def test_a_prompt_reads_what_is_streamed_once_a_pass() -> None:
    plan = planned(4 * GIB)
    prompt = predictor(4 * GIB).prefill(2 * plan.capacity + 1)
    assert prompt.passes == 3
    assert prompt.streamed_bytes >= 3 * plan.streamed_bytes
    assert prompt.seconds >= 3 * plan.streamed_bytes / 2e9


def test_a_resident_prompt_takes_its_multiplications() -> None:
    prompt = predictor(16 * GIB).prefill(128)
    multiplications = 2 * 128 * 34 * 12 * 6144 * 6144 / 1e12
    head = nbytes("float16") / 45e9  # of one token
    assert prompt.seconds == pytest.approx(multiplications + head + 34 * 0.0002 + 0.001)
    assert prompt.tokens_per_s == pytest.approx(128 / prompt.seconds)


def test_faster_parts_never_make_it_slower() -> None:
    faster = {
        "disk": replace(RATES, disk=4e9, disk_beside=4e9),
        "kernel": replace(RATES, kernels={name: KernelRate(90e9, 4e12) for name in RATES.kernels}),
        "cache": replace(RATES, attention=60e9),
        "memory": RATES,
    }
    for gib in (2, 4, 6, 8, 10):
        now = predictor(gib * GIB)
        for name, rates in faster.items():
            other = predictor((gib + (name == "memory")) * GIB, rates)
            assert other.decoding(600).seconds <= now.decoding(600).seconds * (1 + 1e-9), (gib, name)


def test_a_short_last_pass_costs_the_reading_of_the_weights() -> None:
    """One token more than a pass takes is a pass more, bound by bytes and not by multiplications."""
    model = predictor(16 * GIB)
    more = model.prefill(129).seconds - model.prefill(128).seconds
    assert more == pytest.approx(model.decoding(0).seconds, rel=0.01)


def test_every_matrix_has_a_format_with_a_rate() -> None:
    sizes: list[MatrixSize] = matrix_sizes(replace(INT4, head_quantization=Quantization(8, 128)))
    assert {size.stored for size in sizes} == {"int4", "int8"}
