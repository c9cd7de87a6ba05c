"""Bits and groups come from shapes and must be those of the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moss_folders import Tensors, float_tensors, gptq_tensors, write_folder

from moss_jt.converters.hf2jittor import hf2jittor
from moss_jt.errors import CheckpointError


def convert(path: Path, tensors: Tensors, **config: Any) -> tuple[int, int] | None:
    quantization = hf2jittor(write_folder(path / "hf", tensors, **config), path / "native").config.quantization
    return (quantization.bits, quantization.group_size) if quantization else None


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_any_group_size(tmp_path: Path, bits: Any, group_size: int) -> None:
    tensors = gptq_tensors(bits, group_size)  # 128 is more than the 64 inputs of three of the matrices
    assert convert(tmp_path, tensors, wbits=bits, groupsize=group_size) == (bits, group_size)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 64), (8, -1), (4, 128), (8, 40), (4, 48)])
def test_what_the_config_leaves_out_is_inferred(tmp_path: Path, bits: Any, group_size: int) -> None:
    """Also where a matrix is no multiple of the group, or smaller than one."""
    assert convert(tmp_path, gptq_tensors(bits, group_size)) == (bits, group_size)


def test_groups_that_fit_no_size(tmp_path: Path) -> None:
    tensors = gptq_tensors(4, 32)
    for part in ("scales", "qzeros"):
        name = f"transformer.h.1.mlp.fc_out.{part}"
        tensors[name] = tensors[name][:2]
    with pytest.raises(CheckpointError, match=r"fit no single one \(128 or more, 36 or less\)"):
        convert(tmp_path, tensors)


def test_bits_must_agree(tmp_path: Path) -> None:
    words = r"config\.json says wbits 4, but .*qkv_proj\.qweight has 16 rows for 64 inputs, which is 8 bits"
    with pytest.raises(CheckpointError, match=words):
        convert(tmp_path, gptq_tensors(8, 32), wbits=4, groupsize=32)
    assert not (tmp_path / "native").exists()
    assert not (tmp_path / ".native.partial").exists()


def test_group_size_must_agree(tmp_path: Path) -> None:
    words = r"says groupsize 128, but .*fc_out\.scales has 8 groups for 256 inputs, which is groups of 32"
    tensors = gptq_tensors(4, 32)
    with pytest.raises(
        CheckpointError, match=words.replace("fc_out", "qkv_proj").replace("8 groups for 256", "2 groups for 64")
    ):
        convert(tmp_path, tensors, wbits=4, groupsize=128)


def test_quantised_config_over_float_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"says wbits 4, but the files hold no qweight tensors"):
        convert(tmp_path, float_tensors(), wbits=4, groupsize=32)


def test_float_config_over_quantised_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"says wbits 32, but .* which is 4 bits"):
        convert(tmp_path, gptq_tensors(4, 32), wbits=32)


def test_matrices_of_different_bits_are_refused(tmp_path: Path) -> None:
    tensors = gptq_tensors(4, 32)
    eight = gptq_tensors(8, 32)
    for part in ("qweight", "qzeros"):
        name = f"transformer.h.1.mlp.fc_in.{part}"
        tensors[name] = eight[name]
    with pytest.raises(
        CheckpointError, match=r"do not agree: .* with 4 bits and transformer.h.1.mlp.fc_in.weight with 8"
    ):
        convert(tmp_path, tensors, wbits=4, groupsize=32)


def test_words_that_fit_no_bits(tmp_path: Path) -> None:
    tensors = gptq_tensors(4, 32)
    name = "transformer.h.0.attn.out_proj.qweight"
    tensors[name] = tensors[name][:6]
    with pytest.raises(CheckpointError, match=r"out_proj\.qweight is \(6, 64\) for 64 inputs; 8 rows would be 4 bits"):
        convert(tmp_path, tensors, wbits=4, groupsize=32)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    tensors = gptq_tensors(4, 32)
    del tensors["transformer.h.1.attn.out_proj.g_idx"]
    del tensors["transformer.h.0.ln_1.bias"]
    tensors["transformer.h.0.mlp.fc_in.qzeros"] = tensors["transformer.h.0.mlp.fc_in.qzeros"][:1]
    tensors["transformer.h.0.mlp.fc_in.g_idx"] = tensors["transformer.h.0.mlp.fc_in.g_idx"].astype(np.int64)
    tensors["transformer.h.0.mlp.fc_in.scales"] = tensors["transformer.h.0.mlp.fc_in.scales"].astype(np.float32)
    tensors["transformer.h.0.attn.lora_A"] = np.zeros((2, 2), np.float16)
    tensors["lm_head.bias"] = np.zeros(96, np.int32)
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path, tensors, wbits=4, groupsize=32)
    for words in (
        "transformer.h.1.attn.out_proj.g_idx is missing",
        "transformer.h.0.ln_1.bias is missing",
        "transformer.h.0.attn.lora_A is not expected",
        "transformer.h.0.mlp.fc_in.qzeros is (1, 32), the config asks for (2, 32)",
        "transformer.h.0.mlp.fc_in.g_idx is int64, not int32",
        "transformer.h.0.mlp.fc_in.scales is float32, not float16",
        "lm_head.bias is int32, not a floating-point type",
    ):
        assert words in str(caught.value)


def test_groups_that_are_not_whole(tmp_path: Path) -> None:
    tensors = gptq_tensors(4, 32, act_order=True)
    name = "transformer.h.1.mlp.fc_out.g_idx"
    tensors[name] = np.where(tensors[name] == 3, 2, tensors[name]).astype(np.int32)
    with pytest.raises(CheckpointError, match=r"fc_out\.g_idx: g_idx gives group 2 64 inputs where 32 were expected"):
        convert(tmp_path, tensors, wbits=4, groupsize=32)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_must_be_finite(tmp_path: Path, value: float) -> None:
    tensors = gptq_tensors(8, 32)
    tensors["transformer.h.1.attn.qkv_proj.scales"][1, 77] = value
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.attn\.qkv_proj\.scales\[1, 77\] is (NaN|inf)"):
        convert(tmp_path, tensors, wbits=8, groupsize=32)
    assert not (tmp_path / "native").exists()
    assert not (tmp_path / ".native.partial").exists()
