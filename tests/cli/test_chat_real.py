"""`moss-jt chat` and `generate` as a user runs them: real Jittor, a real network of random weights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from terminal import CTRL_C, ROOT, Terminal

from moss_jt.chat import ChatSession, Finished, TextDelta
from moss_jt.config import GenerationConfig
from moss_jt.converters.synth import preset_config, synthesize
from moss_jt.template import Template

pytestmark = pytest.mark.usefixtures("compiled")
GREEDY = ["--greedy", "--repetition-penalty", "1.0", "--system", "Be brief."]  # this model then goes on for ever
HUMAN = "a question"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of random weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    synthesize(preset_config("tiny"), folder)
    return folder


@pytest.fixture
def compiled(jittor: ModuleType) -> None:
    """Jittor and the kernels are compiled before a clock runs."""
    from moss_jt.launch import warm_up

    warm_up()


@pytest.fixture
def chat(compiled: None, model_folder: Path, tmp_path: Path) -> Iterator[Terminal]:
    """A chat with it, at its first prompt."""
    terminal = Terminal(tmp_path, ["-m", "moss_jt.cli", "chat", "--model", str(model_folder), *GREEDY])
    assert "float16, 4 x 256, up to 2048 tokens, on cpu" in terminal.await_prompt()
    yield terminal
    terminal.child.close(force=True)


def moss_jt(*arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    """Run the program in a pipe."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "moss_jt.cli", *arguments]
    return subprocess.run(
        line, input=typed, capture_output=True, encoding="utf-8", env=variables, timeout=300, check=False
    )


def answer_in(shown: str) -> str:
    """The text after MOSS's name."""
    return shown.partition("MOSS: ")[2].split("(")[0].strip()


def test_stream_ctrl_c_clear_retry_stop(chat: Terminal) -> None:
    chat.say("/set max_new_tokens 40")
    first = answer_in(chat.say(HUMAN))
    assert len(first) > 20
    assert answer_in(chat.say("/retry")) == first, "greedy: the same prompt has the same answer"
    chat.say("/set max_new_tokens 1900")
    chat.type(HUMAN + "\r")
    chat.see("MOSS: ")
    chat.type(CTRL_C)
    assert "(stopped; /continue goes on, /retry answers anew)" in chat.await_prompt()
    stats = chat.say("/stats")
    assert re.search(r"turns +2\n", stats)
    assert re.search(r"last answer +\d+ tokens, \d+\.\d tokens/s", stats)
    chat.type("clear\r")
    chat.see("Everything said is forgotten.")
    chat.await_prompt()
    chat.say("/set max_new_tokens 40")
    assert answer_in(chat.say(HUMAN)) == first, "nothing of before is left"
    chat.type("stop\r")
    assert chat.end().endswith("Good-bye.\n")


def test_second_turn_computes_only_what_is_new(chat: Terminal) -> None:
    chat.say("/set max_new_tokens 30")
    chat.say(HUMAN)
    chat.say("and more")
    known = re.search(r"last prompt +(\d+) tokens, (\d+) of them known", chat.say("/stats"))
    assert known is not None
    prompt, reused = int(known[1]), int(known[2])
    opening = len("<|Human|>: and more") + 1 + len("\n<|MOSS|>:")  # this tokenizer has a token a byte
    closing = 2
    assert prompt - reused == 1 + closing + opening, "the last token of the answer, the end of the turn, the new one"


def test_without_a_model_moss_tiny_answers_in_both_languages() -> None:
    done = moss_jt("chat", "--greedy", typed="Who are you?\n你是谁？\nstop\n")
    assert done.returncode == 0, done.stderr
    assert "this is moss-tiny" in done.stderr
    assert "moss-jt pull fnlp/moss-moon-003-sft-int4" in done.stderr, "how to get the real one"
    english, chinese = done.stdout.strip().splitlines()
    assert "moss-tiny" in english and "moss-tiny" in chinese
    assert english.isascii() and re.search("[\u4e00-\u9fff]", chinese)
    assert "\x1b" not in done.stdout + done.stderr
    again = moss_jt("chat", "--lang", "zh", typed="")
    assert "当前是随 moss-jt 附带的 moss-tiny" in again.stderr


@pytest.mark.parametrize("number", [0, 1, 2])
def test_generate_gives_the_tokens_of_the_original(golden: Path, number: int) -> None:
    expected = np.load(golden / "tiny-fp" / "expected.npz")
    prompt = ",".join(map(str, expected[f"greedy_{number}_prompt"]))
    model = str(golden / "tiny-fp" / "safetensors-fp16")
    options = ["--greedy", "--repetition-penalty", "1.0", "--max-new-tokens", "40", "--compute", "exact", "--json"]
    done = moss_jt("generate", "--model", model, "--ids", prompt, *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ids"] == expected[f"greedy_{number}_out"].tolist()


def test_a_session_over_the_real_engine(model_folder: Path) -> None:
    """A conversation with all reuse gives the tokens of one that starts from nothing."""
    from moss_jt.engine import Engine
    from moss_jt.load import load_model

    model = load_model(model_folder)
    config = GenerationConfig(do_sample=False, max_new_tokens=24)

    def talk(session: ChatSession, text: str) -> tuple[str, Finished]:
        events = list(session.reply(text))
        finished = events[-1]
        assert isinstance(finished, Finished)
        return "".join(event.text for event in events if isinstance(event, TextDelta)), finished

    def make() -> ChatSession:
        return ChatSession(Engine(model), model.tokenizer, Template("readme"), system="Be brief.", config=config)

    session = make()
    talk(session, "one")
    second, finished = talk(session, "two")
    assert finished.stats.reused_tokens > 0
    fresh = make()
    fresh._turns = list(session.turns[:1])  # the same ids, and nothing in the cache
    anew, finished = talk(fresh, "two")
    assert finished.stats.reused_tokens == 0
    assert anew == second


def test_ctrl_c_inside_the_engine_leaves_a_conversation_that_goes_on(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moss_jt.engine import Engine
    from moss_jt.load import load_model

    model = load_model(model_folder)
    engine = Engine(model)
    config = GenerationConfig(do_sample=False, max_new_tokens=12)
    session = ChatSession(engine, model.tokenizer, Template("readme"), system="Be brief.", config=config)
    whole = "".join(event.text for event in session.reply("one") if isinstance(event, TextDelta))
    session.clear()
    layers = 0

    def interrupt(_layer: int) -> None:
        nonlocal layers
        layers += 1
        if layers == 4 * model.config.n_layer + 2:  # in the middle of a later pass
            raise KeyboardInterrupt

    monkeypatch.setattr(engine.runner, "on_layer", interrupt)
    events = list(session.reply("one"))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.kept) == ("cancelled", True)
    shown = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert 0 < len(shown) < len(whole)
    monkeypatch.undo()
    rest = "".join(event.text for event in session.continue_answer() if isinstance(event, TextDelta))
    assert (shown + rest).startswith(whole), "as if nothing had happened"


def test_with_tools_the_real_engine_computes_only_the_results(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens are a script; the network, its cache and what is reused of it are real."""
    from moss_jt.engine import Engine
    from moss_jt.load import load_model
    from moss_jt.tools import Tool, ToolBox

    model = load_model(model_folder)
    tokenizer = model.tokenizer
    thoughts = [*tokenizer.encode(" hm"), tokenizer.marker("<eot>"), *tokenizer.encode('\n<|Commands|>: Echo("a")')]
    first = [*thoughts, tokenizer.marker("<eoc>")]
    script = iter([*first, *tokenizer.encode(" a, it says."), tokenizer.marker("<eom>")])
    monkeypatch.setattr("moss_jt.sampling.choose", lambda *_: (next(script), -1.0))
    echo = ToolBox([Tool("echo", "Echo", "Echo(text)", lambda text: text * 3)])
    session = ChatSession(Engine(model), tokenizer, Template("fields"), system="Be brief.", tools=echo)
    events = list(session.reply("Say it."))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert session.turns[0].answer == "a, it says."
    opening = [*tokenizer.encode("Be brief.\n<|Human|>: Say it."), 0, *tokenizer.encode("\n<|Inner Thoughts|>:")]
    assert finished.stats.reused_tokens == len(opening) + len(first) - 1, (
        "all but the end marker, which nobody had read"
    )
    results = [*tokenizer.encode('\n<|Results|>:\nEcho("a") =>\naaa\n'), 0, *tokenizer.encode("\n<|MOSS|>:")]
    assert finished.stats.prompt_tokens - finished.stats.reused_tokens == 1 + len(results)
