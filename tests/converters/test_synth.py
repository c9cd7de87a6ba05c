"""Random models: the same for the same seed, in both forms, with a tokenizer that reads and writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from moss_folders import files_of, names_in

from moss_jt.checkpoint import Checkpoint
from moss_jt.converters.hf2jittor import hf2jittor
from moss_jt.converters.random_weights import RandomWeights
from moss_jt.converters.source import open_source
from moss_jt.converters.synth import PRESETS, preset_config, synthesize, synthesize_foreign
from moss_jt.errors import ConfigError
from moss_jt.layout import RowsLayout, TileLayout
from moss_jt.packing import dequantize, unpack
from moss_jt.tokenizer import load_tokenizer


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    config = preset_config("tiny", bits=4)
    first = files_of(synthesize(config, tmp_path / "a", seed=7).path)
    assert first == files_of(synthesize(config, tmp_path / "b", seed=7).path)
    assert first != files_of(synthesize(config, tmp_path / "c", seed=8).path)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_both_forms_hold_the_same_model(tmp_path: Path, bits: int) -> None:
    config = preset_config("tiny", bits=bits, layers=2)
    native = synthesize(config, tmp_path / "native").path
    foreign = synthesize_foreign(config, tmp_path / "hf").path
    assert names_in(foreign) == [
        "added_tokens.json",
        "config.json",
        "merges.txt",
        "pytorch_model.bin",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    converted = hf2jittor(foreign, tmp_path / "converted", name=config.name).path
    one, two = files_of(native), files_of(converted)
    assert json.loads(one.pop("config.json")) == json.loads(two.pop("config.json"))
    assert one == two


def test_torch_would_read_the_bin(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    path = synthesize_foreign(preset_config("tiny", bits=8, layers=1), tmp_path / "hf").path
    state = torch.load(path / "pytorch_model.bin", weights_only=True)
    with open_source(path) as source:
        assert list(state) == list(source.tensors)
        for name, tensor in state.items():
            assert np.array_equal(tensor.numpy(), source.read(name)), name


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_numbers_are_sane(tmp_path: Path, bits: int) -> None:
    path = synthesize(preset_config("tiny", bits=bits, layers=3), tmp_path / "m").path
    checkpoint = Checkpoint.open(path)
    for name, wanted in {
        "transformer.h.1.attn.qkv_proj.weight": 1.5 / 16,
        "transformer.h.2.mlp.fc_out.weight": 1.5 / 32 / 6**0.5,
        "lm_head.weight": 1.5 / 16,
    }.items():
        layout = checkpoint.entries[name].layout
        raw = checkpoint.read(name)
        if isinstance(layout, TileLayout):
            numbers = dequantize(unpack(raw, layout))
        else:
            assert isinstance(layout, RowsLayout)
            numbers = raw[: layout.shape[0] * layout.row_bytes].view("<f2").astype(np.float32)
        assert abs(float(numbers.std()) / wanted - 1) < 0.05, name
        assert abs(float(numbers.mean())) < 0.05 * wanted, name
    bias = checkpoint.read_plain("lm_head.bias")
    tokenizer = load_tokenizer(path)
    said = {tokenizer.decode([i]) for i in range(len(bias)) if bias[i] >= 0}
    assert {"a", " ", "~", "<eom>"} <= said
    assert "\n" not in said
    assert np.array_equal(checkpoint.read_plain("transformer.ln_f.weight"), np.ones(256, np.float32))


@pytest.mark.parametrize("head_bits", [4, 8])
def test_a_quantised_head_is_made_some_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head_bits: int
) -> None:
    monkeypatch.setattr("moss_jt.converters.random_weights._HEAD_ROWS", 64)
    config = preset_config("tiny", bits=4, layers=1, head_bits=head_bits)
    assert config.name == f"tiny-random-int4-head{head_bits}"
    with_head = Checkpoint.open(synthesize(config, tmp_path / "a").path)
    layout = with_head.entries["lm_head.weight"].layout
    assert isinstance(layout, TileLayout)
    numbers = dequantize(unpack(with_head.read("lm_head.weight"), layout))
    assert numbers.shape == (272, 256)
    assert abs(float(numbers.std()) / (1.5 / 16) - 1) < 0.05
    assert not np.array_equal(numbers[:64], numbers[64:128])
    plain = Checkpoint.open(synthesize(preset_config("tiny", bits=4, layers=1), tmp_path / "b").path)
    for name in plain.entries.keys() - {"lm_head.weight"}:
        assert np.array_equal(with_head.read(name), plain.read(name)), name


def test_pieces_do_not_depend_on_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = RandomWeights(preset_config("tiny"), 0)
    whole = np.concatenate(list(weights.floats("lm_head.weight")))
    monkeypatch.setattr("moss_jt.converters.random_weights.PIECE_BYTES", 4096)
    assert np.array_equal(np.concatenate(list(weights.floats("lm_head.weight"))), whole)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_tokenizer_knows_bytes_and_markers(tmp_path: Path, preset: str) -> None:
    from moss_jt.converters.byte_tokenizer import tokenizer_files

    config = preset_config(preset)  # type: ignore[arg-type]
    assert config.bos_token_id is not None
    for name, text in tokenizer_files(config.bos_token_id, config.n_positions).items():
        (tmp_path / name).write_text(text, "utf-8")
    tokenizer = load_tokenizer(tmp_path)
    text = "plain, 中文 and \t\r\n control \x00\x7f\u00ad"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert max(ids) < 256
    assert tokenizer.decode(ids) == text
    assert {"<eoh>", "<eom>", "<eot>", "<eoc>", "<eor>"} <= set(tokenizer.markers)
    assert tokenizer.marker("<eom>") == tokenizer.eos_id == config.eos_token_id
    assert tokenizer.bos_id == config.bos_token_id
    assert tokenizer.vocab_size <= config.vocab_size


def test_the_large_preset_has_the_published_shape() -> None:
    config = preset_config("moss-moon-003", bits=4)
    assert (config.n_embd, config.n_layer, config.n_head, config.vocab_size) == (6144, 34, 24, 107008)
    assert (config.bos_token_id, config.eos_token_id) == (106028, 106068)


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bits is 3; known are 4, 8, and 16"):
        preset_config("tiny", bits=3)
    with pytest.raises(ConfigError, match=r"there is no preset 'huge'; known are moss-moon-003, tiny"):
        preset_config("huge")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"n_layer is 0"):
        preset_config("tiny", layers=0)
    with pytest.raises(ConfigError, match=r"head_bits is 5; known are 4, 8, and 16"):
        preset_config("tiny", head_bits=5)
    with pytest.raises(ConfigError, match=r"has no place for a quantised head"):
        synthesize_foreign(preset_config("tiny", head_bits=8), tmp_path / "h")
    config = preset_config("tiny", layers=1)
    synthesize(config, tmp_path / "m")
    with pytest.raises(ConfigError, match=r"m exists already"):
        synthesize_foreign(config, tmp_path / "m")
