"""What a model is (MossConfig) and how it is asked to speak (GenerationConfig).

Both are frozen values that check themselves. MossConfig keeps the checkpoint's own words
(n_layer, n_head, n_embd, rotary_dim, …) and reads both a Hugging Face config.json and ours,
which is the same file with one more key, "moss_jt".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from moss_jt.errors import ConfigError

Bits = Literal[4, 8]
FloatType = Literal["float16", "bfloat16", "float32"]
TemplateName = Literal["readme", "fields"]

FORMAT_NAME = "moss-jt"
FORMAT_VERSION = 2  # the newest that is read; a folder is written in the oldest that can hold it
QKV_SLICES = 4  # qkv_proj's rows come in this many equal slices, each query, value, key

_KINDS: tuple[tuple[type, str, Callable[[Any], object], tuple[str, ...]], ...] = (  # of GenerationConfig's fields
    (Integral, "a whole number", int, ("top_k", "max_new_tokens", "seed")),
    (Real, "a number", float, ("temperature", "top_p", "repetition_penalty", "max_time")),
    (Iterable, "a list", tuple, ("stop_ids", "stop_strings")),
)
_OURS = ("quantization", "head_quantization", "template", "sampling", "dtype", "name")  # under our own key
DRAWN = ("temperature", "top_k", "top_p")  # who gives one of these wants draws
_ALIASES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


@dataclass(frozen=True)
class Quantization:
    """How matrices are stored as int4 or int8: the four linear layers of each block, or the head.

    Attributes:
        bits: 4 or 8.
        group_size: inputs that share one scale and zero; -1 means all inputs of a row.
    """

    bits: Bits
    group_size: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"wbits is {self.bits}; only 4 and 8 are quantised formats of MOSS.")
        if self.group_size < 1 and self.group_size != -1:
            raise ConfigError(f"groupsize is {self.group_size}; it must be positive, or -1 for one group a row.")


@dataclass(frozen=True)
class Sampling:
    """How a model is best asked to choose words, where nobody says otherwise; None for MOSS's own way.

    Attributes: those of `GenerationConfig`.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        if self.do_sample is not None and not isinstance(self.do_sample, bool):
            raise ConfigError(f"do_sample is {self.do_sample!r}; it must be true or false.")
        GenerationConfig(**self.values())

    def values(self) -> dict[str, Any]:
        """Those that it names."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class MossConfig:
    """The shape of a MOSS model.

    The defaults are those of the original's configuration_moss.py, which are not the 16B model's:
    always read a config.json.

    Attributes:
        n_inner: width of the MLP; None means 4 * n_embd.
        initializer_range: standard deviation of a new model's random weights; checked where one is made.
        quantization: of the blocks' matrices, None for floating-point weights.
        head_quantization: of lm_head.weight, None for floating point.
        template: the prompt format that the model was trained for, None where nobody said.
        sampling: how it is best asked to choose words.
        dtype: type of the stored floating-point weights, None where the files decide.
    """

    vocab_size: int = 107008
    n_positions: int = 2048
    n_embd: int = 4096
    n_layer: int = 28
    n_head: int = 16
    rotary_dim: int = 64
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = 106028
    eos_token_id: int | None = 106068
    quantization: Quantization | None = None
    head_quantization: Quantization | None = None
    template: TemplateName | None = None
    sampling: Sampling = field(default_factory=Sampling, compare=False)
    dtype: FloatType | None = None
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{key} is {value!r}; it must be a positive whole number.")
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}.")
        if self.n_head % QKV_SLICES:
            raise ConfigError(
                f"n_head is {self.n_head}; MOSS stores its heads in {QKV_SLICES} slices, so it must be a multiple of {QKV_SLICES}."
            )
        if not isinstance(self.rotary_dim, int) or not 0 < self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ConfigError(
                f"rotary_dim is {self.rotary_dim!r}; it must be even and from 2 to the head width {self.head_dim}."
            )
        if self.n_inner is not None and (not isinstance(self.n_inner, int) or self.n_inner < 1):
            raise ConfigError(f"n_inner is {self.n_inner!r}; it must be a positive whole number or null.")
        if self.activation_function != "gelu_new":
            raise ConfigError(
                f"activation_function is {self.activation_function!r}; MOSS uses gelu_new and nothing else is supported."
            )
        if not isinstance(self.layer_norm_epsilon, float) or not 0 < self.layer_norm_epsilon < 1:
            raise ConfigError(
                f"layer_norm_epsilon is {self.layer_norm_epsilon!r}; it must be a number between 0 and 1."
            )

    @property
    def head_dim(self) -> int:
        """D, the width of one head."""
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        """F, the width of the MLP."""
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    @property
    def format_version(self) -> int:
        """The version of the native format that a folder of this model needs."""
        return 1 if self.head_quantization is None else 2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MossConfig:
        """Build from the contents of a config.json, the original's or ours.

        Keys that mean nothing for inference (torch_dtype, auto_map, …) are passed over.

        Raises:
            ConfigError: the model is of another type, or a value cannot work.
        """
        kind = values.get("model_type", "moss")
        if kind not in ("moss", "codegen"):
            raise ConfigError(f'model_type is {kind!r}; this program runs MOSS ("moss"), whose shape "codegen" shares.')
        known = {f.name for f in fields(cls)} - set(_OURS)
        taken: dict[str, Any] = {}
        for key, value in values.items():
            target = _ALIASES.get(key, key)
            if target in known and target not in taken:
                taken[target] = value
        if isinstance(taken.get("layer_norm_epsilon"), int):
            taken["layer_norm_epsilon"] = float(taken["layer_norm_epsilon"])
        ours = values.get("moss_jt")
        if ours is not None:
            return cls(**taken, **_read_our_part(ours))
        bits = values.get("wbits", 32)
        if bits in (4, 8):
            taken["quantization"] = Quantization(bits, int(values.get("groupsize", 128)))
        elif bits not in (16, 32, None):
            raise ConfigError(f"wbits is {bits!r}; known are 4, 8 and 16 or 32 for unquantised weights.")
        return cls(**taken)

    @classmethod
    def from_file(cls, path: Path) -> MossConfig:
        """Read a config.json.

        Raises:
            ConfigError: the file is missing, is not JSON, or holds values that cannot work.
        """
        try:
            text = path.read_bytes().decode("utf-8")
            values = json.loads(text)
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing. Is {path.parent} the folder of a model?") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read as JSON: {error}. Fetch the file again.") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__} where an object of settings was expected.")
        try:
            return cls.from_dict(values)
        except (ConfigError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The contents of our config.json; `from_dict` gives back an equal value."""
        values = asdict(self)
        for key in _OURS:
            del values[key]
        ours: dict[str, Any] = {
            "format": FORMAT_NAME,
            "version": self.format_version,
            "dtype": self.dtype,
            "template": self.template,
            "name": self.name,
        }
        ours["quantization"] = asdict(self.quantization) if self.quantization else None
        if self.head_quantization is not None:
            ours["head_quantization"] = asdict(self.head_quantization)
        if self.sampling.values():
            ours["sampling"] = self.sampling.values()
        return {"model_type": "moss", "architectures": ["MossForCausalLM"], **values, "moss_jt": ours}


def _read_our_part(ours: Any) -> dict[str, Any]:
    """Check and translate the "moss_jt" key of a native config.json."""
    if not isinstance(ours, dict) or ours.get("format") != FORMAT_NAME:
        raise ConfigError('the key "moss_jt" is not of the form that moss-convert writes.')
    version = ours.get("version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ConfigError(
            f"the native format has version {version!r}; this program reads up to {FORMAT_VERSION}. Update moss-jt."
        )
    return {
        "dtype": ours.get("dtype"),
        "template": ours.get("template"),
        "name": ours.get("name") or "",
        "sampling": _read_sampling(ours.get("sampling") or {}),
        "quantization": _read_quantization(ours, "quantization"),
        "head_quantization": _read_quantization(ours, "head_quantization"),
    }


def _read_sampling(value: Any) -> Sampling:
    """How the model is best asked, from the key "sampling"."""
    known = [f.name for f in fields(Sampling)]
    if not isinstance(value, dict) or not set(value) <= set(known):
        raise ConfigError(f'"sampling" of the key "moss_jt" is {value!r}; it may hold {", ".join(known)}.')
    return Sampling(**value)


def _read_quantization(ours: Mapping[str, Any], key: str) -> Quantization | None:
    """Bits and group size under a key, None where it is absent or null."""
    value = ours.get(key)
    if value is None:
        return None
    if not isinstance(value, dict) or not all(type(value.get(part)) is int for part in ("bits", "group_size")):
        raise ConfigError(f'"{key}" of the key "moss_jt" is {value!r}; it must hold bits and group_size, or be null.')
    return Quantization(value["bits"], value["group_size"])


@dataclass(frozen=True)
class GenerationConfig:
    """How the next tokens are chosen and when to stop.

    The sampling defaults are MOSS's own. Nothing stops a generation but what is named here.

    Attributes:
        do_sample: draw at random; False takes the best token (ties: the lowest id).
        temperature: divides the logits; at least 0, and 0 is greedy.
        top_k: keep this many best tokens (and ties with the last of them); 0 keeps all.
        top_p: keep the smallest set of best tokens whose probability passes this; 1.0 keeps all.
        repetition_penalty: over every token so far, prompt included; 1.0 is none.
        max_new_tokens: stop after this many.
        max_time: stop after this many seconds, None for never.
        seed: of the random draws; None takes one from the system.
        stop_ids: a generated id of these ends the answer (and is its last token).
        stop_strings: generated text that holds one of these ends the answer.
    """

    do_sample: bool = True
    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.8
    repetition_penalty: float = 1.02
    max_new_tokens: int = 512
    max_time: float | None = None
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._make_plain()
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}; it must be a finite number, 0 (greedy) or more.")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be 0 (keep all) or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1.0 is none).")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if self.max_time is not None and not self.max_time > 0:
            raise ConfigError(f"max_time is {self.max_time}; it must be above 0 seconds, or None.")
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be 0 or more, or None for one from the system.")
        if "" in self.stop_strings:
            raise ConfigError("an empty stop string would end every answer at once; leave it out.")

    def _make_plain(self) -> None:
        """Check the kind of each value, since nobody may have checked the types; numpy's become Python's."""
        if isinstance(self.stop_strings, str):
            raise ConfigError(f"stop_strings is {self.stop_strings!r}; it must be a list of texts.")
        for kind, words, make, names in _KINDS:
            for name in names:
                value = getattr(self, name)
                if value is None and name in ("seed", "max_time"):
                    continue
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise ConfigError(f"{name} is {value!r}; it must be {words}.")
                object.__setattr__(self, name, make(value))
        if not all(isinstance(text, str) for text in self.stop_strings):
            raise ConfigError(f"stop_strings is {self.stop_strings!r}; it must be a list of texts.")
        if not all(isinstance(number, Integral) for number in self.stop_ids):
            raise ConfigError(f"stop_ids is {self.stop_ids!r}; it must be a list of token ids.")
        object.__setattr__(self, "stop_ids", tuple(int(number) for number in self.stop_ids))

    @classmethod
    def for_model(cls, model: MossConfig, **given: Any) -> GenerationConfig:
        """What was given, and for the rest what suits a model, else MOSS's own.

        Args:
            model: its shape, which may say how it is best asked.
            given: values by their names. Who gives temperature, top_k or top_p means draws.

        Raises:
            ConfigError: a value cannot work.
        """
        drawn = {"do_sample": True} if any(name in given for name in DRAWN) else {}
        return cls(**{**model.sampling.values(), **drawn, **given})

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken without a draw."""
        return not self.do_sample or self.temperature == 0
