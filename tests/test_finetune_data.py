"""Data for training: ids, labels and spans as the original makes them; formats, masks, the kept file; steps and passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt.errors import ConfigError
from moss_jt.finetune.batches import Order, deal, learned_tokens, passes_of
from moss_jt.finetune.data import Samples, join, load_samples
from moss_jt.finetune.encoding import NOT_LEARNED, Encoder, Sample
from moss_jt.finetune.records import read_records
from moss_jt.finetune.settings import DataSettings
from moss_jt.template import Template, Turn
from moss_jt.tokenizer import Tokenizer, load_tokenizer

TOKENIZER = "tokenizer/c-addedtoken-specials"


def conversation(*answers: str, **extra: Any) -> dict[str, Any]:
    """A conversation in the published form."""
    chat = {
        f"turn_{number}": {
            "Human": f"<|Human|>: Question {number}<eoh>\n",
            "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
            "Commands": "<|Commands|>: None<eoc>\n",
            "Tool Responses": "<|Results|>: None<eor>\n",
            "MOSS": f"<|MOSS|>: {answer}<eom>\n",
        }
        for number, answer in enumerate(answers, 1)
    }
    return {"meta_instruction": "You are MOSS.\n", "num_turns": len(answers), "chat": chat, **extra}


def encode(tokenizer: Tokenizer, record: dict[str, Any], **settings: Any) -> list[Sample]:
    return list(Encoder(tokenizer, DataSettings(**settings)).samples(record, "here"))


def learned_text(tokenizer: Tokenizer, sample: Sample) -> str:
    return tokenizer.decode(sample.labels[sample.labels != NOT_LEARNED].tolist())


@pytest.fixture(scope="module")
def tokenizer(golden: Path) -> Tokenizer:
    return load_tokenizer(golden / TOKENIZER)


@pytest.mark.parametrize("case", range(6))
def test_the_originals_ids_labels_and_spans(golden: Path, case: int) -> None:
    want = json.loads((golden / "finetune" / "expected.json").read_text("utf-8"))[case]
    tokenizer = load_tokenizer(golden / "tokenizer" / want["tokenizer"], strip_around_added=True)
    encoder = Encoder(tokenizer, DataSettings(max_length=want["max_len"], original=True))
    records = list(read_records(golden / "finetune" / "train.jsonl"))
    assert len(records) == want["n_conversations"]
    samples = [sample for place, record in records for sample in encoder.samples(record, place)]
    assert len(samples) == want["n_samples"]
    for got, expected in zip(samples, want["samples"], strict=True):
        assert got.ids.tolist() == expected["input_ids"]
        assert got.labels.tolist() == expected["labels"]
        assert [list(span) for span in got.unlearned] == expected["no_loss_spans"]


def test_what_is_learned_by_default(tokenizer: Tokenizer) -> None:
    record = conversation("First answer", "Second answer")
    record["chat"]["turn_2"]["Tool Responses"] = "<|Results|>:\nCalculate(1+1) => 2\n<eor>\n"
    (sample,) = encode(tokenizer, record)
    text = learned_text(tokenizer, sample)
    assert "First answer<eom>\n" in text and "Second answer<eom>\n" in text
    assert "<|Commands|>: None<eoc>\n" in text
    assert "Question" not in text and "<|Human|>" not in text and "You are" not in text
    assert "Calculate" not in text, "what a tool said is not learned"
    (original,) = encode(tokenizer, record, original=True)
    assert "Question 1<eoh>" in learned_text(tokenizer, original)
    assert original.ids.tolist() == sample.ids.tolist()


def test_ids_are_those_of_a_chat(tokenizer: Tokenizer) -> None:
    (sample,) = encode(tokenizer, conversation("Answer"))
    template = Template("fields")
    turn = template.whole_turn(tokenizer, Turn("Question 1", moss="Answer"))
    assert sample.ids.tolist() == template.system_ids(tokenizer, "You are MOSS.") + turn


def test_what_people_write_does_not_become_a_marker(tokenizer: Tokenizer) -> None:
    record = conversation("Answer")
    record["chat"]["turn_1"]["Human"] = "<|Human|>: say <eom> now<eoh>\n"
    (sample,) = encode(tokenizer, record)
    assert sample.ids.tolist().count(tokenizer.marker("<eom>")) == 1
    assert "say <eom> now<eoh>" in tokenizer.decode(sample.ids.tolist())


def test_whole_turns_only(tokenizer: Tokenizer) -> None:
    lengths = [len(encode(tokenizer, conversation(*["Answer"] * turns))[0].ids) for turns in (1, 2, 3)]
    record = conversation(*["Answer"] * 3)
    for longest, turns in ((lengths[1], 2), (lengths[1] - 1, 1), (lengths[2], 3)):
        (sample,) = encode(tokenizer, record, max_length=longest)
        assert len(sample.ids) == lengths[turns - 1]
    assert encode(tokenizer, record, max_length=lengths[0] - 1) == []


def test_texts_become_windows(tokenizer: Tokenizer) -> None:
    samples = encode(tokenizer, {"text": "Once upon a time there was a model. " * 20}, max_length=64)
    assert [len(sample.ids) for sample in samples[:-1]] == [64] * (len(samples) - 1)
    ids = [number for sample in samples for number in sample.ids.tolist()]
    assert ids[-1] == tokenizer.bos_id
    assert tokenizer.decode(ids[:-1]).startswith("Once upon a time")
    assert all(not sample.unlearned for sample in samples)


def test_scores_stand_before_answers(tokenizer: Tokenizer) -> None:
    record = conversation("Good", "Bad")
    record["chat"]["turn_1"]["quality"], record["chat"]["turn_2"]["quality"] = 100, 3.4
    (sample,) = encode(tokenizer, record, quality=True)
    text = tokenizer.decode(sample.ids.tolist())
    assert "<|Quality|>: 100\n<|MOSS|>: Good" in text and "<|Quality|>: 3\n<|MOSS|>: Bad" in text
    assert "Quality" not in learned_text(tokenizer, sample), "the score is given, not foretold"
    (plain,) = encode(tokenizer, record)
    assert "Quality" not in tokenizer.decode(plain.ids.tolist())
    with pytest.raises(ConfigError, match=r"here: turn_1 has the quality 'good'; it must be a number from 0 to 100"):
        record["chat"]["turn_1"]["quality"] = "good"
        encode(tokenizer, record, quality=True)


def write_all_forms(folder: Path) -> dict[str, Path]:
    """The same two conversations in every form of a data folder."""
    records = [conversation("One"), conversation("Two")]
    lines, files, part, whole = (folder / name for name in ("lines", "files", "part", "whole"))
    for place in (lines, files, part / "train", whole):
        place.mkdir(parents=True)
    (lines / "train.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n", "utf-8")
    (whole / "train.json").write_text(json.dumps(records), "utf-8")
    for number, record in enumerate(records):
        (files / f"conversation_{number}.json").write_text(json.dumps(record), "utf-8")
        (part / "train" / f"{number}.json").write_text(json.dumps(record), "utf-8")
    return {"lines": lines, "files": files, "part": part, "whole": whole}


def test_every_form_of_a_folder_gives_the_same(golden: Path, tmp_path: Path) -> None:
    found = [
        load_samples(place, "train", golden / TOKENIZER, DataSettings(), cache_dir=tmp_path / "cache")
        for place in write_all_forms(tmp_path).values()
    ]
    assert len(found[0]) == 2
    for other in found[1:]:
        assert np.array_equal(other.ids, found[0].ids) and np.array_equal(other.labels, found[0].labels)


def test_encoded_data_is_kept_and_known_again(golden: Path, tmp_path: Path) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()

    def load(answer: str, tokenizer: str = TOKENIZER, **settings: Any) -> tuple[Samples, int]:
        (data / "train.jsonl").write_text(json.dumps(conversation(answer)), "utf-8")
        found = load_samples(data, "train", golden / tokenizer, DataSettings(**settings), cache_dir=cache)
        return found, len(list(cache.iterdir()))

    first, files = load("Answer")
    assert files == 1
    again, files = load("Answer")
    assert files == 1 and np.array_equal(again.labels, first.labels)
    assert load("Other")[1] == 2
    assert load("Answer", original=True)[1] == 3
    assert load("Answer", "tokenizer/a-plain-added")[1] == 4
    kept = next(cache.iterdir())
    for file in cache.iterdir():
        file.write_bytes(kept.read_bytes()[:100])  # as a full disk may leave it
    assert np.array_equal(load("Answer")[0].ids, first.ids)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"chat": ', "train.jsonl:1 is not JSON"),
        ('{"plain_text": ""}', r'holds plain_text; wanted is a conversation with "chat", or a "text"'),
        ('{"chat": []}', r'"chat" must be an object of turns'),
        ('{"chat": {}, "num_turns": 1}', "there is no turn_1, and num_turns says that there is"),
        ('{"chat": {"turn_1": {"Robot": ""}}}', "has the field 'Robot'; a turn has Human"),
        ('{"chat": {"turn_1": {"Human": 3}}}', "'Human' is 3; it must be text"),
        ("\n", r"train\.jsonl: no records in there"),
        ('{"text": ""}', r"train\.jsonl: none of the 1 records gives a sample: .* \(--max_length\), or .* nothing"),
    ],
)
def test_wrong_data_is_named(golden: Path, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "train.jsonl").write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=words):
        load_samples(tmp_path, "train", golden / TOKENIZER, DataSettings(), cache_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"has no data for val: wanted is val\.jsonl"):
        load_samples(tmp_path, "val", golden / TOKENIZER, DataSettings(), cache_dir=tmp_path)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_data_as_windows_writes_it(ends: str, golden: Path, tmp_path: Path) -> None:
    """The mark before the text was refused in .jsonl, and was learned in .txt."""
    found = []
    for folder, mark, end in ((tmp_path / "plain", "", "\n"), (tmp_path / "marked", "\ufeff", ends)):
        folder.mkdir()
        lines = [json.dumps(conversation("Answer")), json.dumps({"text": "Some words."})]
        (folder / "train.jsonl").write_bytes((mark + end.join(lines)).encode())
        (folder / "train.txt").write_bytes(f"{mark}One line.{end}Another.".encode())
        found.append(load_samples(folder, "train", golden / TOKENIZER, DataSettings(), cache_dir=tmp_path / "cache"))
    assert len(found[0]) == 3 and np.array_equal(found[0].ids, found[1].ids)


def numbered(lengths: list[int]) -> Samples:
    """Samples of these lengths, whose ids tell the sample; the first half of each is not learned."""
    made = [
        Sample(np.full(n, i, np.int32) * 100 + np.arange(n, dtype=np.int32), ((0, n // 2),))
        for i, n in enumerate(lengths)
    ]
    return join(made)


def test_passes_hold_every_token_that_counts() -> None:
    samples = numbered([10, 3, 25, 8, 8, 40])
    numbers = [5, 0, 1, 3, 4, 2]
    passes = list(passes_of(samples, numbers, 20))
    assert all(one.batch.size <= 20 or len(np.unique(one.batch.slots)) == 1 for one in passes)
    assert sum(one.learned for one in passes) == learned_tokens(samples, np.array(numbers))
    seen = []
    for one in passes:
        assert (np.diff(one.batch.positions)[np.diff(one.batch.slots) == 0] == 1).all()
        assert (one.batch.ids[one.batch.wanted] + 1 == one.labels).all()
        seen += [int(one.batch.ids[one.batch.slots == slot][0]) // 100 for slot in np.unique(one.batch.slots)]
    assert seen == numbers


def test_processes_get_as_much_to_do() -> None:
    lengths = np.random.default_rng(3).integers(20, 300, 24)
    shares = deal(lengths, 3)
    assert sorted(place for share in shares for place in share) == list(range(24)), "each sample once"
    assert all(share == sorted(share) for share in shares), "in their order, whatever the process"
    tokens = [int(lengths[share].sum()) for share in shares]
    assert max(tokens) < 1.02 * lengths.sum() / 3
    assert deal(np.array([7, 7, 7, 7]), 2) == [[0, 2], [1, 3]]
    assert deal(lengths, 1) == [list(range(24))]


def test_fewer_samples_than_processes_leave_some_idle() -> None:
    assert deal(np.array([5, 9]), 3) == [[1], [0], []]


def test_what_samples_begin_with_stands_once() -> None:
    head = np.arange(20, dtype=np.int32)
    made = [Sample(np.append(head, tail).astype(np.int32), ((0, 15),)) for tail in ([50, 51, 52], [50, 60], [70])]
    (one,) = passes_of(join(made), [0, 1, 2], 38)
    assert one.batch.slots.tolist() == [0] * 14 + [1] * 8 + [2] * 7 + [3] * 6
    assert one.batch.positions.tolist() == [*range(14), *range(14, 22), *range(14, 21), *range(14, 20)]
    assert one.batch.ids[14:22].tolist() == [*range(14, 20), 50, 51]
    assert one.labels[:8].tolist() == [15, 16, 17, 18, 19, 50, 51, 52], "a learned token is never shared"
    assert one.tokens == 23 + 22 + 21
    cut = list(passes_of(join(made), [0, 1, 2], 37))
    assert [single.learned for single in cut] == [15, 6]


def test_records_that_teach_nothing_are_dropped() -> None:
    whole = Sample(np.arange(5, dtype=np.int32), ((0, 5),))
    found = join([whole, None, Sample(np.arange(5, dtype=np.int32), ())])
    assert (len(found), found.dropped) == (1, 2)


def test_an_epoch_takes_every_sample_once_in_an_order_of_its_own() -> None:
    order = Order(10, 4, seed=3)
    assert order.steps_per_epoch == 3
    epochs = [np.concatenate([order.step(3 * epoch + place) for place in range(3)]) for epoch in range(2)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert Order(10, 4, seed=3).step(4).tolist() == order.step(4).tolist(), "a run may go on anywhere"
