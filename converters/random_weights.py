"""Random weights of a MOSS model, made as fast as a disk takes them and the same for the same seed.

Every tensor has its own stream of random bits, seeded by the seed and its name, so tensors can be
made in any order and again. Normal numbers come from a table of 65,536 quantiles looked up by 16
random bits each, which is several times faster than drawing them.
"""

from __future__ import annotations

import statistics
import zlib
from functools import lru_cache
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.checkpoint import expected_shapes, quantization_of
from moss_jt.config import MossConfig, Quantization
from moss_jt.converters.byte_tokenizer import BYTES, token_of_byte
from moss_jt.converters.output import PIECE_BYTES, Pieces
from moss_jt.layout import TileLayout
from moss_jt.packing import GptqMatrix, inputs_per_group, pack_end, pack_gptq_tiles, plain_groups

_GAIN = 1.5  # standard deviation of a linear layer's output when its inputs have 1
_SILENT = -20.0  # output bias of a token that must not be said
_END_BIAS = 1.0  # of the marker that ends an answer, so that it comes after some dozens of characters
_TABLE_BITS = 16
_HEAD_ROWS = 4096  # made at a time: 24 MiB of int8 in the large model


class RandomWeights:
    """The numbers of a model that nobody trained.

    Args:
        config: its shape; floats are float16.
        seed: the same seed gives the same weights.
    """

    def __init__(self, config: MossConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._shapes = expected_shapes(config)

    def floats(self, name: str) -> Pieces:
        """Yield the float16 numbers of a tensor, in pieces of at most 16 MiB."""
        shape = self._shapes[name]
        if len(shape) == 1:
            yield self._vector(name, shape[0]).astype("<f2")
            return
        table = (_normal_quantiles() * self._spread(name, shape[1])).astype("<f2")
        bits = self._bits(name)
        count = shape[0] * shape[1]
        for start in range(0, count, PIECE_BYTES // 2):
            some = min(PIECE_BYTES // 2, count - start)
            yield table[bits.random_raw(-(-some // 4)).view("<u2")[:some]]

    def gptq(self, name: str) -> GptqMatrix:
        """The words of a quantised matrix; its zero points lie around the middle of the codes."""
        quantization = quantization_of(self._config, name)
        assert quantization is not None, "a quantised matrix"
        return self._words(name, quantization, self._shapes[name][0], self._bits(name))

    def head_pieces(self, name: str, layout: TileLayout) -> Pieces:
        """Yield the blob of a quantised head, which is far larger than other matrices, some rows at a time."""
        quantization = quantization_of(self._config, name)
        assert quantization is not None and not layout.permuted, "a quantised matrix of whole groups"
        bits = self._bits(name)
        for first in range(0, layout.shape[0], _HEAD_ROWS):
            rows = min(_HEAD_ROWS, layout.shape[0] - first)
            yield from pack_gptq_tiles(self._words(name, quantization, rows, bits), layout, None)
        yield pack_end(layout, None)

    def _words(self, name: str, quantization: Quantization, n: int, bits: np.random.SFC64) -> GptqMatrix:
        """The words of `n` rows of a matrix."""
        k = self._shapes[name][1]
        per, size = 32 // quantization.bits, inputs_per_group(quantization.group_size, k)
        groups = -(-k // size)
        codes = (1 << quantization.bits) - 1
        step = self._spread(name, k) / sqrt(((codes + 1) ** 2 - 1) / 12)  # of codes drawn evenly
        scales = step * (0.75 + 0.5 * _raw(bits, groups * n, "<u2").reshape(groups, n) / 65535)
        low = codes // 2 - 1  # GPTQ stores the zero point minus 1: half of them below the middle, half above
        every = sum(low << (quantization.bits * i) for i in range(per))
        ones = sum(1 << (quantization.bits * i) for i in range(per))
        qzeros = np.uint32(every) + (_raw(bits, groups * n // per, "<u4") & np.uint32(ones))
        return GptqMatrix(
            _raw(bits, k // per * n, "<i4").reshape(k // per, n),
            qzeros.view("<i4").reshape(groups, n // per),
            scales.astype("<f2"),
            plain_groups(k, size),
        )

    def _bits(self, name: str) -> np.random.SFC64:
        return np.random.SFC64(np.random.SeedSequence([self._seed, zlib.crc32(name.encode())]))

    def _spread(self, name: str, inputs: int) -> float:
        """Standard deviation of a matrix; what goes into the residual stream is smaller the more layers add to it."""
        if name == "transformer.wte.weight":
            return 0.5
        into_residual = name.endswith((".out_proj.weight", ".fc_out.weight"))
        return _GAIN / sqrt(inputs) / (sqrt(2 * self._config.n_layer) if into_residual else 1)

    def _vector(self, name: str, count: int) -> npt.NDArray[np.float64]:
        """Norms are the identity, biases zero, but for the output: it says printable characters only."""
        if name == "lm_head.bias":
            return self._output_bias(count)
        return np.ones(count) if name.endswith(".weight") else np.zeros(count)

    def _output_bias(self, count: int) -> npt.NDArray[np.float64]:
        bias = np.full(count, _SILENT)
        tokens = token_of_byte()
        said = [tokens[byte] for byte in range(BYTES) if chr(byte).isascii() and chr(byte).isprintable()]
        bias[[token for token in said if token < count]] = 0
        end = self._config.eos_token_id
        if end is not None and end < count:
            bias[end] = _END_BIAS
        return bias


@lru_cache(maxsize=1)
def _normal_quantiles() -> npt.NDArray[np.float64]:
    """The middle of each of 65,536 equally likely ranges of the normal distribution."""
    normal = statistics.NormalDist()
    count = 1 << _TABLE_BITS
    return np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])


def _raw(bits: np.random.SFC64, count: int, dtype: str) -> npt.NDArray[Any]:
    """`count` numbers of random bits."""
    size = np.dtype(dtype).itemsize
    return bits.random_raw(-(-count * size // 8)).view(dtype)[:count]
