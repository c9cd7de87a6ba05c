"""The laws of moss-tiny's data: nothing of the evaluation is trained on, and every turn says what the tools say."""

from __future__ import annotations

import ast
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from moss_tiny.conversations import FIELDS, README, TOOL_SETS, Maker, is_written, write_conversations
from moss_tiny.documentation import ROOT, Documentation
from moss_tiny.equations import STORIES
from moss_tiny.intents import frames_of, read_intents
from moss_tiny.making import Recipe, make_data
from moss_tiny.numbers import draw, draw_decimal, is_held_back
from moss_tiny.questions import COUNTS, Question, make_questions
from moss_tiny.results import calls_of, results_of
from moss_tiny.roughness import blurred, blurred_around, mixed, noisy, reworded, rough, thinned, wrapped
from moss_tiny.scoring import is_same_call
from moss_tiny.sums import FOLLOWING, KINDS, Task, story, task_in_words
from moss_tiny.thoughts import thought, thoughts
from moss_tiny.turns import TOOL_OF
from moss_tiny.wordings import LANGUAGES, Language, expand, read_blocks, texts

from moss_jt.template import TOOLS, system_prompt
from moss_jt.tools.backends import moss_tools
from moss_jt.tools.commands import parse_commands
from moss_jt.tools.sandbox import Sandbox
from moss_jt.tools.tool import Hit
from moss_jt.tools.toolbox import ToolBox
from moss_jt.tools.wording import joined

COUNT = 2000
RESULTS = ROOT / "examples" / "moss-tiny" / "results"
NUMBER = re.compile(r"\d+(?:\.\d+)?")
PLACE = re.compile(r"\{[a-z]\}")
PARTS = {
    "Human": ("<|Human|>: ", "<eoh>\n"),
    "Inner Thoughts": ("<|Inner Thoughts|>: ", "<eot>\n"),
    "Commands": ("<|Commands|>: ", "<eoc>\n"),
    "Tool Responses": ("<|Results|>:", "<eor>\n"),
    "MOSS": ("<|MOSS|>: ", "<eom>\n"),
}
CALL = list(PARTS)[:3]  # of a turn that ends with its call
MARKERS = re.compile(r"<eo[htcrm]>")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Documentation:
    return Documentation(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def records(pages: Documentation) -> list[dict[str, Any]]:
    maker = Maker(pages.search)
    return [maker.conversation(random.Random(f"a test/{number}")) for number in range(COUNT)]


def turns_of(records: list[dict[str, Any]]) -> Iterator[tuple[set[str], dict[str, str]]]:
    """Every turn as bare texts, with the tools that are on; one that ends with its call has no results and no answer."""
    for record in records:
        on = {name for name, tool in TOOLS.items() if f"- {tool.title}: enabled." in record["meta_instruction"]}
        for turn in record["chat"].values():
            bare = {name: text.removeprefix(PARTS[name][0]).removesuffix(PARTS[name][1]) for name, text in turn.items()}
            yield on, bare if "Commands" in bare else {"Commands": "None", "Tool Responses": " None", **bare}


def plain(text: str) -> str:
    """A text without case and signs."""
    return "".join(char for char in text.lower() if char.isalnum())


def grams(text: str, language: Language) -> set[tuple[str, ...]]:
    """Words, or Chinese characters, and pairs of neighbours."""
    words = re.findall(r"\w+", text.lower()) if language == "en" else list(plain(text))
    return {*((word,) for word in words), *pairwise(words)}


def test_every_intent_is_whole() -> None:
    intents = read_intents()
    assert len(intents) > 60
    assert len({intent.name for intent in intents}) == len(intents)
    assert set(read_blocks("paraphrases.txt")) <= {intent.name for intent in intents}
    for intent in intents:
        for language in LANGUAGES:
            assert intent.fact[language].lower() in intent.say[language].lower(), intent.name
            assert intent.held[language] and (intent.ask[language] or intent.do[language]), intent.name


def test_a_question_has_one_meaning() -> None:
    meanings: dict[str, set[str]] = {}
    for intent in read_intents():
        for language in LANGUAGES:
            for pattern in (*intent.ask[language], *intent.held[language]):
                for text in expand(pattern):
                    meanings.setdefault(plain(text), set()).add(intent.name)
    assert [text for text, names in meanings.items() if len(names) > 1] == []


class Trained:
    """Questions that are trained, to look for those that are like another one.

    Args:
        questions: their texts.
    """

    def __init__(self, questions: Iterable[str], language: Language) -> None:
        self.language: Language = language
        self.texts = sorted(set(questions))
        self.sizes = [len(grams(text, language)) for text in self.texts]
        self.holders: dict[tuple[str, ...], list[int]] = {}
        for number, text in enumerate(self.texts):
            for gram in grams(text, language):
                self.holders.setdefault(gram, []).append(number)

    def nearest(self, text: str) -> tuple[float, str]:
        """The share of words and pairs of words that the most similar question has in common with a text, and it."""
        mine = grams(text, self.language)
        shared = Counter(number for gram in mine for number in self.holders.get(gram, ()))
        found = ((count / (len(mine) + self.sizes[number] - count), number) for number, count in shared.items())
        near, number = max(found, default=(0.0, 0))
        return near, self.texts[number]


def every_text(patterns: Iterable[str]) -> Iterator[str]:
    for pattern in patterns:
        yield from expand(pattern)


def test_held_back_questions_are_far_from_those_that_are_trained() -> None:
    for language in LANGUAGES:
        trained = Trained((text for intent in read_intents() for text in every_text(intent.ask[language])), language)
        for intent in read_intents():
            for held in every_text(intent.held[language]):
                near, text = trained.nearest(held)
                assert near < 0.7, f"{held!r} is held back, and {text!r} is trained"


@pytest.mark.parametrize("name", ["sums.txt", "equations.txt"])
def test_held_back_wordings_of_tasks_are_far_from_those_that_are_trained(name: str) -> None:
    for block in read_blocks(name).values():
        for language in LANGUAGES:
            trained = Trained(every_text(texts(block, "ask", language)), language)
            for held in every_text(texts(block, "held", language)):
                near, text = trained.nearest(held)
                assert near < 0.7, f"{held!r} is held back, and {text!r} is trained"


def held_wordings() -> Iterator[re.Pattern[str]]:
    """Everything that is held back, as patterns: questions, frames, wordings of tasks."""
    for intent in read_intents():
        for language in LANGUAGES:
            for pattern in intent.held[language]:
                yield from (re.compile(re.escape(text), re.IGNORECASE) for text in expand(pattern))
    for kind in ("do", "what"):
        for language in LANGUAGES:
            for frame in frames_of(kind, language, held=True):
                yield re.compile(re.escape(frame).replace(r"\{\}", ".+"), re.IGNORECASE)
    for name in ("sums.txt", "equations.txt"):
        for block in read_blocks(name).values():
            for language in LANGUAGES:
                for text in texts(block, "held", language):
                    yield re.compile(re.sub(r"\\{[a-z]\\}", ".+", re.escape(text)), re.IGNORECASE)


def test_no_held_back_wording_is_trained(records: list[dict[str, Any]]) -> None:
    asked = [turn["Human"] for _, turn in turns_of(records)]
    held = list(held_wordings())
    assert len(held) > 400
    found = [(text, pattern.pattern) for text in asked for pattern in held if pattern.fullmatch(text)]
    assert found == []


def test_numbers_of_training_and_evaluation_share_none(records: list[dict[str, Any]]) -> None:
    trained = [
        number
        for _, turn in turns_of(records)
        if any(call.name in ("Calculate", "Solve") for call in calls_of(turn["Commands"]))
        for number in NUMBER.findall(turn["Human"])
    ]
    assert len(trained) > 500
    assert [number for number in trained if is_held_back(number)] == []
    tasks = [question for question in make_questions() if question.is_task]
    asked = [number for question in tasks for number in NUMBER.findall(question.text)]
    assert [number for number in asked if len(number) > 1 and not is_held_back(number)] == []
    rng = random.Random(3)
    for held in (False, True):
        drawn = [str(draw(rng, held=held)) for _ in range(300)] + [draw_decimal(rng, held=held) for _ in range(100)]
        assert {is_held_back(number) for number in drawn if len(number) > 1} == {held}


def test_the_same_seed_gives_the_same_file(pages: Documentation, tmp_path: Path) -> None:
    maker = Maker(pages.search)
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        write_conversations(tmp_path / name, maker, numbers=range(20), seed=seed)
    one, two, other = ((tmp_path / name).read_bytes() for name in ("one", "two", "other"))
    assert one == two != other
    assert len([json.loads(line) for line in one.splitlines()]) == 20


def test_the_data_are_the_same_however_many_processes_write_them(tmp_path: Path) -> None:
    recipe = Recipe(conversations=41, validation=5)
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        make_data(folder, recipe, processes=processes)
        assert sorted(path.name for path in (folder / "data").iterdir()) == ["train.jsonl", "val.jsonl"]
    one, two = ((tmp_path / name / "data" / "train.jsonl").read_bytes() for name in "12")
    assert one == two
    assert one.count(b"\n") == 41


def test_fields_are_those_of_the_training_format(records: list[dict[str, Any]]) -> None:
    prompts = {system_prompt(FIELDS, names) for names, _ in TOOL_SETS}
    forms: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    for record in records:
        short = record["meta_instruction"] == system_prompt(README)
        assert short or record["meta_instruction"] in prompts
        forms["README" if short else "fields"] += 1
        assert list(record["chat"]) == [f"turn_{number}" for number in range(1, record["num_turns"] + 1)]
        *begun, last = record["chat"].values()
        for turn in (*begun, last):
            is_cut = turn is last and "MOSS" not in turn
            assert list(turn) == (["Human", "MOSS"] if short else CALL if is_cut else list(PARTS))
            for name, text in turn.items():
                tag, end = PARTS[name]
                assert text.startswith(tag) and text.endswith(end), text
                assert len(MARKERS.findall(text)) == 1, text
                assert len(text) > len(tag) + len(end), text
        if not last.get("Commands", "<|Commands|>: None<eoc>\n").endswith(" None<eoc>\n"):
            ends["answer" if "MOSS" in last else "call"] += 1
        else:
            assert "MOSS" in last, "only what is called is left without its results"
    assert min(forms.values()) > COUNT / 5, forms
    assert min(ends["answer"], ends["call"]) > COUNT / 20, ends


def check_results(commands: str, results: str, pages: Documentation) -> None:
    """They are what the tools say; of a search's hits some, at least one, or parts of them, in their order."""
    if not commands.startswith("Search("):
        assert results == results_of(commands)
        return
    (query,) = parse_commands(commands).calls[0].arguments
    shown = [Hit(ast.literal_eval(text)) for text in re.findall(r"^<\|\d\|>: (.+)$", results, re.MULTILINE)]
    assert results == results_of(commands, {query: shown}.__getitem__)
    hits = (hit.text.replace("<|", "< |") for hit in pages.search(query))  # results hold no tags
    assert all(any(one.text in text for text in hits) for one in shown), results
    assert shown or not pages.search(query)


def test_every_turn_says_what_the_tools_say(records: list[dict[str, Any]], pages: Documentation) -> None:
    seen: Counter[str] = Counter()
    for on, turn in turns_of(records):
        if turn["Commands"] == "None":
            assert turn["Tool Responses"].strip() == "None"
            continue
        understood = parse_commands(turn["Commands"])
        assert not understood.skipped and understood.calls, turn["Commands"]
        assert ", ".join(call.text for call in understood.calls) == turn["Commands"]
        assert {TOOL_OF[call.name] for call in understood.calls} <= on, f"{turn['Commands']} with {on}"
        if "MOSS" not in turn:
            continue
        check_results(turn["Commands"], turn["Tool Responses"].strip("\n "), pages)
        seen.update(call.name for call in understood.calls)
        for number in re.findall(r"<sup><\|(\d)\|></sup>", turn["MOSS"]):
            assert f"<|{number}|>: " in turn["Tool Responses"]
            seen["cited"] += 1
    assert all(seen[name] > 2 for name in ("Calculate", "Solve", "Search", "cited")) and seen["Text2Image"], seen


def test_results_are_those_of_the_toolbox(records: list[dict[str, Any]]) -> None:
    sandbox = Sandbox()
    box = ToolBox([tool for name, tool in moss_tools(box=sandbox).items() if name in ("calc", "solve")])
    turns = [turn for _, turn in turns_of(records) if turn["Commands"].startswith(("Calculate", "Solve"))]
    turns = [turn for turn in turns if "MOSS" in turn]
    try:
        for turn in turns[:12]:
            assert joined(ran.block for ran in box.run(turn["Commands"])) == turn["Tool Responses"].strip("\n ")
    finally:
        sandbox.close()


def test_what_follows_a_result_goes_on_with_it_or_begins_anew(records: list[dict[str, Any]]) -> None:
    seen: Counter[str] = Counter()
    for record in records:
        for before, turn in pairwise(record["chat"].values()):
            result = re.search(r"(?:result is|结果是) ([\d.]+?)[.。]?<eom>", before["MOSS"])
            called = re.search(r'Calculate\("(.+)"\)<eoc>', turn.get("Commands", ""))
            if result and called:
                seen["goes on" if result[1] in NUMBER.findall(called[1]) else "begins anew"] += 1
    assert min(seen["goes on"], seen["begins anew"]) > 50, seen


def test_rough_questions_keep_what_they_ask() -> None:
    rng = random.Random(4)
    for _ in range(200):
        assert plain("Where is the model?") in plain(wrapped(rng, "Where is the model?", "en"))
        assert "模型在哪里" in wrapped(rng, "模型在哪里？", "zh")
        words = noisy(rng, "one two three", "en").split()
        assert [word for word in words if word in ("one", "two", "three")] == ["one", "two", "three"]
        assert len(words) <= 4
        assert "--memory" in reworded(rng, "What does --memory do?", "en")
        left = thinned(rng, "one two three four five six", "en").split()
        assert 1 <= len(left) <= 6 and set(left) <= {"one", "two", "three", "four", "five", "six"}
        assert set(thinned(rng, "怎么用moss-jt聊天呢", "zh")) <= set("怎么用moss-jt聊天呢")
        assert thinned(rng, "one two", "en") == "one two"
        assert rough(rng, "?", "zh")
    said = {reworded(rng, "Find the folder.", "en") for _ in range(200)}
    assert {"Find the folder.", "Find the directory."} < said


def test_a_mixed_question_has_words_of_several() -> None:
    rng = random.Random(5)
    numbers, letters = {"one", "two", "three", "four"}, {"a", "b", "c", "d"}
    questions = [" ".join(sorted(numbers)), " ".join(sorted(letters))]
    asked = [mixed(rng, partial(rng.choice, questions), "en").split() for _ in range(300)]
    assert all(2 <= len(words) <= 15 and set(words) <= numbers | letters for words in asked)
    assert sum(1 for words in asked if set(words) & numbers and set(words) & letters) > 150
    chinese = [mixed(rng, partial(rng.choice, ["怎么用moss-jt聊天呢", "如何说话"]), "zh") for _ in range(100)]
    assert any("moss-jt" in text for text in chinese), "a word in Latin letters is one"
    assert not any(char.isascii() for text in chinese for char in text.replace("moss-jt", ""))


def test_a_thought_says_what_is_done_with_which_number() -> None:
    assert thought("divide", "{a} by {b}?", "en") == "I need the calculator to divide the first number by the second."
    assert (
        thought("divide", "{b} share {a}.", "en") == "I need the calculator to divide the second by the first number."
    )
    assert (
        thought("some-both", "{c}: {a}, {b}", "zh") == "需要用方程求解器：未知数乘以第二个数再加第三个数等于第一个数。"
    )
    assert len(set(thoughts())) == len(thoughts()) > 70
    for kind in (*KINDS, *FOLLOWING):
        for language in LANGUAGES:
            for pattern in texts(read_blocks("sums.txt")[kind], "ask", language):
                for text in expand(pattern):
                    assert thought(kind, text, language) in thoughts(), text


def test_what_may_be_swapped_is_called_in_the_order_of_the_question() -> None:
    values = {"a": "11", "b": "22"}
    called = {
        text: task_in_words("sums.txt", kind, text, values, "en").command
        for kind, text in (
            ("add", "{a} and {b}"),
            ("add", "to {b} add {a}"),
            ("multiply", "{b} times {a}"),
            ("percent", "of {b} take {a}%"),
            ("subtract", "{b} from {a}"),
            ("divide", "{b} into {a}"),
        )
    }
    wanted = ("11+22", "22+11", "22*11", "22*11/100", "11-22", "11/22")
    assert list(called.values()) == [f'Calculate("{expression}")' for expression in wanted]


def test_every_task_is_thought_about(records: list[dict[str, Any]]) -> None:
    seen: Counter[str] = Counter()
    for _, turn in turns_of(records):
        name, _, rest = turn["Commands"].partition('("')
        if name not in ("Calculate", "Solve"):
            continue
        assert turn["Inner Thoughts"] in thoughts(), turn
        first, second = (
            re.search(text, turn["Inner Thoughts"])
            for text in (
                r"divide the first number by the second\.|把第一个数除以第二个数",
                r"divide the second by|把第二个数除以",
            )
        )
        if first or second:
            a, b = rest.removesuffix('")').split("/")
            written = NUMBER.findall(turn["Human"])
            assert written.index(a) <= written.index(b) if first else written.index(b) <= written.index(a), turn
            seen["first" if first else "second"] += 1
    assert min(seen["first"], seen["second"]) >= 3, seen


def test_a_wording_of_parts_is_none_that_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moss_tiny.sums.PIECED", 1.0)
    rng, made = random.Random(6), 0
    for file, kinds in (("sums.txt", (*KINDS, *FOLLOWING)), ("equations.txt", STORIES)):
        for kind in kinds:
            for language in LANGUAGES:
                block = read_blocks(file)[kind]
                written = {plain(text) for pattern in texts(block, "ask", language) for text in expand(pattern)}
                held = {plain(text) for pattern in texts(block, "held", language) for text in expand(pattern)}
                for _ in range(150):
                    pieced = story(rng, file, kind, language, held=False)
                    assert plain(pieced) not in held
                    made += plain(pieced) not in written
                    (command,) = texts(block, "command", language)
                    assert set(PLACE.findall(pieced)) == set(PLACE.findall(command)) - {"{r}"}, pieced
    assert made > 1000


def test_other_words_around_a_formula_leave_it_whole() -> None:
    rng = random.Random(2)
    cases: tuple[tuple[str, str, Language], ...] = (
        ("Please solve x + 24 = 56 for me", "ten green x bottles 7 - 2", "en"),
        ("请解方程x + 24 = 56，谢谢", "绿色的 x 瓶子 7-2", "zh"),
    )
    for question, other, language in cases:
        said = {blurred_around(rng, question, partial(str, other), language) for _ in range(600)}
        assert len(said) > 100, "words are left out, replaced, or come first"
        assert all(text.count("x + 24 = 56") == 1 and "7" not in text and "-" not in text for text in said)
        assert any(not text.startswith(question[:2]) for text in said)
    assert blurred_around(rng, "x=4", lambda: "7 x", "en") == "x=4", "there is no word"


def test_a_formula_is_known_however_it_is_written() -> None:
    for question, command, is_formula in (
        ("what is 37 x 489?", 'Calculate("37*489")', True),
        ("12 ÷ 5 and 3+4", 'Calculate("12/5"), Calculate("3+4")', True),
        ("x + y = 3; x-y=1", 'Solve("x+y=3;x-y=1")', True),
        ("37 times 489", 'Calculate("37*489")', False),
        ("What plus 5 = 20?", 'Solve("x+5=20")', False),
    ):
        assert is_written(Task(question, command)) == is_formula, question


def test_a_blurred_task_keeps_its_numbers() -> None:
    rng = random.Random(7)
    said = [blurred(rng, "There are 12 rows of 3.5 chairs.", lambda: "ten green 7 bottles", "en") for _ in range(400)]
    assert all(NUMBER.findall(text) == ["12", "3.5"] for text in said)
    assert any("green" in text for text in said)
    assert any(len(text.split()) < 7 for text in said)
    assert said.count("There are 12 rows of 3.5 chairs.") > 200
    chinese = [blurred(rng, "有12排椅子，每排3把", lambda: "绿色的瓶子", "zh") for _ in range(400)]
    assert all(NUMBER.findall(text) == ["12", "3"] for text in chinese)
    assert any("绿" in text for text in chinese)
    beside = [blurred(rng, "把6和41的商算出来", lambda: "绿", "zh") for _ in range(400)]
    assert all(NUMBER.findall(text) == ["6", "41"] for text in beside), "two never become one"
    assert len(set(beside)) > 1


def test_what_was_reported_is_what_is_asked() -> None:
    lines = (RESULTS / "questions.jsonl").read_text("utf-8").splitlines()
    asked = [(question["text"], question["wanted"]) for question in map(json.loads, lines)]
    assert asked == [(question.text, question.wanted) for question in make_questions()]


def test_the_evaluation_has_200_questions() -> None:
    questions = make_questions()
    assert Counter(question.kind for question in questions) == COUNTS
    assert sum(COUNTS.values()) == 200
    assert questions == make_questions(), "always the same"
    assert {question.language for question in questions} == set(LANGUAGES)
    assert len({question.text for question in questions}) == 200

    def talk(found: list[Question]) -> set[str]:
        return {question.text for question in found if not question.is_task}

    assert talk(questions).isdisjoint(talk(make_questions("trial")))


@pytest.mark.parametrize(
    ("commands", "wanted", "same"),
    [
        ('Calculate("37*489")', 'Calculate("37*489")', True),
        ('Calculate("37 * 489")', 'Calculate("37*489")', True),
        ('Calculate("489*37")', 'Calculate("37*489")', True),
        ('Calculate("489-37")', 'Calculate("37-489")', False),
        ('Calculate("37*498")', 'Calculate("37*489")', False),
        ('Calculate("18093")', 'Calculate("37*489")', False),
        ('Calculate("37*489"), Calculate("1+1")', 'Calculate("37*489")', False),
        ("None", 'Calculate("37*489")', False),
        ("", 'Solve("x=1")', False),
        ('Solve("x-y=4;x+y=10")', 'Solve("x+y=10;x-y=4")', True),
        ('Solve("x+y=10, x - y = 4")', 'Solve("x+y=10;x-y=4")', True),
        ('Solve("x+y=10;x-y=5")', 'Solve("x+y=10;x-y=4")', False),
        ('Calculate("x+1=2")', 'Solve("x+1=2")', False),
        ('Calculate("1/0")', 'Calculate("0/1")', False),
    ],
)
def test_scorer_knows_the_same_call(commands: str, wanted: str, same: bool) -> None:
    assert is_same_call(commands, wanted) is same
