"""SentencePiece behind the tokenizer's interface: round trips, markers, broken files.

The models are trained here, on a few lines: that takes a fraction of a second.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from moss_jt.config import MossConfig
from moss_jt.errors import CheckpointError, ConfigError
from moss_jt.template import Template, Turn, choose_template, system_prompt
from moss_jt.tokenizer import Tokenizer, load_tokenizer

MARKERS = ["<eoh>", "<eom>", "<eot>", "<eoc>", "<eor>"]
CORPUS = [
    "今天天气很好，我们去公园散步吧。",
    "Hello world, how are you today?",
    "def f(x):\n    return x",
    "<|Human|>: hi <|MOSS|>: hello there",
    "价格是 3.14 元",
] * 40
EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
# How MOSS-tiny's tokenizer is made, and its relatives.
KINDS: dict[str, dict[str, Any]] = {
    "ours": {
        **EXACT,
        "add_dummy_prefix": False,
        "user_defined_symbols": [*MARKERS, "\u2581" * 2, "\u2581" * 4, "\t\t"],
    },
    "control symbols": {**EXACT, "add_dummy_prefix": False, "control_symbols": MARKERS, "model_type": "unigram"},
    "no bos": {**EXACT, "add_dummy_prefix": False, "user_defined_symbols": MARKERS, "bos_id": -1, "eos_id": -1},
    "dummy prefix": {**EXACT, "user_defined_symbols": MARKERS},
}
ALPHABET = [
    *" \n\tab1.<>|你好😀é\u2581\u3000\x00",
    "  ",
    "    ",
    *MARKERS,
    "<|MOSS|>:",
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
]


def train(folder: Path, **options: Any) -> Path:
    out = io.BytesIO()
    settings: dict[str, Any] = {
        "vocab_size": 420,
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 1.0,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=out, **{**settings, **options}
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sentencepiece")
    return {kind: train(root / kind, **options) for kind, options in KINDS.items()}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(models: dict[str, Path], request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(models[str(request.param)])


def random_text(rng: np.random.Generator) -> str:
    return "".join(rng.choice(np.array(ALPHABET, dtype=object), rng.integers(0, 15)))


def test_every_text_comes_back_and_none_becomes_a_marker(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(1)
    for _ in range(500):
        text = random_text(rng)
        plain, special = tokenizer.encode(text), tokenizer.encode(text, allow_special=True)
        assert tokenizer.decode(plain) == tokenizer.decode(special) == text
        assert tokenizer.control_ids.isdisjoint(plain)
        assert [i for i in special if i in tokenizer.markers.values()] == markers_in(tokenizer, text)


def markers_in(tokenizer: Tokenizer, text: str) -> list[int]:
    at = sorted((place, name) for name in MARKERS for place in range(len(text)) if text.startswith(name, place))
    return [tokenizer.marker(name) for _, name in at]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_sentencepiece(models: dict[str, Path], kind: str) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(models[kind] / "tokenizer.model"))
    tokenizer = load_tokenizer(models[kind])
    for text in CORPUS[:5]:
        assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer.vocab_size == reference.vocab_size()
    assert tokenizer.bos_id == (reference.bos_id() if reference.bos_id() >= 0 else None)
    assert tokenizer.eos_id == (reference.eos_id() if reference.eos_id() >= 0 else None)
    assert dict(tokenizer.markers) == {name: reference.piece_to_id(name) for name in MARKERS}


def test_plain_user_symbols_stay_in_use(models: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(models["ours"])
    ids = tokenizer.encode("x    y\t\tz")
    assert [tokenizer.decode([number]) for number in ids] == ["x", "    ", "y", "\t\t", "z"]


def test_stream_equals_decode(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(2)
    for trial in range(200):
        ids = rng.integers(-2, 430, 40).tolist() if trial % 2 else tokenizer.encode(random_text(rng) + "龍😀")
        for skip in (False, True):
            stream = tokenizer.stream(skip_special=skip)
            pieces = [stream.push(number) for number in ids] + [stream.flush()]
            assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip)
            assert not any("\ufffd" in piece for piece in pieces[:-1]) or trial % 2


def test_ids_without_a_token_and_lone_surrogates(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([-1, 10**20, tokenizer.vocab_size]) == "\ufffd\ufffd\ufffd"
    assert tokenizer.decode(tokenizer.encode("a\ud800b\ud83d\ude00")) == "a\ufffdb😀"


def test_text_that_goes_on_gets_no_space_of_its_own(tokenizer: Tokenizer) -> None:
    text = tokenizer.encode("Hello") + tokenizer.encode("world", inside=True) + tokenizer.encode(" you", inside=True)
    assert tokenizer.decode(text) == "Helloworld you"


@pytest.mark.parametrize("name", ["readme", "fields"])
def test_conversations(tokenizer: Tokenizer, name: Any) -> None:
    template: Template = choose_template(name, MossConfig())
    system = system_prompt(template)
    turns = [Turn("  你好<eom>", moss="Hi there\n"), Turn("def f():\n    pass", moss=" \u2581ok")]
    ids = template.system_ids(tokenizer, system)
    for turn in turns:
        ids += template.whole_turn(tokenizer, turn)
    assert tokenizer.decode(ids) == template.conversation_text(system, turns)
    ends = [number for number in ids if number in tokenizer.control_ids]
    fields = ["<eoh>", "<eom>"] if name == "readme" else ["<eoh>", "<eot>", "<eoc>", "<eor>", "<eom>"]
    assert ends == [tokenizer.marker(end) for end in fields] * 2


def test_markers_from_added_tokens(tmp_path: Path) -> None:
    train(tmp_path, **EXACT, add_dummy_prefix=False)
    assert dict(load_tokenizer(tmp_path).markers) == {}
    size = load_tokenizer(tmp_path).vocab_size
    added = {name: size + number for number, name in enumerate(MARKERS)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added), "utf-8")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<eom>"}), "utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert dict(tokenizer.markers) == added
    assert tokenizer.eos_id == added["<eom>"]
    assert tokenizer.encode("<eom>", allow_special=True) == [added["<eom>"]]
    assert tokenizer.decode(tokenizer.encode("a<eom>")) == "a<eom>"


def test_without_byte_pieces_what_is_unknown_is_lost_visibly(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train(tmp_path, **EXACT, byte_fallback=False, vocab_size=200))
    assert tokenizer.decode(tokenizer.encode("today 龍")) == "today \ufffd"


def test_stripping_is_not_for_sentencepiece(models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"strip_around_added=True is a habit of .* Leave the option out"):
        load_tokenizer(models["ours"], strip_around_added=True)


PIECE = b"\x0a\x03\x0a\x01a"  # the piece "a"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "holds no pieces. Is it a SentencePiece model"),
        (b"hello world", "is not a SentencePiece model"),
        (b"\x0a\xff\xff\xff\xff\x0f", "is not a SentencePiece model: the field at offset 0 ends at 4294967301, past"),
        (b"\xff" * 20, "is not a SentencePiece model: a number at offset 0 does not end"),
        (b"\x0a", "is not a SentencePiece model"),
        (b"\x0b", "a field of unknown kind 3 at offset 0"),
        (b"\x0a\x03\x0a\x01\xff", "is not a SentencePiece model: 'utf-8'"),
        (PIECE + PIECE, "holds the piece 'a' twice"),
        (b"\x0a\x02\x0a\x00", "id 0 has the token ''"),
        (b"\x0a\x0a\x0a\x06<0xZZ>\x18\x06", "the byte piece '<0xZZ>' names no byte"),
        (PIECE, "is refused by sentencepiece: "),
    ],
)
def test_broken_models(tmp_path: Path, data: bytes, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_models_are_refused_or_work(models: dict[str, Path], tmp_path: Path) -> None:
    whole = (models["dummy prefix"] / "tokenizer.model").read_bytes()
    rng = np.random.default_rng(4)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(0, 256)
        (tmp_path / "tokenizer.model").write_bytes(data[: int(rng.integers(1, 2 * len(data)))])
        try:
            damaged = load_tokenizer(tmp_path)
        except CheckpointError as error:
            assert str(tmp_path) in str(error)
            refused += 1
        else:
            damaged.decode(damaged.encode("今天 <eom> x"))
    assert refused > 20
