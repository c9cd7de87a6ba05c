"""What is told of a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from moss_folders import float_tensors, gptq_tensors, write_folder

from moss_jt.converters.hf2jittor import hf2jittor
from moss_jt.converters.inspection import MARKERS, inspect
from moss_jt.converters.synth import preset_config, synthesize
from moss_jt.errors import CheckpointError, ConfigError


def test_both_forms_of_a_quantised_model(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", gptq_tensors(4, 32, act_order=True), wbits=4, groupsize=32)
    foreign, native = inspect(source), inspect(hf2jittor(source).path)
    assert (foreign.form, native.form) == ("hugging face", "native")
    for found in (foreign, native):
        assert found.config.quantization is not None
        assert (found.config.quantization.bits, found.config.quantization.group_size) == (4, 32)
        assert found.act_order == 8
        assert found.parameters == 2 * (64 * 64 * 4 + 2 * 64 * 256 + 2 * 64 + 256 + 64) + 2 * 96 * 64 + 2 * 64 + 96
        assert (found.tokenizer, found.missing_markers) == (None, MARKERS)
        assert found.nbytes == sum(file.stat().st_size for file in found.path.glob("*.safetensors"))
    assert native.dtypes == {"float16": 13, "int4": 8}
    assert native.shapes["transformer.h.0.mlp.fc_out.weight"] == (64, 256)


def test_masks_and_tokenizers_are_told(tmp_path: Path, golden: Path) -> None:
    masks = {"transformer.h.0.attn.causal_mask": np.ones((1, 1, 64, 64), np.bool_)}
    source = write_folder(tmp_path / "hf", {**float_tensors(), **masks})
    assert inspect(source).dropped == 1
    (source / "vocab.json").write_text("[]")
    broken = inspect(source)
    assert broken.tokenizer == "byte-level BPE"
    assert broken.tokenizer_problem is not None
    assert "vocab.json" in broken.tokenizer_problem
    whole = inspect(synthesize(preset_config("tiny", layers=1), tmp_path / "m").path)
    assert (whole.missing_markers, whole.tokenizer_problem) == ((), None)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=r"nothing"):
        inspect(tmp_path / "nothing")
