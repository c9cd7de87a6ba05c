"""The network against arrays that the original MOSS computed: every one that is not a record of a quirk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moss_jt.batch import Batch, single_batch
from moss_jt.cache import BLOCK
from moss_jt.checkpoint import Checkpoint
from moss_jt.config import GenerationConfig, MossConfig
from moss_jt.engine import Engine
from moss_jt.generation import generate
from moss_jt.launch import Buffer
from moss_jt.layout import RowsLayout
from moss_jt.messages import FinishedEvent, Request, TokenEvent
from moss_jt.model import Moss
from moss_jt.ops import InferenceOps, rotary_table
from moss_jt.runner import Model, Runner
from moss_jt.weights import WeightStore

Load = Callable[[str], Model]
Arrays = dict[str, npt.NDArray[Any]]

FLOAT = ("tiny-fp/bin-2shards", "tiny-fp/safetensors-fp16", "tiny-fp-h8/bin-single")
INT = (
    "tiny-int4/g32",
    "tiny-int4/g128",
    "tiny-int4/g32-actorder",
    "tiny-int8/g32",
    "tiny-int8/g128",
    "tiny-int8/g128-actorder",
)
ATOL = 1e-4  # the original's own runs differ by 1e-6 to 1e-5


def expected(golden: Path, name: str) -> Arrays:
    folder = golden / name
    path = folder / "expected.npz"
    return dict(np.load(path if path.is_file() else folder.parent / "expected.npz"))


def assert_near(got: npt.ArrayLike, want: npt.ArrayLike, what: str, atol: float = ATOL) -> None:
    difference = np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64))
    where = np.unravel_index(difference.argmax(), difference.shape)
    assert difference.max() <= atol, f"{what}: off by {difference.max():.2e} at {where}"


class Watcher:
    """Runs sequences one by one and keeps what every step gave."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.runner = model.runner()

    def run(self, rows: npt.NDArray[Any]) -> Arrays:
        """Step name -> (B, T, width)."""
        parts: dict[str, list[npt.NDArray[np.float32]]] = {}
        for row in rows:
            self.runner.cache.release(0)
            self.runner.cache.reserve(0, len(row))
            got: dict[str, npt.NDArray[np.float32]] = {}
            self.runner.ops.observe = lambda name, values, got=got: got.__setitem__(name, values.copy())
            self.runner.forward(single_batch(row))
            self.runner.cache.commit(0, len(row))
            for name, values in got.items():
                parts.setdefault(name, []).append(values)
        self.runner.ops.observe = None
        return {name: np.stack(values) for name, values in parts.items() if len({v.shape for v in values}) == 1}


@pytest.mark.parametrize("name", FLOAT + INT)
def test_logits(name: str, golden: Path, golden_model: Load) -> None:
    want, model = expected(golden, name), golden_model(name)
    for key in ("b0", "b1", "b2", "b3"):
        if key + "_ids" in want:
            assert_near(model.logits(want[key + "_ids"]), want[key + "_logits"], f"{name} {key}")


def test_logits_of_bfloat16_weights(golden: Path, golden_model: Load) -> None:
    want, model = expected(golden, "tiny-fp/safetensors-bf16"), golden_model("tiny-fp/safetensors-bf16")
    for key in ("b0", "b1"):
        assert_near(model.logits(want[key + "_ids"]), want[key + "_logits_bf16"], key)


@pytest.mark.parametrize("name", INT)
def test_logits_with_weights_rounded_to_half(name: str, golden: Path, golden_model: Load) -> None:
    """The original's GPU kernel rounds int x scale to half; our dequantised weights, rounded so, give its logits."""
    from moss_jt.layout import TileLayout
    from moss_jt.packing import dequantize, unpack

    want, model = expected(golden, name), golden_model(name)
    rounded = WeightStore(_checkpoint(model))
    for layer in range(model.config.n_layer):
        for part in ("attn.qkv_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"):
            tensor = f"transformer.h.{layer}.{part}"
            layout = model.store.layout(tensor + ".weight")
            assert isinstance(layout, TileLayout)
            half = dequantize(unpack(model.store.read(tensor + ".weight"), layout)).astype(np.float16)
            np.testing.assert_array_equal(half, want[f"deq_{tensor}"], err_msg=tensor)
            rounded.add(tensor + ".weight", half)
    other = Model(_checkpoint(model), rounded, compute="exact", device="cpu", max_tokens=None)
    for key in ("b0", "b1", "b2"):
        assert_near(other.logits(want[key + "_ids"]), want[key + "_logits_w16"], f"{name} {key} w16")


def _checkpoint(model: Model) -> Checkpoint:
    return Checkpoint.open(model.path)


@pytest.mark.parametrize("name", INT)
def test_one_quantised_layer(name: str, golden: Path, golden_model: Load) -> None:
    want, model = expected(golden, name), golden_model(name)
    ops = model.runner().ops
    x = want["lin_x"]
    ops.begin(single_batch(np.zeros(len(x), np.int32)))
    buffer = ops.hidden(x)
    got = ops.values(ops.linear(buffer, Moss(model.config).blocks[0].fc_in, "inner"))
    assert_near(got, want["lin_y"], name)


@pytest.mark.parametrize("name", ("tiny-fp/bin-2shards", "tiny-fp-h8/bin-single"))
def test_every_step_of_the_first_block(name: str, golden: Path, golden_model: Load) -> None:
    want, model = expected(golden, name), golden_model(name)
    seen = Watcher(model).run(want["b0_ids"])
    block = "transformer.h.0"
    steps = {
        "emb": "emb",
        "l0_ln1": f"{block}.ln_1",
        "l0_qkv": f"{block}.attn.qkv_proj",
        "l0_attn_merged": f"{block}.attn.merged",
    }
    steps |= {
        "l0_attn_out": f"{block}.attn.out_proj",
        "l0_fc_in": f"{block}.mlp.fc_in",
        "l0_gelu": f"{block}.mlp.gelu",
        "l0_mlp_out": f"{block}.mlp.fc_out",
    }
    for key, step in steps.items():
        assert_near(seen[step], want["b0_" + key], key)


@pytest.mark.parametrize("name", FLOAT[1:] + INT)
def test_every_block(name: str, golden: Path, golden_model: Load) -> None:
    want, model = expected(golden, name), golden_model(name)
    watcher = Watcher(model)
    for key in ("b0", "b1", "b2", "b3"):
        blocks = want.get(key + "_blocks")
        if blocks is None:
            continue
        seen = watcher.run(want[key + "_ids"])
        for layer in range(model.config.n_layer):
            got = seen[f"transformer.h.{layer}"]
            assert_near(got[:, -blocks.shape[2] :], blocks[layer], f"{key} block {layer}")
        if key + "_emb" in want:
            assert_near(seen["emb"][:, -blocks.shape[2] :], want[key + "_emb"], f"{key} embedding")


@pytest.mark.parametrize("name", ("tiny-fp/safetensors-fp16", "tiny-fp-h8/bin-single"))
def test_final_norm(name: str, golden: Path, golden_model: Load) -> None:
    want, model = expected(golden, name), golden_model(name)
    runner = model.runner()
    kept: list[npt.NDArray[np.float32]] = []
    runner.ops.observe = lambda step, values: kept.append(values.copy()) if step == "transformer.ln_f" else None
    for key in ("b0", "b1", "b2", "b3"):
        if key + "_ln_f" not in want:
            continue
        for row, ids in enumerate(want[key + "_ids"]):
            kept.clear()
            runner.cache.release(0)
            runner.cache.reserve(0, len(ids))
            tail = want[key + "_ln_f"].shape[1]
            runner.forward(single_batch(ids, wanted=np.arange(len(ids))[-tail:]))
            assert_near(np.concatenate(kept), want[key + "_ln_f"][row], f"{key} row {row}")


@pytest.mark.parametrize("name", ("tiny-fp/safetensors-fp16", "tiny-fp-h8/bin-single"))
def test_cache_and_attention_probabilities(name: str, golden: Path, golden_model: Load) -> None:
    want, model = expected(golden, name), golden_model(name)
    runner = model.runner()
    for row, ids in enumerate(want["b0_ids"]):
        runner.cache.release(0)
        runner.cache.reserve(0, len(ids))
        runner.forward(single_batch(ids))
        runner.cache.commit(0, len(ids))
        for layer in range(model.config.n_layer):
            keys, values = runner.cache.read(layer, 0)
            assert_near(keys, want[f"b0_past_k{layer}"][row], f"keys of layer {layer}")
            assert_near(values, want[f"b0_past_v{layer}"][row], f"values of layer {layer}")
    probabilities = _first_block_probabilities(model, want["b0_ids"])
    assert_near(probabilities, want["b0_l0_probs"], "probabilities")


def _first_block_probabilities(model: Model, rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """From the rotated queries and keys that the kernel left behind."""
    runner, config = model.runner(), model.config
    only_first: Moss[Buffer] = Moss(config, range(1))
    result = []
    for ids in rows:
        runner.cache.release(0)
        runner.cache.reserve(0, len(ids))
        only_first.execute(runner.ops, single_batch(ids))
        runner.cache.commit(0, len(ids))
        queries = runner.ops.buffers["queries"].array[: len(ids)].reshape(len(ids), config.n_head, -1)
        keys, _ = runner.cache.read(0, 0)
        result.append(_softmax(np.einsum("thd,hsd->hts", queries, keys) / np.sqrt(config.head_dim)))
    return np.stack(result)


def _softmax(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    new, known = scores.shape[1:]
    future = np.triu(np.ones((new, known), bool), known - new + 1)
    shifted = np.exp(np.where(future, -np.inf, scores) - scores.max(axis=2, keepdims=True))
    shares: npt.NDArray[np.float32] = shifted / shifted.sum(axis=2, keepdims=True)
    return shares


@pytest.mark.parametrize("name", ("tiny-fp/safetensors-fp16", "tiny-fp-h8/bin-single"))
def test_padding_on_either_side(name: str, golden: Path, golden_model: Load) -> None:
    want, model = expected(golden, name), golden_model(name)
    for side, key in (("lp", "lp_logits_pos"), ("lp", "lp_logits_arange"), ("rp", "rp_logits")):
        mask = want[side + "_mask"]
        got = model.logits(want[side + "_ids"], mask)
        assert_near(got[mask == 1], want[key][mask == 1], key)
        assert not got[mask == 0].any()
    positions = np.where(mask := want["lp_mask"], want["lp_mask"].cumsum(axis=1) - 1, 1)
    np.testing.assert_array_equal(positions, want["lp_pos"])
    assert mask.any()


@pytest.mark.parametrize("name", ("tiny-fp/safetensors-fp16", "tiny-fp-h8/bin-single"))
def test_loss_of_a_padded_batch(name: str, golden: Path, golden_model: Load) -> None:
    want, model = expected(golden, name), golden_model(name)
    logits = model.logits(want["rp_ids"], want["rp_mask"])[:, :-1].astype(np.float64)
    labels = want["rp_labels"][:, 1:].astype(int)
    kept = labels != -100
    log_sum = np.log(np.exp(logits[kept]).sum(axis=1))
    loss = (log_sum - logits[kept, labels[kept]]).mean()
    assert_near(loss, want["rp_loss"][0], "loss")


@pytest.mark.parametrize("name", ("tiny-fp/safetensors-fp16", "tiny-fp-h8/bin-single"))
def test_feeding_a_sequence_in_chunks(name: str, golden: Path, golden_model: Load) -> None:
    want, model = expected(golden, name), golden_model(name)
    assert_near(model.logits(want["inc_ids"]), want["inc_logits_full"], "whole")
    runner = model.runner()
    for row, ids in enumerate(want["inc_ids"]):
        got, start = [], 0
        runner.cache.release(0)
        for count in want["inc_chunks"].astype(int):
            runner.cache.reserve(0, count)
            got.append(runner.forward(single_batch(ids[start : start + count], start=start, wanted=np.arange(count))))
            runner.cache.commit(0, count)
            start += count
        assert_near(np.concatenate(got), want["inc_logits"][row], "chunks")
        keys, values = runner.cache.read(0, 0)
        assert_near(keys, want["inc_past_k0"][row], "keys")
        assert_near(values, want["inc_past_v0"][row], "values")


@pytest.mark.parametrize("name", FLOAT[1:] + INT)
def test_greedy_tokens(name: str, golden: Path, golden_model: Load) -> None:
    want, model = expected(golden, name), golden_model(name)
    penalties = {"greedy": 1.0, "greedy_rep102": 1.02, "greedy_rep13": 1.3, "greedy_rep15": 1.5}
    checked = 0
    for key in [k for k in want if k.startswith("greedy") and k.endswith("_prompt")]:
        kind, number = key.removesuffix("_prompt").rsplit("_", 1)
        out = want[f"{kind}_{number}_out"].astype(int).tolist()
        config = GenerationConfig(do_sample=False, repetition_penalty=penalties[kind], max_new_tokens=len(out))
        assert [token.id for token in generate(model, want[key].astype(int).tolist(), config)] == out, key
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("name", ("tiny-fp/safetensors-fp16", "tiny-fp-h8/bin-single"))
def test_greedy_batch_and_end_token(name: str, golden: Path, golden_model: Load) -> None:
    want, model = expected(golden, name), golden_model(name)
    end = want["eos_out"].astype(int).tolist()
    config = GenerationConfig(
        do_sample=False, repetition_penalty=1.0, max_new_tokens=64, stop_ids=(int(want["eos_eos"][0]),)
    )
    assert [token.id for token in generate(model, want["eos_prompt"].astype(int).tolist(), config)] == end

    steps = want["gb_out"].shape[1]
    config = GenerationConfig(
        do_sample=False, repetition_penalty=1.0, max_new_tokens=steps, stop_ids=(int(want["gb_eos"][0]),)
    )
    engine = Engine(model, slots=len(want["gb_ids"]), tokens=len(want["gb_ids"]) * model.config.n_positions)
    answers: dict[int, list[int]] = {}
    for ids, mask in zip(want["gb_ids"], want["gb_mask"], strict=True):
        answers[engine.submit(Request(tuple(ids[mask == 1].astype(int).tolist()), config))] = []
    while engine.busy:
        for event in engine.step():
            if isinstance(event, TokenEvent):
                answers[event.request].append(event.id)
    padded = [row + [int(want["gb_pad"][0])] * (steps - len(row)) for row in answers.values()]
    assert padded == want["gb_out"].astype(int).tolist()


def _real_geometry(golden: Path) -> tuple[Runner, Moss[Buffer], Arrays]:
    """One block with head width 256, given hidden states and giving hidden states."""
    folder = golden / "head-dim-256"
    config = MossConfig.from_file(folder / "config.json")
    weights = dict(np.load(folder / "block.npz"))
    store = WeightStore()
    for key, values in weights.items():
        store.add(key.removeprefix("w."), values)
    runner = Runner(config, store, slots=2, tokens=2 * config.n_positions, kind="float32")
    two_parts = MossConfig.from_dict({**config.to_dict(), "n_layer": 3})  # so that block 0 is neither first nor last
    network: Moss[Buffer] = Moss(two_parts, range(1))
    network.is_first = False
    return runner, network, dict(np.load(folder / "expected.npz"))


def _batch(positions: npt.NDArray[np.int64]) -> Batch:
    rows, length = positions.shape
    slots = np.repeat(np.arange(rows, dtype=np.int32), length)
    nothing = np.zeros(rows * length, np.int32)
    return Batch(nothing, slots, positions.reshape(-1).astype(np.int32), nothing[:1])


def assert_steps_near(seen: Arrays, want: Arrays, case: str) -> None:
    steps = {"qkv": "attn.qkv_proj", "merged": "attn.merged", "attn_out": "attn.out_proj", "mlp_out": "mlp.fc_out"}
    for key, step in steps.items():
        wanted = want[f"{case}_{key}"]
        assert_near(seen[f"transformer.h.0.{step}"].reshape(wanted.shape), wanted, key)


def test_block_with_real_head_geometry(golden: Path, jittor: object) -> None:
    runner, network, want = _real_geometry(golden)
    for slot in range(2):
        runner.cache.reserve(slot, 6)
    seen: Arrays = {}
    runner.ops.observe = lambda name, values: seen.__setitem__(name, values.copy())
    y = network.execute(runner.ops, _batch(want["a_pos"]), want["a_x"].reshape(-1, 1024))
    got = runner.ops.values(y)
    assert_near(got.reshape(want["a_y"].shape), want["a_y"], "output")
    assert_steps_near(seen, want, "a")
    for slot in range(2):
        runner.cache.commit(slot, 6)
        keys, values = runner.cache.read(0, slot)
        assert_near(keys, want["a_k"][slot], "keys")
        assert_near(values, want["a_v"][slot], "values")
        queries = runner.ops.buffers["queries"].array[slot * 6 : slot * 6 + 6].reshape(6, 4, 256)
        assert_near(_softmax(np.einsum("thd,hsd->hts", queries, keys) / 16), want["a_probs"][slot], "probabilities")
    rounded = want["a_x"].astype(np.float16).astype(np.float32).reshape(-1, 1024)
    y = network.execute(runner.ops, _batch(want["a_pos"]), rounded)
    assert_near(runner.ops.values(y).reshape(want["a_y"].shape), want["a_y_fp16in"], "rounded input")


def test_block_at_the_last_positions(golden: Path, jittor: object) -> None:
    """Case b has a cache of 5 tokens at positions 2037 to 2041 and nothing before.

    Our positions count from the start of a sequence, so the angles are taken from there on instead.
    """
    runner, network, want = _real_geometry(golden)
    first = int(want["b_past_pos"].min())
    np.testing.assert_array_equal(want["b_pos"].max(), runner.cache.limit - 1)
    runner.ops.sincos = Buffer(rotary_table(runner.ops.config)[first:].copy())
    for slot in range(2):
        runner.cache.reserve(slot, 11)
    past, new = (want[key].reshape(-1, 1024) for key in ("b_past_x", "b_x"))
    network.execute(runner.ops, _batch(want["b_past_pos"] - first), past)
    seen: Arrays = {}
    runner.ops.observe = lambda name, values: seen.__setitem__(name, values.copy())
    y = network.execute(runner.ops, _batch(want["b_pos"] - first), new)
    assert_near(runner.ops.values(y).reshape(want["b_y"].shape), want["b_y"], "output")
    assert_steps_near(seen, want, "b")
    for slot in range(2):
        runner.cache.commit(slot, 11)
        keys, values = runner.cache.read(0, slot)
        assert_near(keys, want["b_k"][slot], "keys")
        assert_near(values, want["b_v"][slot], "values")
        assert_near(keys[:, :5], want["b_past_k"][slot], "earlier keys")
        assert_near(values[:, :5], want["b_past_v"][slot], "earlier values")
        queries = runner.ops.buffers["queries"].array[slot * 6 : slot * 6 + 6].reshape(6, 4, 256)
        scores = np.einsum("thd,hsd->hts", queries, keys) / 16
        assert_near(_softmax(scores), want["b_probs"][slot], "probabilities")
    rounded = want["b_x"].astype(np.float16).astype(np.float32).reshape(-1, 1024)
    y = network.execute(runner.ops, _batch(want["b_pos"] - first), rounded)
    assert_near(runner.ops.values(y).reshape(want["b_y"].shape), want["b_y_fp16in"], "rounded input")


def test_rotary_table(golden: Path) -> None:
    want = dict(np.load(golden / "head-dim-256" / "expected.npz"))
    config = MossConfig.from_file(golden / "head-dim-256" / "config.json")
    assert_near(rotary_table(config)[want["sincos_rows"].astype(int)], want["sincos"], "sines and cosines", 1e-6)


def test_parts_of_the_layers_give_the_whole(golden: Path, golden_model: Load) -> None:
    model = golden_model("tiny-fp/safetensors-fp16")
    ids = expected(golden, "tiny-fp")["b0_ids"][0]
    runners = [model.runner(), model.runner()]
    for runner in runners:
        runner.cache.reserve(0, len(ids))
    batch = single_batch(ids, wanted=np.arange(len(ids)))
    front: Moss[Buffer] = Moss(model.config, range(2))
    back: Moss[Buffer] = Moss(model.config, range(2, model.config.n_layer))
    states = runners[0].ops.values(front.execute(runners[0].ops, batch))
    got = back.execute(runners[1].ops, batch, states)
    np.testing.assert_array_equal(got, model.logits(ids)[0])


def test_prefill_and_decode_give_the_same_bits(golden: Path, golden_model: Load) -> None:
    for name in ("tiny-fp-h8/bin-single", "tiny-int4/g32-actorder", "tiny-int8/g128"):
        model = golden_model(name)
        ids = np.arange(BLOCK + 7) * 7 % model.config.vocab_size
        whole = model.logits(ids)[0]
        runner = model.runner()
        for position, token in enumerate(ids):
            runner.cache.reserve(0, 1)
            got = runner.forward(single_batch([token], start=position))
            runner.cache.commit(0, 1)
            np.testing.assert_array_equal(got[0], whole[position], err_msg=f"{name} position {position}")


def test_low_rank_term(golden: Path, golden_model: Load) -> None:
    """A layer with an added low-rank term equals one whose weight holds it."""
    from dataclasses import replace

    model = golden_model("tiny-fp/safetensors-fp16")
    rng = np.random.default_rng(3)
    layer = Moss(model.config).blocks[0].fc_in
    store = WeightStore(_checkpoint(model))
    n, k = model.config.inner_dim, model.config.n_embd
    a, b = rng.normal(size=(3, k)).astype(np.float32), rng.normal(size=(n, 3)).astype(np.float32)
    store.add("a", a)
    store.add("b", b)
    assert isinstance(store.layout(layer.name + ".weight"), RowsLayout)
    weight = store.read(layer.name + ".weight")[: n * k * 2].view(np.float16).reshape(n, k).astype(np.float32)
    store.add("merged.weight", weight + 0.5 * (b @ a))
    runner = Runner(model.config, store, slots=1, tokens=model.config.n_positions, kind="float32")
    ops: InferenceOps = runner.ops
    ops.begin(single_batch([1, 2, 3, 4, 5]))
    x = ops.hidden(rng.normal(size=(5, k)).astype(np.float32))
    got = ops.values(ops.linear(x, replace(layer, low_rank=("a", "b"), low_rank_scale=0.5), "inner"))
    want = ops.values(ops.linear(x, replace(layer, name="merged", bias=False), "inner"))
    assert_near(got - model.store.small(layer.name + ".bias"), want, "low rank", 2e-4)


def test_finished_event_counts(golden: Path, golden_model: Load) -> None:
    model = golden_model("tiny-fp/safetensors-fp16")
    engine = Engine(model)
    engine.submit(Request((1, 2, 3), GenerationConfig(do_sample=False, max_new_tokens=4)))
    events = []
    while engine.busy:
        events += engine.step()
    finished = [event for event in events if isinstance(event, FinishedEvent)]
    assert [(f.reason, f.prompt_tokens, f.new_tokens) for f in finished] == [("length", 3, 4)]
