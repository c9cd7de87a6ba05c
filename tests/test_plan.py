"""Plans: laws that hold for every model and budget, and the words of a refusal."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import pytest

from moss_jt.config import MossConfig, Quantization
from moss_jt.errors import ConfigError
from moss_jt.kv_layout import KVLayout, KVType
from moss_jt.layout import ALIGNMENT, round_up
from moss_jt.memory import GIB, MIB, parse_size
from moss_jt.plan import (
    LEAST_CONTEXT,
    MARGIN,
    MOST_PASS_TOKENS,
    PIECE,
    MatrixSize,
    Needs,
    Plan,
    buffer_bytes,
    cut_rows,
    longest_context,
    make_plan,
    matrix_sizes,
    needs_of,
    resident_rows,
    smallest_memory,
)

MOON = MossConfig(n_embd=6144, n_head=24, n_layer=34, dtype="float16")
INT4 = replace(MOON, quantization=Quantization(4, 128))
BATCHES = [range(start, start + 30) for start in range(0, 120, 30)]


def random_config(pick: random.Random) -> MossConfig:
    """Any shape from tiny to 16B, in any format."""
    bits = pick.choice([None, 4, 8])
    heads = 4 * pick.randint(1, 8)
    return MossConfig(
        vocab_size=pick.randint(1, 30000),
        n_positions=pick.choice([1, 31, 32, 100, 256, 2048, 5000]),
        n_embd=heads * pick.choice([8, 24, 64, 256]),
        n_layer=pick.randint(1, 6),
        n_head=heads,
        rotary_dim=8,
        dtype=pick.choice(["float16", "float32", "bfloat16", None]),
        quantization=None if bits is None else Quantization(4 if bits == 4 else 8, pick.choice([-1, 32, 128])),
    )


def cases(seeds: range) -> Iterator[tuple[random.Random, list[MatrixSize], Needs]]:
    """A model and what it needs, of each seed."""
    for seed in seeds:
        yield random_case(seed)


def random_case(seed: int) -> tuple[random.Random, list[MatrixSize], Needs]:
    """A model and what it needs, from a seed."""
    pick = random.Random(seed)
    config = random_config(pick)
    sizes = matrix_sizes(config)
    needs = needs_of(
        config,
        sizes,
        base=pick.randint(0, 400 * MIB),
        kv=pick.choice(get_args(KVType)),
        slots=pick.choice([1, 1, 2, 5]),
        margin=pick.choice([0, MARGIN]),
    )
    return pick, sizes, needs


def random_budgets(pick: random.Random, sizes: list[MatrixSize], needs: Needs, context: int | None) -> list[int]:
    """Accepted budgets in order: from the smallest to more than is needed, some of them a byte apart."""
    least = smallest_memory(sizes, needs, context)
    most = needs.fixed + needs.kv_bytes(needs.positions) + sum(size.nbytes + ALIGNMENT for size in sizes)
    some = [pick.randint(least, max(least, most) + MIB) for _ in range(6)]
    return sorted({least, least + 1, *some, *(budget + 1 for budget in some), most, 2 * most})


def peak_of(plan: Plan, sizes: list[MatrixSize], tokens: int) -> int:
    """Memory in use with so many tokens cached, counted anew from the parts."""
    rows = resident_rows(sizes, plan.resident_budget(tokens))
    weights = sum(round_up(size.bytes_of(rows[size.name]), ALIGNMENT) for size in sizes)
    needs = plan.needs
    activations = needs.buffers + (plan.capacity - needs.pass_tokens) * needs.pass_token_bytes
    ring = plan.ring_slots * plan.slot_bytes
    return needs.base + needs.margin + needs.small + activations + ring + needs.kv_bytes(tokens) + weights


@pytest.mark.parametrize("seeds", BATCHES, ids=str)
def test_no_plan_takes_more_than_the_memory(seeds: range) -> None:
    for pick, sizes, needs in cases(seeds):
        context = pick.choice([None, pick.randint(1, needs.positions)])
        for memory in random_budgets(pick, sizes, needs, context):
            plan = make_plan(sizes, needs, memory=memory, context=context)
            assert plan.context == context or (context is None and plan.context <= needs.positions)
            for tokens in {1, pick.randint(1, plan.context), plan.context}:
                assert peak_of(plan, sizes, tokens) <= memory
            now = pick.randint(0, plan.context)
            later = make_plan(sizes, needs, memory=memory, context=plan.context, kv_tokens_now=now)
            assert peak_of(later, sizes, max(now, 1)) <= memory


@pytest.mark.parametrize("seeds", BATCHES, ids=str)
def test_what_is_planned_can_be_computed(seeds: range) -> None:
    """Whatever is not resident has a ring whose slots hold every piece, wherever it starts in its file."""
    for pick, sizes, needs in cases(seeds):
        for memory in random_budgets(pick, sizes, needs, None):
            plan = make_plan(sizes, needs, memory=memory)
            assert needs.pass_tokens <= plan.capacity <= max(needs.pass_tokens, MOST_PASS_TOKENS)
            assert set(plan.resident) == {size.name for size in sizes}
            at_the_end = resident_rows(sizes, plan.resident_budget(plan.context))
            streams = any(at_the_end[size.name] < size.rows for size in sizes)
            assert streams == (plan.ring_slots > 0)
            assert plan.ring_slots in (0, 4, 8, 12)
            for size in sizes:
                if at_the_end[size.name] == size.rows:
                    continue
                for first, count in cut_rows(size, at_the_end[size.name], plan.piece_bytes):
                    nbytes = size.bytes_of(count)
                    assert 0 < nbytes <= plan.piece_bytes
                    assert first % size.unit == 0
                    assert round_up(nbytes + ALIGNMENT - 1, ALIGNMENT) <= plan.slot_bytes


@pytest.mark.parametrize("seeds", BATCHES, ids=str)
def test_more_memory_never_streams_more(seeds: range) -> None:
    for pick, sizes, needs in cases(seeds):
        context = pick.choice([None, pick.randint(1, needs.positions)])
        before = None
        for memory in random_budgets(pick, sizes, needs, context):
            plan = make_plan(sizes, needs, memory=memory, context=context)
            if before is not None:
                assert plan.streamed_bytes <= before.streamed_bytes
                assert plan.context >= before.context
                assert all(plan.resident[name] >= rows for name, rows in before.resident.items())
            before = plan
        assert before is not None
        assert before.streamed_bytes == 0


@pytest.mark.parametrize("seeds", BATCHES, ids=str)
def test_every_matrix_keeps_the_same_share_within_a_unit(seeds: range) -> None:
    for pick, sizes, _ in cases(seeds):
        total = sum(round_up(size.nbytes, ALIGNMENT) for size in sizes)
        budget = pick.randint(0, total - 1)
        rows = resident_rows(sizes, budget)
        shares = [(-(-rows[size.name] // size.unit), size.units) for size in sizes]
        lowest = max((kept - 1) / units for kept, units in shares)
        highest = min((kept + 1) / units for kept, units in shares)
        assert lowest <= highest, "no share is within a unit of every matrix"
        used = sum(round_up(size.bytes_of(rows[size.name]), ALIGNMENT) for size in sizes)
        assert used <= budget
        assert budget - used < max(size.unit_bytes for size in sizes) + ALIGNMENT, "room for another unit is left"


@pytest.mark.parametrize("seeds", BATCHES, ids=str)
def test_the_smallest_memory_is_accepted_and_a_byte_less_is_not(seeds: range) -> None:
    for pick, sizes, needs in cases(seeds):
        context = pick.choice([None, pick.randint(1, needs.positions)])
        least = smallest_memory(sizes, needs, context)
        assert make_plan(sizes, needs, memory=least, context=context).memory == least
        with pytest.raises(ConfigError) as refused:
            make_plan(sizes, needs, memory=least - 1, context=context)
        named = re.search(r"give at least ([\d.]+\w+)", str(refused.value))
        assert named, refused.value
        assert least <= parse_size(named.group(1)) <= least * 1.01 + 1024
        longest = re.search(r"a context of (\d+) tokens, the longest that fits", str(refused.value))
        assert (longest is not None) == (longest_context(sizes, needs, least - 1) > 0)
        if longest:
            tokens = int(longest.group(1))
            assert tokens == longest_context(sizes, needs, least - 1)
            make_plan(sizes, needs, memory=least - 1, context=tokens)
            with pytest.raises(ConfigError):
                make_plan(sizes, needs, memory=least - 1, context=tokens + 1)


@pytest.mark.parametrize("seeds", BATCHES, ids=str)
def test_pieces_cover_every_row_once(seeds: range) -> None:
    for pick, sizes, _ in cases(seeds):
        size = pick.choice(sizes)
        first = size.rows_of(pick.randint(0, size.units))
        piece = size.unit_bytes * pick.randint(1, 9) + pick.randint(0, size.unit_bytes - 1)
        at = first
        counts: list[int] = []
        for here, count in cut_rows(size, first, piece):
            assert here == at
            assert size.bytes_of(count) <= piece
            at, counts = here + count, [*counts, -(-count // size.unit)]
        assert at == size.rows
        assert not counts or max(counts) - min(counts) <= 1


def test_matrices_come_in_the_order_of_a_pass() -> None:
    names = [size.name for size in matrix_sizes(replace(MOON, n_layer=2))]
    layer = ["attn.qkv_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"]
    assert names == [f"transformer.h.{n}.{name}.weight" for n in (0, 1) for name in layer] + ["lm_head.weight"]


def test_bytes_of_the_full_model() -> None:
    """By hand: int4 in groups of 128 takes 4 bits, 16 for a scale and 4 for a zero per group."""
    linear = 34 * (3 + 1 + 4 + 4) * 6144 * 6144
    head = 107008 * 6144 * 2
    assert sum(size.nbytes for size in matrix_sizes(INT4)) == linear // 2 + linear // 128 * 5 // 2 + head
    assert sum(size.nbytes for size in matrix_sizes(MOON)) == 2 * linear + head
    assert needs_of(INT4, [], base=0, kv="float16").kv_token_bytes == 2 * 2 * 34 * 6144


@pytest.mark.parametrize("kind", get_args(KVType))
def test_the_cache_is_counted_as_it_is_laid_out(kind: KVType) -> None:
    needs = needs_of(INT4, [], base=0, kv=kind)
    for tokens in (1, 32, 33, 2048):
        assert needs.kv_bytes(tokens) == KVLayout.of(INT4, kind).bytes_for(tokens)


def test_the_full_model_in_two_gibibytes() -> None:
    sizes = matrix_sizes(INT4)
    needs = needs_of(INT4, sizes, base=350 * MIB, kv="float16")
    plan = make_plan(sizes, needs, memory=2 * GIB)
    assert 1800 < plan.context < 2048
    assert (plan.ring_slots, plan.piece_bytes) == (12, PIECE)
    shares = [plan.resident[size.name] / size.rows for size in sizes]
    assert 0.15 < min(shares) <= max(shares) < min(shares) + 0.003


def test_weights_leave_for_the_cache_and_the_rest_stays_even() -> None:
    sizes = matrix_sizes(INT4)
    needs = needs_of(INT4, sizes, base=350 * MIB, kv="float16")
    plan = make_plan(sizes, needs, memory=4 * GIB)
    start, end = plan.resident_budget(0), plan.resident_budget(2048)
    assert start - end == needs.kv_bytes(2048) - needs.kv_bytes(1)
    assert resident_rows(sizes, start) == plan.resident
    assert all(rows <= plan.resident[name] for name, rows in resident_rows(sizes, end).items())


def test_a_pass_takes_more_tokens_where_weights_are_streamed_and_memory_allows() -> None:
    sizes = matrix_sizes(MOON)
    needs = needs_of(MOON, sizes, base=350 * MIB, kv="float16")
    capacities = [make_plan(sizes, needs, memory=gib * GIB).capacity for gib in (2, 4, 8, 64)]
    assert capacities[0] < capacities[1] < capacities[2] == MOST_PASS_TOKENS
    assert capacities[3] == 128


def test_without_a_wish_the_context_gets_shorter_before_the_budget_is_refused() -> None:
    sizes = matrix_sizes(INT4)
    needs = needs_of(INT4, sizes, base=350 * MIB, kv="float16")
    plan = make_plan(sizes, needs, memory=GIB)
    assert LEAST_CONTEXT <= plan.context < 2048
    assert longest_context(sizes, needs, GIB) >= plan.context


def test_in_the_smallest_memory_everything_goes_through_a_small_ring() -> None:
    """Four slots of one unit: 16 rows of the widest int4 matrix, or a row of the head."""
    sizes = matrix_sizes(INT4)
    needs = needs_of(INT4, sizes, base=350 * MIB, kv="float16")
    unit = max(size.unit_bytes for size in sizes)
    least = smallest_memory(sizes, needs)
    assert least <= needs.fixed + needs.kv_bytes(LEAST_CONTEXT) + 4 * (unit + 2 * ALIGNMENT)
    plan = make_plan(sizes, needs, memory=least)
    assert (plan.ring_slots, plan.piece_bytes, plan.capacity) == (4, unit, 128)
    assert plan.resident_budget(plan.context) == 0


def test_a_refusal_says_what_would_do() -> None:
    sizes = matrix_sizes(INT4)
    needs = needs_of(INT4, sizes, base=350 * MIB, kv="float16")
    with pytest.raises(
        ConfigError, match=r"^1GiB of memory is too little for a context of 2048 tokens: give at least "
    ):
        make_plan(sizes, needs, memory=GIB, context=2048)
    with pytest.raises(ConfigError, match=r"^100MiB of memory .*; no context fits in 100MiB\.$"):
        make_plan(sizes, needs, memory=100 * MIB)
    with pytest.raises(ConfigError, match="context is 0; it must be at least 1 token"):
        make_plan(sizes, needs, memory=GIB, context=0)


def test_the_logits_of_many_answers_at_once_are_counted() -> None:
    few, many = buffer_bytes(MOON, 256, 32), buffer_bytes(MOON, 256, 128)
    assert many - few >= 96 * MOON.vocab_size * 4


def test_layouts_of_a_checkpoint_count_their_permutations() -> None:
    config = replace(MOON, n_layer=1, quantization=Quantization(4, 3))
    sizes = matrix_sizes(config)
    assert [size.extra_bytes > 0 for size in sizes] == [True] * 4 + [False]
    with_perm = needs_of(config, sizes, base=0, kv="float16").small
    without = needs_of(config, [replace(size, extra_bytes=0) for size in sizes], base=0, kv="float16").small
    assert with_perm - without == sum(size.extra_bytes for size in sizes)
