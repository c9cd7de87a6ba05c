"""The byte-level tokenizer against golden/tokenizer, safety of user text, streaming, and broken files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt.errors import CheckpointError
from moss_jt.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "tokenizer"
VARIANTS = ["a-plain-added", "b-string-specials", "c-addedtoken-specials"]
LOSSLESS: list[dict[str, Any]] = json.loads((GOLDEN / "lossless.json").read_text("utf-8"))["cases"]
EXPECTED: dict[str, dict[str, Any]] = {
    name: json.loads((GOLDEN / name / "expected.json").read_text("utf-8")) for name in VARIANTS
}
MARKERS = {"<eoh>": 1038, "<eom>": 1039, "<eot>": 1040, "<eoc>": 1041, "<eor>": 1042}
ALPHABET = [
    *" \n\t\r.,'ab1Z<>|/_你好，。😀é\u3000\u200b\x00\x1f",
    "  ",
    "    ",
    " " * 40,
    "\t\t\t",
    *MARKERS,
    "<|endoftext|>",
    "<|MOSS|>:",
    "<eom",
    "'s",
]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(variant: str) -> Tokenizer:
    return load_tokenizer(GOLDEN / variant)


@pytest.fixture(scope="module")
def stripping(variant: str) -> Tokenizer:
    return load_tokenizer(GOLDEN / variant, strip_around_added=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tokenizer's files, to be broken."""
    for name in TOKENIZER_FILES:
        if (source := GOLDEN / VARIANTS[0] / name).exists():
            shutil.copy(source, tmp_path / name)
            (tmp_path / name).chmod(0o644)
    return tmp_path


def random_text(rng: np.random.Generator, alphabet: Sequence[str] = ALPHABET) -> str:
    return "".join(rng.choice(np.array(alphabet, dtype=object), rng.integers(0, 20)))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a JSON file after a change to its values."""
    values = json.loads(path.read_text("utf-8"))
    change(values)
    path.write_text(json.dumps(values), "utf-8")


# What the golden files say.


def test_lossless(tokenizer: Tokenizer) -> None:
    assert len(LOSSLESS) == 234
    for case in LOSSLESS:
        assert tokenizer.encode(case["text"], allow_special=True) == case["ids"], case
        assert tokenizer.decode(case["ids"]) == case["decode"] == case["text"]


def test_plain_text_is_lossless_and_harmless(tokenizer: Tokenizer) -> None:
    for case in LOSSLESS:
        ids = tokenizer.encode(case["text"])
        assert tokenizer.control_ids.isdisjoint(ids), case
        assert tokenizer.decode(ids) == case["text"]
        assert ids == case["ids"] or not tokenizer.control_ids.isdisjoint(case["ids"]), case


def test_ids_of_the_original(stripping: Tokenizer, variant: str) -> None:
    for case in EXPECTED[variant]["cases"]:
        assert stripping.encode(case["text"], allow_special=True) == case["ids"], case
        assert stripping.decode(case["ids"]) == case["decode_nospace"], case


def joined_as_the_original(tokenizer: Tokenizer, ids: Sequence[int], skipped: set[int]) -> str:
    """Decode with the original's spaces between added tokens and text."""
    parts: list[list[int]] = [[]]
    for token in ids:
        if token in skipped:
            continue
        if token >= 1000:
            parts += [[token], []]
        else:
            parts[-1].append(token)
    return " ".join(tokenizer.decode(part) for part in parts if part)


@pytest.mark.parametrize("kind", ["cases", "decode_cases"])
def test_decoding_differs_from_the_original_by_its_spaces_only(tokenizer: Tokenizer, variant: str, kind: str) -> None:
    expected = EXPECTED[variant]
    special = {tokenizer.encode(name, allow_special=True)[0] for name in expected["all_special_tokens"]}
    for case in expected[kind]:
        if "error" in case:
            assert not all(map(tokenizer.is_known, case["ids"]))
            continue
        assert joined_as_the_original(tokenizer, case["ids"], set()) == case["decode"]
        if "decode_skip" in case:  # not recorded for single bytes
            assert joined_as_the_original(tokenizer, case["ids"], special) == case["decode_skip"]


def test_ids_that_made_the_original_fail(tokenizer: Tokenizer, variant: str) -> None:
    failing = [case["ids"] for case in EXPECTED[variant]["decode_cases"] if "error" in case]
    assert [tokenizer.decode(ids) for ids in failing] == ["\ufffd", "\ufffd", '!"\ufffd']


def test_surrogates_that_made_the_original_fail(tokenizer: Tokenizer, variant: str) -> None:
    texts = ["".join(chr(int(point, 16)) for point in case["codepoints"]) for case in EXPECTED[variant]["surrogates"]]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == ["\ufffd", "a\ufffdb", "\U0001f600"]


def test_prefix_space_and_bos_by_hand(stripping: Tokenizer, variant: str) -> None:
    for case in EXPECTED[variant]["add_prefix_space_and_bos"]:
        assert [stripping.bos_id, *stripping.encode(" " + case["text"], allow_special=True)] == case["ids"]


def test_batch(stripping: Tokenizer, variant: str) -> None:
    batch = EXPECTED[variant]["batch_call"]
    assert [stripping.encode(text) for text in batch["texts"]] == batch["input_ids"]


def test_special_ids(tokenizer: Tokenizer, variant: str) -> None:
    expected = EXPECTED[variant]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (expected["special"]["bos"], expected["special"]["eos"])
    assert tokenizer.vocab_size == expected["len"] == 1043
    assert dict(tokenizer.markers) == MARKERS
    assert tokenizer.control_ids == {999, *MARKERS.values()}
    for token, number in expected["added"].items():
        assert tokenizer.encode(token, allow_special=True) == [number]
        assert tokenizer.marker(token) == number if token in MARKERS else tokenizer.encode(token) == [number]


# Round trips, safety, streaming.


def test_random_text_comes_back(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(1)
    for _ in range(1000):
        text = random_text(rng)
        plain, special = tokenizer.encode(text), tokenizer.encode(text, allow_special=True)
        assert tokenizer.decode(plain) == tokenizer.decode(special) == text
        assert tokenizer.control_ids.isdisjoint(plain)


def test_every_character_comes_back(tokenizer: Tokenizer) -> None:
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x30000, 7)]))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_runs_of_white_space_are_no_control_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("x" + " " * 40 + "\t\ty") == [87, 1000, 1022, 1037, 88]


def test_lone_surrogates(tokenizer: Tokenizer) -> None:
    for text in ("\udc00\ud800", "a\ud800", "\ud800a", "\ud800\ud83d\ude00\udc00", "\ud800<eom>\udfff  "):
        wanted = text.replace("\ud83d\ude00", "😀").encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        while "\ufffd\ufffd\ufffd" in wanted:  # Python counts one for each of the three bytes
            wanted = wanted.replace("\ufffd\ufffd\ufffd", "\ufffe", 1)
        wanted = wanted.replace("\ufffe", "\ufffd")
        assert tokenizer.decode(tokenizer.encode(text)) == wanted
        assert tokenizer.decode(tokenizer.encode(text, allow_special=True)) == wanted


def test_ids_without_a_token(tokenizer: Tokenizer) -> None:
    ids = [64, -1, 1043, 106_068, 10**30, -(10**30), 65]
    assert tokenizer.decode(ids) == "a\ufffd\ufffd\ufffd\ufffd\ufffdb"
    assert [tokenizer.is_known(number) for number in ids] == [True, False, False, False, False, False, True]
    mask = tokenizer.known_mask(1100)
    assert mask.shape == (1100,)
    assert np.flatnonzero(~mask).tolist() == list(range(1043, 1100))
    assert tokenizer.known_mask(10).all()


def test_decode_takes_numpy_ids_and_skips_specials(tokenizer: Tokenizer) -> None:
    ids = np.array([64, 1039, 1029, 65, 999, 1043])
    assert tokenizer.decode(ids) == "a<eom>  b<|endoftext|>\ufffd"
    assert tokenizer.decode(ids, skip_special=True) == "a  b\ufffd"


def test_the_bytes_of_tokens_are_the_text(tokenizer: Tokenizer) -> None:
    text = "a 你好 😀\t<eom>"
    assert b"".join(map(tokenizer.piece, tokenizer.encode(text))) == text.encode()
    assert tokenizer.piece(-1) == tokenizer.piece(10**9) == "\ufffd".encode()


def test_stream_gives_whole_characters_and_the_same_text(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(2)
    for trial in range(300):
        if trial % 2:
            ids = rng.integers(-3, 1050, 60).tolist()  # mostly broken UTF-8
        else:
            ids = [*tokenizer.encode(random_text(rng) + "龍😀"), *tokenizer.encode("é")[:1]]
        stream = tokenizer.stream()
        pieces = [stream.push(number) for number in ids] + [stream.flush()]
        data = b"".join(tokenizer._vocabulary.pieces.get(number, b"\xef\xbf\xbd") for number in ids)
        assert "".join(pieces) == tokenizer.decode(ids) == data.decode("utf-8", "replace")
    stream = tokenizer.stream()
    ids = tokenizer.encode("\U0002a6d6")
    assert [stream.push(number) for number in ids] == [*[""] * (len(ids) - 1), "\U0002a6d6"]
    assert len(ids) > 1
    assert stream.flush() == ""


def test_merging_into_a_control_token_is_undone(folder: Path) -> None:
    def name_a_word(values: dict[str, Any]) -> None:
        values["additional_special_tokens"] = ["MOSS"]

    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    for token in ("MO", "MOS", "MOSS"):
        vocab.setdefault(token, max(vocab.values()) + 2000)
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nM O\nMO S\nMOS S\n", "utf-8")
    assert load_tokenizer(folder).encode("xMOSS!") == [87, vocab["MOSS"], 0]
    edit(folder / "special_tokens_map.json", name_a_word)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("xMOSS!") == [87, 44, 46, 50, 50, 0]
    assert tokenizer.encode("xMOSS!", allow_special=True) == [87, vocab["MOSS"], 0]


def test_added_words_are_used_and_added_marks_are_not(folder: Path) -> None:
    edit(
        folder / "added_tokens.json",
        lambda values: values.update({"复旦": 1043, "<image>": 1044, "[X]": 1045}),
    )
    tokenizer = load_tokenizer(folder)
    assert 1043 in tokenizer.encode("在复旦大学")
    assert {1044, 1045} < tokenizer.control_ids
    text = "<image>[X]"
    assert tokenizer.control_ids.isdisjoint(tokenizer.encode(text))
    assert tokenizer.encode(text, allow_special=True) == [1044, 1045]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_hundred_thousand_chinese_characters() -> None:
    tokenizer = load_tokenizer(GOLDEN / VARIANTS[0])
    text = "".join(np.random.default_rng(0).choice([*"今天气很好我们去公园散步吧龍鳳"], 100_000))
    start = time.perf_counter()
    ids = tokenizer.encode(text)
    taken = time.perf_counter() - start
    assert tokenizer.decode(ids) == text
    assert taken < 5, f"{taken:.2f} s; 0.3 s was measured, and the quadratic way takes minutes"


def test_importing_is_light() -> None:
    code = (
        "import sys, moss_jt.tokenizer, moss_jt.template\n"
        "print([name for name in ('tokenizers', 'sentencepiece', 'numpy', 'transformers') if name in sys.modules])"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


# Where special ids come from.


def test_special_ids_of_tokenizer_config_alone(folder: Path) -> None:
    (folder / "special_tokens_map.json").unlink()
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (999, 1039)


def test_special_tokens_map_has_the_last_word(folder: Path) -> None:
    edit(folder / "special_tokens_map.json", lambda values: values.update(eos_token="<|endoftext|>", bos_token=None))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 999)


def test_special_ids_where_no_file_names_them(folder: Path) -> None:
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).unlink()
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (999, 1039)
    (folder / "added_tokens.json").unlink()
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, dict(tokenizer.markers)) == (999, 999, {})
    assert tokenizer.control_ids == {999}


def test_added_tokens_of_newer_tokenizer_configs(folder: Path) -> None:
    added = json.loads((folder / "added_tokens.json").read_text("utf-8"))
    (folder / "added_tokens.json").unlink()
    entries = {str(number): {"content": token, "special": token == "<eoh>"} for token, number in added.items()}
    edit(folder / "tokenizer_config.json", lambda values: values.update(added_tokens_decoder=entries))
    tokenizer = load_tokenizer(folder)
    assert dict(tokenizer.markers) == MARKERS
    assert all(tokenizer.encode(case["text"], allow_special=True) == case["ids"] for case in LOSSLESS)


@pytest.mark.parametrize("pairs", [False, True])
def test_tokenizer_json_alone(folder: Path, tmp_path: Path, pairs: bool) -> None:
    lines = (folder / "merges.txt").read_text("utf-8").split("\n")[1:-1]
    added = json.loads((folder / "added_tokens.json").read_text("utf-8"))
    values = {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": token, "special": token in MARKERS} for token, number in added.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": json.loads((folder / "vocab.json").read_text("utf-8")),
            "merges": [line.split() for line in lines] if pairs else lines,
        },
    }
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "tokenizer.json").write_text(json.dumps(values), "utf-8")
    tokenizer = load_tokenizer(alone)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (999, 1039)
    assert all(tokenizer.encode(case["text"], allow_special=True) == case["ids"] for case in LOSSLESS)


def test_windows_line_ends_and_no_last_newline(folder: Path) -> None:
    merges = (folder / "merges.txt").read_text("utf-8").rstrip("\n").replace("\n", "\r\n")
    (folder / "merges.txt").write_bytes(merges.encode())
    tokenizer = load_tokenizer(folder)
    assert all(tokenizer.encode(case["text"], allow_special=True) == case["ids"] for case in LOSSLESS)


# Broken and hostile files: one clear line each.


def put(name: str, data: bytes | str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def change(name: str, **values: Any) -> Callable[[Path], object]:
    return lambda folder: edit(folder / name, lambda table: table.update(values))


def drop(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def link_to_itself(folder: Path) -> None:
    (folder / "vocab.json").unlink()
    (folder / "vocab.json").symlink_to(folder / "vocab.json")


def pipe(folder: Path) -> None:
    (folder / "vocab.json").unlink()
    os.mkfifo(folder / "vocab.json")


def huge(folder: Path) -> None:
    os.truncate(folder / "vocab.json", 1 << 40)


def drop_bytes(folder: Path) -> None:
    (folder / "merges.txt").write_text("", "utf-8")
    edit(folder / "vocab.json", lambda table: [table.pop(token) for token in ("a", "Ġ")])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "vocab missing": (drop("vocab.json"), r"vocab\.json is missing. Fetch the tokenizer's files again"),
    "merges missing": (drop("merges.txt"), r"merges\.txt is missing"),
    "added missing": (
        drop("added_tokens.json"),
        r"eos_token is '<eom>', which is in no .* Is added_tokens\.json missing",
    ),
    "vocab empty file": (put("vocab.json", ""), r"vocab\.json cannot be read as JSON"),
    "vocab empty": (put("vocab.json", "{}"), r"merges\.txt: the merge of 'Ġ' and 'Ġ' needs the token 'Ġ'"),
    "vocab a list": (put("vocab.json", "[1]"), r"vocab\.json holds a list where an object was expected"),
    "vocab cut": (put("vocab.json", '{"a": 1, "b"'), r"vocab\.json cannot be read as JSON"),
    "not UTF-8": (put("vocab.json", b'{"\xff": 1}'), r"vocab\.json is not UTF-8: byte 0xff at offset 2"),
    "nested": (put("vocab.json", '{"a":' * 100_000), r"vocab\.json cannot be read as JSON: it is nested too deeply"),
    "long number": (put("vocab.json", '{"a": ' + "9" * 10_000 + "}"), r"vocab\.json"),
    "key twice": (put("vocab.json", '{"a": 1, "a": 2}'), r"vocab\.json has the key 'a' twice"),
    "id twice": (change("vocab.json", zz=7, yy=7), r"vocab\.json: tokens '.+' and 'zz' have the same id 7"),
    "id negative": (change("vocab.json", zz=-1), r"token 'zz' has the id -1; wanted is a whole number from 0 to"),
    "id huge": (change("vocab.json", zz=1 << 40), r"token 'zz' has the id 1099511627776"),
    "id text": (change("vocab.json", zz="7"), r"token 'zz' has the id '7'"),
    "id true": (change("vocab.json", zz=True), r"token 'zz' has the id True"),
    "id fraction": (change("vocab.json", zz=5000.5), r"token 'zz' has the id 5000\.5"),
    "token empty": (change("vocab.json", **{"": 5000}), r"id 5000 has the token '', which no text holds"),
    "token surrogate": (change("vocab.json", **{"\ud800": 5000}), r"id 5000 has the token '\\ud800'"),
    "bytes missing": (
        drop_bytes,
        r"vocab\.json lacks 2 of the 256 byte tokens, the first for byte 0x20",
    ),
    "merge of one": (put("merges.txt", "#version: 0.2\nabc\n"), r"merges\.txt line 2: 'abc' is not two tokens"),
    "merge of three": (put("merges.txt", "a b c\n"), r"merges\.txt line 1: 'a b c' is not two tokens"),
    "merge unknown": (
        put("merges.txt", "a qqq\n"),
        r"the merge of 'a' and 'qqq' needs the token 'qqq'.*belong together",
    ),
    "merge product": (put("merges.txt", "a ~\n"), r"needs the token 'a~', which the vocabulary lacks"),
    "merges not UTF-8": (put("merges.txt", b"a \xfe"), r"merges\.txt is not UTF-8: byte 0xfe at offset 2"),
    "added id taken": (
        change("added_tokens.json", x2=5),
        r"added_tokens\.json gives the id 5 to 'x2'; .* gives it to '&'",
    ),
    "added other id": (change("added_tokens.json", a=3000), r"added_tokens\.json gives 'a' the id 3000, another .* 64"),
    "added a list": (put("added_tokens.json", "[]"), r"added_tokens\.json holds a list"),
    "special a number": (
        change("special_tokens_map.json", bos_token=5),
        r"special_tokens_map\.json: bos_token is 5; wanted",
    ),
    "specials a text": (
        change("special_tokens_map.json", additional_special_tokens="<x>"),
        r"additional_special_tokens is a str; wanted is a list",
    ),
    "special unknown": (change("special_tokens_map.json", bos_token="<s>"), r"bos_token is '<s>', which is in no"),
    "decoder a list": (change("tokenizer_config.json", added_tokens_decoder=[1]), r"added_tokens_decoder is a list"),
    "decoder entry": (
        change("tokenizer_config.json", added_tokens_decoder={"x": {}}),
        r"the entry 'x' of added_tokens_dec",
    ),
    "link loop": (link_to_itself, r"vocab\.json cannot be read: Too many levels of symbolic links"),
    "pipe": (pipe, r"vocab\.json is not a file"),
    "huge": (huge, r"vocab\.json has 1099511627776 bytes; no tokenizer file has more"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(folder: Path, name: str) -> None:
    damage, words = BROKEN[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer: wanted are vocab\.json .* found nothing. Copy"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}", "utf-8")
    with pytest.raises(CheckpointError, match=r"found config\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"No such file or directory\. Is the path right"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="Not a directory"):
        load_tokenizer(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "holds a model of kind None; only byte-level BPE"),
        ({"model": {"type": "Unigram"}}, "holds a model of kind 'Unigram'"),
        (
            {"model": {"type": "BPE", "vocab": {}, "merges": []}},
            "pre_tokenizer is None and normalizer None; only GPT-2",
        ),
        (
            {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}, "pre_tokenizer": {"type": "ByteLevel"}},
            "the merge 'a' is not two tokens",
        ),
        (
            {"model": {"vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": [3]},
            "3 in added_tokens is not a token with its id",
        ),
    ],
)
def test_broken_tokenizer_json(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), "utf-8")
    with pytest.raises(CheckpointError, match=words):
        load_tokenizer(tmp_path)
