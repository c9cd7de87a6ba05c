"""The model that comes with the package: whole, small, licensed, and it answers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from moss_jt import paths
from moss_jt.chat import ChatSession, TextDelta
from moss_jt.config import GenerationConfig, MossConfig
from moss_jt.converters.verify import verify
from moss_jt.hub import resolve_model
from moss_jt.template import choose_template, system_prompt
from moss_jt.tokenizer import load_tokenizer
from moss_jt.tools.backends import moss_tools
from moss_jt.tools.index import LocalIndex
from moss_jt.tools.sandbox import Sandbox
from moss_jt.tools.search import search_tool
from moss_jt.tools.toolbox import ToolBox

FOLDER = paths.embedded_model()
ROOT = Path(__file__).parent.parent
LARGEST = 12_000_000  # bytes in the wheel
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=120)


def test_it_has_a_name_but_a_folder_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model("moss-tiny") == FOLDER
    (tmp_path / "moss-tiny").mkdir()
    assert resolve_model("moss-tiny") == Path("moss-tiny")


def test_every_byte_is_as_it_was_written_and_there_are_few() -> None:
    verify(FOLDER)
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < LARGEST
    assert {"LICENSE", "MODEL_CARD.md", "origin.json", "tokenizer.model"} <= {file.name for file in files}


def test_it_is_int8_and_its_tokenizer_fits() -> None:
    config = MossConfig.from_file(FOLDER / "config.json")
    assert config.quantization is not None and config.quantization.bits == 8
    assert config.head_quantization is not None and config.head_quantization.bits == 8
    assert config.name.startswith("moss-tiny")
    assert GenerationConfig.for_model(config).greedy, "its best token is right more often than a draw"
    tokenizer = load_tokenizer(FOLDER)
    assert tokenizer.vocab_size <= config.vocab_size
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    text = system_prompt(choose_template("auto", config))
    assert len(tokenizer.encode(text)) == text.count("\n"), "each line of the prompt is one piece"


def answer(session: ChatSession, text: str) -> str:
    return "".join(event.text for event in session.reply(text) if isinstance(event, TextDelta))


@pytest.mark.usefixtures("jittor")
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("Who are you?", "moss-tiny"),
        ("你是谁？", "moss-tiny"),
        ("How do I limit the memory?", "--memory"),
        ("怎么限制内存？", "--memory"),
        ("How do I download MOSS?", "moss-jt pull"),
        ("真正的MOSS从哪里来？", "moss-jt pull"),
        ("What is 37 times 489?", "--tools calc"),
    ],
)
def test_it_answers_what_it_was_trained_on(asked: str, told: str) -> None:
    from moss_jt.engine import Engine
    from moss_jt.load import load_model

    model = load_model(FOLDER, compute="fast", device="cpu")
    form = choose_template("auto", model.config)
    session = ChatSession(Engine(model), model.tokenizer, form, config=GREEDY)
    assert told in answer(session, asked)


def test_it_calls_the_calculator_and_the_solver(jittor: ModuleType) -> None:
    from moss_jt.engine import Engine
    from moss_jt.load import load_model

    model = load_model(FOLDER, compute="fast", device="cpu")
    sandbox = Sandbox()
    try:
        box = ToolBox([tool for name, tool in moss_tools(box=sandbox).items() if name in ("calc", "solve")])
        form = choose_template("auto", model.config, tools=True)
        session = ChatSession(Engine(model), model.tokenizer, form, config=GREEDY, tools=box)
        assert "42" in answer(session, "What is 6 times 7?")
        assert "84" in answer(session, "and times 2?")
        assert "x = 5" in answer(session, "解方程3x+5=20")
    finally:
        sandbox.close()


def test_it_calls_tools_in_both_languages(jittor: ModuleType) -> None:
    """Calculations, equations, two calls in a turn; where nothing is indexed, what it knows, without a source."""
    from moss_jt.engine import Engine
    from moss_jt.load import load_model

    model = load_model(FOLDER, compute="fast", device="cpu")
    sandbox = Sandbox()
    try:
        box = ToolBox([tool for name, tool in moss_tools(box=sandbox).items() if name != "draw"])
        form = choose_template("auto", model.config, tools=True)
        for asked, commands, told in (
            ("What is 37 times 489?", 'Calculate("37*489")', "18093"),
            ("37乘以489等于多少？", 'Calculate("37*489")', "18093"),
            ("Solve 3x+5=20", 'Solve("3x+5=20")', "x = 5"),
            ("解方程3x+5=20", 'Solve("3x+5=20")', "x = 5"),
            ("Calculate 12+7 and 30*4", 'Calculate("12+7"), Calculate("30*4")', "19"),
            ("12+7和30*4等于多少？", 'Calculate("12+7"), Calculate("30*4")', "120"),
            ("How do I convert weights?", 'Search("convert a checkpoint")', "hf2jittor"),
            ("怎么限制内存？", 'Search("限制内存")', "--memory"),
        ):
            session = ChatSession(Engine(model), model.tokenizer, form, config=GREEDY, tools=box)
            said = answer(session, asked)
            tools = session.turns[-1].tools
            assert tools is not None and tools.commands == commands
            assert told in said, (asked, said)
            assert ("No result." in tools.results) == commands.startswith("Search")
            assert "<sup>" not in said, "nothing was found that could be cited"
    finally:
        sandbox.close()


def test_it_searches_the_documentation_and_names_its_source(jittor: ModuleType, tmp_path: Path) -> None:
    """In both languages: its own search words, over the product's pages; what it cites holds what it says.

    It leaves the mark out now and then: of all its queries whose hits hold the fact it names 48 of 55 rightly.
    """
    from moss_jt.engine import Engine
    from moss_jt.load import load_model

    pages = tmp_path / "pages"
    pages.mkdir()
    for page in (ROOT / "README.md", ROOT / "README.zh.md", ROOT / "docs" / "cli.md"):
        shutil.copy(page, pages)
    index = LocalIndex(tmp_path / "index.sqlite")
    index.add(pages)
    model = load_model(FOLDER, compute="fast", device="cpu")
    form = choose_template("auto", model.config, tools=True)
    sandbox = Sandbox()
    try:
        others = [tool for name, tool in moss_tools(box=sandbox).items() if name in ("calc", "solve")]
        box = ToolBox([search_tool(index), *others])
        named = 0
        for asked, told in (
            ("How do I limit the memory?", "--memory"),
            ("How do I quantize a model?", "moss-jt quantize"),
            ("How do I convert a checkpoint?", "hf2jittor"),
            ("怎么限制内存？", "--memory"),
            ("怎么下载真正的MOSS？", "moss-jt pull"),
        ):
            session = ChatSession(Engine(model), model.tokenizer, form, config=GREEDY, tools=box)
            assert told in answer(session, asked)
            turn = session.turns[-1]
            assert turn.tools is not None and turn.tools.commands.startswith('Search("'), (asked, turn)
            sources = {source.number: source for source in turn.tools.sources}
            for cited in re.findall(r"<sup><\|(\d)\|></sup>", turn.answer):
                assert told in sources[int(cited)].text, (asked, sources)
                assert sources[int(cited)].title, "a document of the folder"
                named += 1
        assert named >= 4, "of five"
    finally:
        sandbox.close()
