"""How well a model foretells a text: its perplexity, the measure by which storage formats are compared.

Every token but the first is foretold once. A text longer than the context is read in windows that
start `stride` tokens apart, each from position 0 on; a window scores the tokens that the ones before
it have not scored, so all but the first window's see at least context - stride tokens before them.
Logits are taken some rows at a time and never kept.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moss_jt.batch import single_batch
from moss_jt.errors import CheckpointError, ConfigError, DiskError
from moss_jt.plan import LOGIT_ROWS
from moss_jt.progress import Progress, Quiet
from moss_jt.runner import Model, Runner
from moss_jt.tokenizer import Tokenizer

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Perplexity:
    """How well a text was foretold.

    Attributes:
        tokens: of the text.
        scored: how many were foretold: all but the first.
        nats: the sum of -log p over them.
        context: tokens that a window holds.
        stride: from one window to the next.
        windows: how many there were.
    """

    tokens: int
    scored: int
    nats: float
    context: int
    stride: int
    windows: int

    @property
    def mean_nats(self) -> float:
        """-log p of a token, on average."""
        return self.nats / self.scored

    @property
    def value(self) -> float:
        """The perplexity: e to the mean."""
        return math.exp(self.mean_nats) if self.mean_nats < math.log(float(np.finfo(np.float64).max)) else math.inf


@dataclass(frozen=True)
class Window:
    """Tokens that are read together.

    Attributes:
        start: of the first.
        stop: after the last.
        first: the first token whose successor is scored.
    """

    start: int
    stop: int
    first: int


def perplexity(
    model: Model,
    ids: Sequence[int] | npt.ArrayLike,
    *,
    context: int | None = None,
    stride: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure the perplexity of a sequence of tokens.

    Args:
        model: loaded.
        ids: at least two.
        context: tokens that a window holds; None for as many as the model takes.
        stride: from one window to the next, 1 to `context`; None for half of it.
        progress: told the tokens read.

    Raises:
        ConfigError: context, stride or the tokens cannot work.
        CheckpointError: the model's logits are not numbers.
    """
    width = _whole_number("context", context, model.max_tokens, f"the longest here is {model.max_tokens}")
    step = _whole_number(
        "stride", stride if stride is not None else -(-width // 2), width, "it cannot pass the context"
    )
    tokens = _checked(model, ids)
    windows = list(windows_of(len(tokens), width, step))
    runner = model.runner(tokens=width)
    report = progress or Quiet()
    report.begin("Reading the text", sum(window.stop - window.start for window in windows), "tokens")
    nats = 0.0
    try:
        for window in windows:
            nats += _score(runner, tokens, window, report)
    finally:
        report.end()
    if not math.isfinite(nats):
        raise CheckpointError(f"{model.path} gives logits that are no numbers. Check it with: moss-convert verify")
    return Perplexity(len(tokens), len(tokens) - 1, nats, width, step, len(windows))


def windows_of(tokens: int, context: int, stride: int) -> Iterator[Window]:
    """The windows over a text; each token but the last has its successor scored in exactly one."""
    first = 0
    for start in range(0, tokens, stride):
        stop = min(start + context, tokens - 1)
        if stop > first:
            yield Window(start, stop, first)
            first = stop


def read_text_tokens(path: str | os.PathLike[str], tokenizer: Tokenizer, *, markers: bool = False) -> list[int]:
    """The tokens of a text file in UTF-8; a byte order mark is not part of the text.

    Args:
        path: of the file.
        tokenizer: of the model.
        markers: read <eoh>, <eom> and their like as control tokens.

    Raises:
        ConfigError: there is no such file, or it is not UTF-8.
        DiskError: the disk fails.
    """
    raw = _read(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 at byte {error.start} ({raw[error.start] if raw else 0:#04x}). "
            "Save it as UTF-8, or give token ids."
        ) from error
    return tokenizer.encode(text, allow_special=markers)


def read_ids(path: str | os.PathLike[str]) -> list[int]:
    """The token ids in a file: whole numbers with white space or commas between, brackets allowed.

    Raises:
        ConfigError: there is no such file, or it holds something else.
        DiskError: the disk fails.
    """
    words = _read(path).removeprefix(b"\xef\xbb\xbf").translate(bytes.maketrans(b",[]", b"   ")).split()
    for place, word in enumerate(words, 1):
        if not (word.isdigit() and len(word) < 10):
            found = word[:20].decode("utf-8", errors="replace")
            raise ConfigError(f"{path}: entry {place} is {found!r}; token ids are whole numbers from 0 on.")
    return [int(word) for word in words]


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give a file of text, or of token ids.") from error
    except OSError as error:
        raise DiskError(f"{path} cannot be read: {error.strerror or error}. Check the disk.") from error


def _whole_number(name: str, value: int | None, most: int, why: str) -> int:
    if value is None:
        return most
    if not isinstance(value, Integral) or isinstance(value, bool) or not 1 <= value <= most:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number from 1 to {most}: {why}.")
    return int(value)


def _checked(model: Model, ids: Sequence[int] | npt.ArrayLike) -> IntArray:
    """The tokens as an array, all of them in the vocabulary."""
    tokens = np.asarray(ids)
    if tokens.size < 2:
        raise ConfigError(f"the text has {tokens.size} tokens; at least 2 are needed, since the first is not foretold.")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ConfigError(f"the tokens are {tokens.dtype} of shape {tokens.shape}; whole numbers in a row are needed.")
    wrong = np.flatnonzero((tokens < 0) | (tokens >= model.config.vocab_size))
    if len(wrong):
        raise ConfigError(
            f"token {int(wrong[0])} of the text is {int(tokens[wrong[0]])}, outside the vocabulary of "
            f"{model.config.vocab_size}. Is the tokenizer that of another model?"
        )
    return tokens.astype(np.int64)


def _score(runner: Runner, tokens: IntArray, window: Window, progress: Progress) -> float:
    """The sum of -log p over the tokens that a window scores."""
    runner.cache.release(0)
    total = 0.0
    for start in range(window.start, window.stop, runner.capacity):
        stop = min(start + runner.capacity, window.stop)
        runner.cache.reserve(0, stop - start)
        with runner.alone():
            runner.forward(single_batch(tokens[start:stop], start=start - window.start, wanted=[]))
            runner.cache.commit(0, stop - start)
            for first in range(max(start, window.first), stop, LOGIT_ROWS):
                last = min(first + LOGIT_ROWS, stop)
                total += _nats(runner.logits(range(first - start, last - start)), tokens[first + 1 : last + 1])
        progress.advance(stop - start)
    return total


def _nats(logits: npt.NDArray[np.float32], targets: IntArray) -> float:
    """The sum of -log softmax(logits)[target]; the logits are used up."""
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(targets)), targets].astype(np.float64)
    sums = np.exp(logits, out=logits).sum(axis=1, dtype=np.float64)
    return float((np.log(sums) - chosen).sum())
