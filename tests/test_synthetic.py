"""Random weights in memory: laid out as a checkpoint's, of the spread that keeps activations finite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from moss_jt.checkpoint import Checkpoint, expected_shapes
from moss_jt.config import MossConfig, Quantization
from moss_jt.layout import PlainLayout, RowsLayout, TileLayout
from moss_jt.packing import dequantize, unpack
from moss_jt.synthetic import EMBEDDING, layouts_of, synthetic_store

SHAPE = MossConfig(vocab_size=272, n_embd=256, n_head=4, n_layer=2, rotary_dim=32, n_positions=64)
INT4 = replace(SHAPE, quantization=Quantization(4, 128), head_quantization=Quantization(8, 128))
INT8 = replace(SHAPE, quantization=Quantization(8, 64))


@pytest.mark.parametrize("config", [SHAPE, INT4, INT8], ids=["float16", "int4", "int8"])
def test_every_tensor_is_there_in_its_layout(config: MossConfig) -> None:
    store, layouts = synthetic_store(config), layouts_of(config)
    assert list(layouts) == list(expected_shapes(config))
    for name, layout in layouts.items():
        if isinstance(layout, PlainLayout):
            assert store.small(name).shape == layout.shape
        elif name != EMBEDDING:
            assert store.layout(name) == layout
            assert store.read(name).nbytes == layout.nbytes


@pytest.mark.parametrize("config", [SHAPE, INT4, INT8], ids=["float16", "int4", "int8"])
def test_weights_have_the_spread_of_a_layer_that_keeps_its_input_small(config: MossConfig) -> None:
    store = synthetic_store(config)
    for name, gain in {"transformer.h.1.mlp.fc_in.weight": 1.0, "transformer.h.1.mlp.fc_out.weight": 0.5}.items():
        layout, data = store.layout(name), store.read(name)
        if isinstance(layout, TileLayout):
            weights = dequantize(unpack(data, layout))
        else:
            assert isinstance(layout, RowsLayout)
            weights = data[: layout.shape[0] * layout.row_bytes].view(np.float16).reshape(layout.shape).astype("f4")
        assert abs(weights.mean()) < 0.05 * weights.std()
        assert weights.std() * np.sqrt(layout.shape[1]) == pytest.approx(gain, rel=0.1)
        assert np.linalg.matrix_rank(weights) == min(weights.shape), "rows that are sums of others"


def test_the_same_config_gives_the_same_weights_whatever_the_threads() -> None:
    one, four = synthetic_store(INT4, threads=1), synthetic_store(INT4, threads=4)
    for name, layout in layouts_of(INT4).items():
        if isinstance(layout, TileLayout):
            assert np.array_equal(one.read(name), four.read(name)), name
    assert np.array_equal(one.rows(EMBEDDING, [3, 271]), four.rows(EMBEDDING, [3, 271]))


def test_rows_of_the_embedding_differ() -> None:
    table = synthetic_store(SHAPE).rows(EMBEDDING, np.arange(272, dtype=np.int32))
    assert table.shape == (272, 256)
    assert len(np.unique(table, axis=0)) == 272


@pytest.mark.parametrize("config", [SHAPE, INT4, INT8], ids=["float16", "int4", "int8"])
def test_a_model_of_them_computes(config: MossConfig, jittor: ModuleType) -> None:
    from moss_jt.runner import Model

    model = Model(
        Checkpoint(Path("nowhere"), config, {}),
        synthetic_store(config),
        compute="exact",
        device="cpu",
        max_tokens=None,
    )
    logits = model.logits(list(range(5)))
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 10
