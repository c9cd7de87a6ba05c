"""Matrices that are partly on disk give what whole ones give, and a budget moves them while it is held."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from residency import resident_bytes

from moss_jt.batch import single_batch
from moss_jt.budget import Budget
from moss_jt.checkpoint import Checkpoint
from moss_jt.config import GenerationConfig
from moss_jt.engine import Engine
from moss_jt.errors import CheckpointError, ConfigError, DeviceMemoryError
from moss_jt.layout import ALIGNMENT, RowsLayout, TileLayout, round_up
from moss_jt.load import load_model
from moss_jt.messages import Request, TokenEvent
from moss_jt.pages import Pages
from moss_jt.plan import MatrixSize, Needs, Plan, make_plan, matrix_sizes, needs_of, resident_rows
from moss_jt.runner import SPARE_BLOCKS, Model
from moss_jt.weights import WeightStore

Load = Callable[[str], Model]

NAMES = ("tiny-fp/safetensors-fp16", "tiny-int4/g32-actorder", "tiny-int8/g128")
SHARES = (0.0, 0.3, 0.77, 1.0)


def sizes_of(checkpoint: Checkpoint) -> list[MatrixSize]:
    return matrix_sizes(checkpoint.config, {name: entry.layout for name, entry in checkpoint.entries.items()})


def plan_of(sizes: Sequence[MatrixSize], held: int, *, units: int = 1, slots: int = 4) -> Plan:
    """Hold `held` bytes, stream the rest in pieces of `units` of the largest unit."""
    piece = max(size.unit_bytes for size in sizes) * units
    rows = resident_rows(sizes, held)
    total = sum(round_up(size.nbytes, ALIGNMENT) for size in sizes)
    needs = Needs(base=0, buffers=0, small=0, kv_token_bytes=1)
    slot = round_up(piece, ALIGNMENT) + ALIGNMENT
    return Plan(1 << 40, 2048, slots, slot, piece, 128, rows, held, total - held, total, 1 << 39, needs)


def store_of(model: Model, share: float, *, units: int = 1, slots: int = 4) -> WeightStore:
    checkpoint = Checkpoint.open(model.path)
    sizes = sizes_of(checkpoint)
    total = sum(round_up(size.nbytes, ALIGNMENT) for size in sizes)
    return WeightStore(checkpoint, plan_of(sizes, int(total * share), units=units, slots=slots))


def model_over(model: Model, store: WeightStore) -> Model:
    return Model(Checkpoint.open(model.path), store, compute=model.compute, device="cpu", max_tokens=None)


def whole(store: WeightStore, name: str) -> npt.NDArray[np.uint8]:
    """A matrix put together from its pieces."""
    layout, parts, at = store.layout(name), [], 0
    unit = (1, layout.row_bytes) if isinstance(layout, RowsLayout) else (16, layout.tile_bytes)
    for piece in store.pieces(name):
        assert piece.first == at and piece.count > 0
        end = -(-piece.count // unit[0]) * unit[1]
        parts.append(piece.data[piece.start : piece.start + end].copy())
        at += piece.count
    assert at == layout.shape[0]
    return np.concatenate(parts)


def assert_whole(store: WeightStore, checkpoint: Checkpoint) -> None:
    for size in sizes_of(checkpoint):
        np.testing.assert_array_equal(
            whole(store, size.name), checkpoint.read(size.name)[: size.nbytes], err_msg=size.name
        )


@pytest.mark.parametrize("name", NAMES)
def test_every_share_gives_the_same_bits(name: str, golden_model: Load) -> None:
    """However much is held, and however the rest is cut, logits do not differ in one bit."""
    model = golden_model(name)
    ids = np.random.default_rng(5).integers(0, model.config.vocab_size, 40)
    want = model.logits(ids)
    for share in SHARES:
        for units, slots in ((1, 4), (3, 5)):
            got = model_over(model, store_of(model, share, units=units, slots=slots)).logits(ids)
            np.testing.assert_array_equal(got, want, err_msg=f"{name} {share} {units}")


def test_pieces_are_the_matrix(golden_model: Load) -> None:
    """Asked for in order, over the end, again, and in any order, the pieces hold the bytes of the file."""
    model = golden_model("tiny-int4/g32-actorder")
    checkpoint = Checkpoint.open(model.path)
    store = store_of(model, 0.4)
    for _ in range(3):
        assert_whole(store, checkpoint)
    names = [size.name for size in sizes_of(checkpoint)]
    for at in np.random.default_rng(1).integers(0, len(names), 40):
        np.testing.assert_array_equal(
            whole(store, names[at]), checkpoint.read(names[at])[: len(whole(store, names[at]))], err_msg=names[at]
        )


def test_a_broken_off_matrix_does_no_harm(golden_model: Load) -> None:
    """A pass that is interrupted within a matrix leaves the ring as it must be for the next."""
    model = golden_model("tiny-int8/g128")
    checkpoint = Checkpoint.open(model.path)
    store = store_of(model, 0.2)
    for name in ("transformer.h.0.mlp.fc_in.weight", "lm_head.weight", "transformer.h.0.attn.qkv_proj.weight"):
        pieces = store.pieces(name)
        next(pieces)
        next(pieces)
        del pieces
        assert_whole(store, checkpoint)


def test_rows_leave_and_return_without_being_read_for_it(golden_model: Load) -> None:
    model = golden_model("tiny-int4/g128")
    checkpoint = Checkpoint.open(model.path)
    sizes = sizes_of(checkpoint)
    total = sum(round_up(size.nbytes, ALIGNMENT) for size in sizes)
    store = store_of(model, 0.8)
    first = store.resident_bytes
    for held in (0.5, 0.1, 0.0, 0.3, 0.8, 0.2, 0.8):
        rows = resident_rows(sizes, int(total * held))
        store.hold(rows)
        assert store.resident_bytes <= int(total * held)
        for _ in range(2):  # what passes by stays
            store.begin_pass()
            assert_whole(store, checkpoint)
    store.begin_pass()
    assert store.resident_bytes == first
    assert store.streamed_bytes == sum(
        s.nbytes - s.bytes_of(resident_rows(sizes, int(total * 0.8))[s.name]) for s in sizes
    )


def test_rows_that_left_give_their_memory_back(golden_model: Load, tmp_path: Path) -> None:
    """Counted by the system: pages that are no longer held are no longer there."""
    from moss_jt.converters.synth import preset_config, synthesize

    config = preset_config("tiny", layers=4)
    folder = tmp_path / "model"
    synthesize(config, folder)
    checkpoint = Checkpoint.open(folder)
    sizes = sizes_of(checkpoint)
    total = sum(round_up(size.nbytes, ALIGNMENT) for size in sizes)
    store = WeightStore(checkpoint, plan_of(sizes, total))
    before = anonymous_bytes()
    store.hold(resident_rows(sizes, 0))
    assert before - anonymous_bytes() >= total - 2**21, "a huge page may stay"


def test_rows_that_return_bring_nothing_with_them(tmp_path: Path) -> None:
    """In huge pages, the last row of each matrix would take up to 2 MiB more."""
    from moss_jt.converters.synth import preset_config, synthesize

    config = replace(preset_config("tiny", layers=4), n_embd=768, n_head=12)
    folder = tmp_path / "model"
    synthesize(config, folder)
    checkpoint = Checkpoint.open(folder)
    sizes = sizes_of(checkpoint)
    store = WeightStore(checkpoint, plan_of(sizes, sum(size.nbytes for size in sizes)))
    store.hold(resident_rows(sizes, 0))
    assert store._tiers is not None
    arena = store._tiers._arena.array
    assert resident_bytes(arena) < 2**20
    store.hold({size.name: size.rows_of(size.units // 2) for size in sizes})
    for _ in range(2):
        store.begin_pass()
        assert_whole(store, checkpoint)
    assert 0 < store.resident_bytes <= resident_bytes(arena) < store.resident_bytes + 2**20


def test_larger_pages_of_the_system_leave_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ARM kernels have pages of 16 or 64 KiB: what does not begin on one is refused, and the last is emptied whole."""
    from moss_jt.converters.synth import preset_config, synthesize

    large, given = 2**16, []
    monkeypatch.setattr("moss_jt.plan.PAGE", large)
    monkeypatch.setattr("moss_jt.tiers.PAGE", large)
    give_back = Pages.give_back

    def of_such_a_kernel(pages: Pages, start: int, nbytes: int) -> None:
        if start % large:
            raise OSError(errno.EINVAL, "Invalid argument")
        given.append(nbytes)
        give_back(pages, start, round_up(nbytes, large))

    monkeypatch.setattr(Pages, "give_back", of_such_a_kernel)
    folder = tmp_path / "model"
    synthesize(preset_config("tiny", layers=2), folder)
    checkpoint = Checkpoint.open(folder)
    sizes = sizes_of(checkpoint)
    most = sum(round_up(size.nbytes, large) for size in sizes)
    store = WeightStore(checkpoint, plan_of(sizes, most))
    small = store.resident_bytes - sum(round_up(size.nbytes, large) for size in sizes)
    for held in (0.8, 0.5, 0.45, 0.1, 0.0, 0.6):
        store.hold(resident_rows(sizes, int(most * held)))
        assert store.resident_bytes - small <= most * held
        for _ in range(2):
            store.begin_pass()
            assert_whole(store, checkpoint)
    assert sum(given) > most // 2


def anonymous_bytes() -> int:
    text = Path("/proc/self/status").read_text("ascii")
    return int(text.split("RssAnon:")[1].split()[0]) << 10


def test_a_file_that_becomes_shorter_is_an_error_and_never_a_wrong_number(golden_model: Load, tmp_path: Path) -> None:
    import shutil

    model = golden_model("tiny-int4/g128")
    folder = tmp_path / "model"
    shutil.copytree(model.path, folder)
    checkpoint = Checkpoint.open(folder)
    store = WeightStore(checkpoint, plan_of(sizes_of(checkpoint), 0))
    other = Model(checkpoint, store, compute="exact", device="cpu", max_tokens=None)
    ids = np.arange(8)
    want = other.logits(ids)
    file = checkpoint.entries["lm_head.weight"].file
    whole_file = file.read_bytes()
    with file.open("r+b") as opened:
        opened.truncate(checkpoint.entries["lm_head.weight"].offset + 100)
    with pytest.raises(CheckpointError, match=rf"{file.name}.*offset"):
        for _ in range(3):  # what was read before the cut may still be right
            np.testing.assert_array_equal(other.logits(ids), want)
    with file.open("r+b") as opened:
        opened.write(whole_file)
    with pytest.raises(CheckpointError, match=rf"{file.name} has changed: it was written to"):
        other.logits(ids)


# --- budgets


def budgeted(model: Model, spare: int, context: int = 512) -> Model:
    """The model within the smallest memory that does, and `spare` bytes."""
    checkpoint = Checkpoint.open(model.path)
    sizes = sizes_of(checkpoint)
    needs = needs_of(model.config, sizes, base=0, kv=model.kv)
    from moss_jt.plan import smallest_memory

    plan = make_plan(sizes, needs, memory=smallest_memory(sizes, needs, context) + spare, context=context)
    store = WeightStore(checkpoint, plan)
    budget = Budget(plan, sizes, store)
    return Model(
        checkpoint, store, compute=model.compute, device="cpu", max_tokens=plan.context, kv=model.kv, budget=budget
    )


def tokens_of(engine: Engine, ids: Sequence[int], count: int) -> list[int]:
    engine.submit(Request(tuple(ids), GenerationConfig(do_sample=False, max_new_tokens=count)))
    found = []
    while engine.busy:
        found += [event.id for event in engine.step() if isinstance(event, TokenEvent)]
    return found


@pytest.mark.parametrize("spare", [0, 10_000, 100_000, 1_000_000])
def test_the_same_tokens_within_every_budget(spare: int, golden_model: Load) -> None:
    model = golden_model("tiny-int4/g128")
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, 70).tolist()
    want = tokens_of(Engine(model), ids, 40)
    tight = budgeted(model, spare)
    engine = Engine(tight)
    assert tokens_of(engine, ids, 40) == want
    assert tokens_of(engine, ids, 40) == want


def test_a_block_that_is_repeated_follows_what_changes(golden_model: Load) -> None:
    """Rows that leave and return, other numbers of tokens, other weights: each pass uses what is there."""
    model = golden_model("tiny-int4/g128")
    tight = budgeted(model, 200_000)
    sizes = sizes_of(Checkpoint.open(model.path))
    runner, plain = tight.runner(), budgeted(model, 10_000_000).runner()
    assert plain.ops.store.streamed_bytes == 0
    rng = np.random.default_rng(3)
    position = 0
    full = tight.budget.plan.resident_budget(1) if tight.budget is not None else 0
    for share, count in ((1.0, 1), (1.0, 1), (0.3, 1), (0.3, 3), (0.0, 1), (1.0, 1), (1.0, 1), (1.0, 3), (1.0, 1)):
        tight.store.hold(resident_rows(sizes, int(share * full)))
        ids = rng.integers(0, model.config.vocab_size, count)
        found = []
        for each in (runner, plain):
            each.cache.reserve(0, count)
            found.append(each.forward(single_batch(ids, start=position)))
            each.cache.commit(0, count)
        assert np.array_equal(found[0], found[1]), (share, count)
        position += count
    name = "transformer.h.0.ln_1.weight"
    for each in (runner, plain):
        each.ops.store.add(name, 2 * each.ops.store.small(name))
    before = found[0]
    batch = single_batch(ids[:1], start=position)
    found = []
    for each in (runner, plain):
        each.cache.reserve(0, 1)
        found.append(each.forward(batch))
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], before)


def test_weights_leave_for_the_cache_and_return(golden_model: Load) -> None:
    model = golden_model("tiny-int4/g128")
    tight = budgeted(model, 200_000)
    budget = tight.budget
    assert budget is not None and tight.store.streamed_bytes
    engine = Engine(tight)
    first = tight.store.resident_bytes
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, 120).tolist()
    engine.submit(Request(tuple(ids), GenerationConfig(do_sample=False, max_new_tokens=4)))
    least = first
    while engine.busy:
        engine.step()
        held = tight.store.resident_bytes
        least = min(least, held)
        assert held + engine.runner.cache.resident_bytes <= budget.plan.room
    spare = SPARE_BLOCKS * engine.runner.cache.block_bytes
    assert least < first - spare
    for _ in range(3):
        tokens_of(engine, ids[:3], 2)
    assert first - spare <= tight.store.resident_bytes <= first


def test_a_second_runner_is_counted_and_forgotten(golden_model: Load) -> None:
    model = golden_model("tiny-int4/g128")
    tight = budgeted(model, 8_000_000)
    assert tight.budget is not None and not tight.store.streamed_bytes
    one = tight.runner(tokens=64)
    room = tight.budget.plan.room - tight.store.resident_bytes
    others = [tight.runner(tokens=64) for _ in range(room // one.buffer_bytes)]
    with pytest.raises(DeviceMemoryError, match=r"do not fit in"):
        tight.runner(tokens=64)
    del others
    gc.collect()
    tight.runner(tokens=64)
    with pytest.raises(ConfigError, match=r"take up to \d+ tokens"):
        tight.runner(tokens=10**9)


def test_logits_give_back_what_their_cache_took(golden_model: Load) -> None:
    model = golden_model("tiny-int4/g128")
    tight = budgeted(model, 200_000)
    ids = np.random.default_rng(5).integers(0, model.config.vocab_size, 120)
    found = [tight.logits(ids) for _ in range(2)]
    assert np.array_equal(found[0], found[1])
    assert tight._private.cache.resident_bytes == 0
    assert tight.budget is not None and not tight.budget.is_tight, "rows may return as they are read"
    roomy = budgeted(model, 8_000_000)  # for the buffers of both
    roomy.logits(ids)
    assert tokens_of(Engine(roomy), ids.tolist(), 5) == tokens_of(Engine(model), ids.tolist(), 5)


def test_load_model_takes_a_budget(golden_model: Load) -> None:
    model = golden_model("tiny-int8/g128")
    with pytest.raises(ConfigError, match=r"1MiB of memory is too little for a context of \d+ tokens"):
        load_model(model.path, memory="1MiB")
    with pytest.raises(ConfigError, match="give a size like 6GiB"):
        load_model(model.path, memory="much")
    with pytest.raises(ConfigError, match='kv is "int3"; known are fp32, fp16, int8'):
        load_model(model.path, kv="int3")
    loaded = load_model(model.path, memory="8GiB", kv="fp16", max_tokens=100)
    assert loaded.max_tokens == 100 and loaded.kv == "float16" and not loaded.store.streamed_bytes
    stats = Engine(loaded).stats()
    assert stats["memory_limit"] == 8 << 30 and stats["streamed_bytes"] == 0


def test_a_permuted_matrix_keeps_its_permutation_in_memory(golden_model: Load) -> None:
    model = golden_model("tiny-int4/g32-actorder")
    store = store_of(model, 0.0)
    name = "transformer.h.0.attn.qkv_proj.weight"
    layout = store.layout(name)
    assert isinstance(layout, TileLayout) and layout.permuted
    raw = Checkpoint.open(model.path).read(name)[layout.perm_offset :][: 4 * layout.padded_in]
    perm = store.perm(name)
    assert perm is not None
    np.testing.assert_array_equal(perm, raw.view(np.int32))
