"""Perplexity: equal to what the logits say, and to transformers' CodeGen; windows; files that hold no text."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt.errors import CheckpointError, ConfigError, DiskError
from moss_jt.perplexity import Window, perplexity, read_ids, read_text_tokens, windows_of
from moss_jt.runner import Model
from moss_jt.tokenizer import load_tokenizer

Load = Callable[[str], Model]
FP16 = "tiny-fp/safetensors-fp16"


def nats_of(logits: Any, targets: Any) -> Any:
    """-log softmax of each target, in float64."""
    wide = np.asarray(logits, np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.log(np.exp(wide).sum(axis=-1)) - wide[np.arange(len(targets)), targets]


def random_ids(model: Model, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(count).integers(model.config.vocab_size, size=count)


@pytest.mark.parametrize("count", [2, 33, 100])
def test_a_short_text_is_one_window(golden_model: Load, jittor: Any, count: int) -> None:
    model = golden_model(FP16)
    ids = random_ids(model, count)
    found = perplexity(model, ids)
    wanted = nats_of(model.logits(ids[:-1])[0], ids[1:]).sum()
    assert (found.tokens, found.scored, found.windows, found.context) == (count, count - 1, 1, 128)
    assert found.nats == pytest.approx(wanted, rel=1e-6)
    assert found.value == pytest.approx(math.exp(wanted / (count - 1)), rel=1e-6)


@pytest.mark.parametrize(("context", "stride"), [(128, None), (40, 40), (40, 7), (1, 1), (64, 1)])
def test_windows_over_a_long_text(golden_model: Load, jittor: Any, context: int, stride: int | None) -> None:
    model = golden_model(FP16)
    ids = random_ids(model, 20 if context == 1 else 120 if stride == 1 else 300)
    found = perplexity(model, ids.tolist(), context=context, stride=stride)
    step = stride or 64
    total, scored = 0.0, 0
    for start in range(0, len(ids) - 1, step):
        inputs, targets = ids[start : start + context], ids[start + 1 : start + context + 1]
        each = nats_of(model.logits(inputs[: len(targets)])[0], targets)
        new = len(targets) if start == 0 else max(0, start + len(targets) - scored)
        total += each[len(targets) - new :].sum()
        scored += new
    assert found.scored == scored == len(ids) - 1
    assert found.nats == pytest.approx(total, rel=1e-6)


def test_every_token_is_scored_once() -> None:
    for tokens in (2, 3, 10, 11, 64):
        for context in (1, 2, 5, 10, 100):
            for stride in range(1, min(context, 12) + 1):
                windows = list(windows_of(tokens, context, stride))
                scored = [token + 1 for window in windows for token in range(window.first, window.stop)]
                assert scored == list(range(1, tokens)), (tokens, context, stride)
                for window in windows:
                    assert 0 < window.stop - window.start <= context
                    assert window.start <= window.first
                    assert window.start == 0 or window.first - window.start >= context - stride
    assert list(windows_of(11, 4, 3)) == [Window(0, 4, 0), Window(3, 7, 4), Window(6, 10, 7)]


def test_logits_are_taken_some_rows_at_a_time(golden_model: Load, jittor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = golden_model(FP16)
    ids = random_ids(model, 120)
    wanted = perplexity(model, ids)
    rows: list[int] = []
    logits = model.runner().ops.__class__.logits

    def watch(self: Any, x: Any, norm: Any, head: Any, which: Any) -> Any:
        rows.append(len(which))
        return logits(self, x, norm, head, which)

    monkeypatch.setattr(model.runner().ops.__class__, "logits", watch)
    monkeypatch.setattr("moss_jt.perplexity.LOGIT_ROWS", 10)
    found = perplexity(model, ids)
    assert max(rows) == 10
    assert sum(rows) == 119
    assert found.nats == pytest.approx(wanted.nats, rel=1e-9)


@pytest.mark.filterwarnings("default")  # those of torch and transformers are not ours to mend
@pytest.mark.skipif(
    find_spec("torch") is None or find_spec("transformers") is None, reason="torch and transformers are not installed"
)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_equals_transformers(index: int, tmp_path: Path, jittor: Any) -> None:
    import torch
    from test_codegen_oracle import SHAPES, make_codegen

    import moss_jt

    shape = SHAPES[index]
    theirs = make_codegen(shape, tmp_path / "source")
    ours = moss_jt.load_model(tmp_path / "source")
    ids = np.random.default_rng(index).integers(shape.vocab_size, size=600)
    with torch.no_grad():
        short = torch.from_numpy(ids[:200])[None]
        loss = float(theirs(short, labels=short).loss)
    assert perplexity(ours, ids[:200]).value == pytest.approx(math.exp(loss), rel=1e-3)
    total = 0.0
    for start in range(0, 599, 100):  # as its documentation does for texts longer than the model
        window = torch.from_numpy(ids[start : start + 251])[None]
        first = 0 if start == 0 else 150
        labels = window.clone()
        labels[:, : first + 1] = -100
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(theirs(window, labels=labels).loss) * count if count else 0.0
        if start + 251 >= 600:
            break
    assert perplexity(ours, ids, context=250, stride=100).value == pytest.approx(math.exp(total / 599), rel=1e-3)


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        ([], {}, "the text has 0 tokens; at least 2 are needed"),
        ([5], {}, "the text has 1 tokens; at least 2 are needed"),
        ([5, 9999, 6], {}, "token 1 of the text is 9999, outside the vocabulary of 320"),
        ([5, -1], {}, "token 1 of the text is -1, outside the vocabulary"),
        ([0.5, 1.5], {}, r"the tokens are float64 of shape \(2,\)"),
        ([[1, 2]], {}, r"of shape \(1, 2\); whole numbers in a row"),
        ([5, 6], {"context": 0}, "context is 0; it must be a whole number from 1 to 128"),
        ([5, 6], {"context": 129}, "context is 129; it must be a whole number from 1 to 128: the longest here is 128"),
        ([5, 6], {"context": 8, "stride": 9}, "stride is 9; it must be a whole number from 1 to 8"),
        ([5, 6], {"stride": 1.5}, "stride is 1.5"),
    ],
)
def test_what_cannot_work_is_refused(golden_model: Load, jittor: Any, ids: Any, options: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        perplexity(golden_model(FP16), ids, **options)


def test_logits_that_are_no_numbers_are_told(golden_model: Load, jittor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = golden_model(FP16)
    monkeypatch.setattr("moss_jt.perplexity._nats", lambda _logits, _targets: math.nan)
    with pytest.raises(CheckpointError, match=r"gives logits that are no numbers"):
        perplexity(model, [1, 2, 3])


def test_text_files(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(golden / "tokenizer" / "a-plain-added")
    file = tmp_path / "text"
    text = "Hello 你好\r\n<eom>"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_text_tokens(file, tokenizer) == tokenizer.encode(text)
    assert read_text_tokens(file, tokenizer, markers=True) == tokenizer.encode(text, allow_special=True)
    file.write_bytes(b"")
    assert read_text_tokens(file, tokenizer) == []
    file.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"text is not UTF-8 at byte 3 \(0xe9\)\. Save it as UTF-8"):
        read_text_tokens(file, tokenizer)
    for path, words in ((tmp_path / "no", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=words):
            read_text_tokens(path, tokenizer)

    def fail(_self: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(DiskError, match=r"text cannot be read: Input/output error"):
        read_text_tokens(file, tokenizer)


def test_files_of_token_ids(tmp_path: Path) -> None:
    file = tmp_path / "ids"
    for text in ("1 2 3", "1,2,3", "[1, 2, 3]\n", "\ufeff1\n2\r\n3\t"):
        file.write_text(text, "utf-8")
        assert read_ids(file) == [1, 2, 3]
    file.write_text("")
    assert read_ids(file) == []
    for text, words in (
        ("1 x 3", "entry 2 is 'x'"),
        ("1 -2", "entry 2 is '-2'"),
        ("1.5", "entry 1 is '1.5'"),
        ("9" * 400, "entry 1 is '9999"),
        ("٣", "entry 1"),
    ):
        file.write_text(text, "utf-8")
        with pytest.raises(ConfigError, match=rf"ids: {words}.*token ids are whole numbers from 0 on"):
            read_ids(file)
