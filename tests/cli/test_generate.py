"""`moss-jt generate` with a scripted model: text, JSON, prompts as text and as ids, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from scripted_model import TOKENIZER, BlockingEngine, install, make_engine, make_model

from moss_jt.cli.main import exit_code_of, make_group
from moss_jt.errors import ConfigError
from moss_jt.language import set_language
from moss_jt.tokenizer import load_tokenizer

Generate = Callable[..., Result]


@pytest.fixture
def engine() -> BlockingEngine:
    return make_engine(["one 二 three"])


@pytest.fixture
def generate(engine: BlockingEngine, monkeypatch: pytest.MonkeyPatch) -> Generate:
    """Run `moss-jt generate` with some options."""
    install(engine, monkeypatch.setattr)

    def run(*options: str, typed: str = "") -> Result:
        return CliRunner().invoke(make_group(), ["generate", "--model", str(TOKENIZER), *options], input=typed)

    return run


def test_text_goes_to_stdout_as_it_is(generate: Generate, engine: BlockingEngine) -> None:
    result = generate("--prompt", "Say it:")
    assert (result.exit_code, result.stdout) == (0, " one 二 three\n")
    assert "up to 2048 tokens" in result.stderr
    tokenizer = load_tokenizer(TOKENIZER)
    assert list(engine.requests[0].ids) == tokenizer.encode("Say it:"), "no system prompt, no tags"
    assert engine.requests[0].config.stop_ids == (tokenizer.marker("<eom>"),)
    assert engine.requests[0].conversation is None


def test_json_holds_ids_text_reason_counts_and_seconds(generate: Generate) -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    result = generate("--ids", "5,6, 7", "--json")
    assert len(result.stdout.splitlines()) == 1
    values = json.loads(result.stdout)
    assert values["ids"] == [*tokenizer.encode(" one 二 three"), tokenizer.marker("<eom>")]
    assert values["text"] == " one 二 three"
    assert (values["reason"], values["prompt_tokens"], values["new_tokens"]) == ("stop", 3, len(values["ids"]))
    assert set(values["seconds"]) == {"load", "prefill", "decode"}
    assert values["tokens_per_s"] == len(values["ids"]) - 1, "the scripted engine says that it took one second"
    assert "二" in result.stdout, "readable, not escaped"


def test_ids_are_the_prompt(generate: Generate, engine: BlockingEngine) -> None:
    generate("--ids", "5,6,7", "--greedy", "--max-new-tokens", "2", "--repetition-penalty", "1.0", "--seed", "9")
    request = engine.requests[0]
    assert request.ids == (5, 6, 7)
    config = request.config
    assert (config.greedy, config.max_new_tokens, config.repetition_penalty, config.seed) == (True, 2, 1.0, 9)


def test_the_limit_of_length_is_the_reason(generate: Generate) -> None:
    values = json.loads(generate("--ids", "5", "--json", "--max-new-tokens", "2").stdout)
    assert (values["reason"], values["new_tokens"], len(values["ids"])) == ("length", 2, 2)


def test_a_dash_reads_stdin(generate: Generate, engine: BlockingEngine) -> None:
    generate("--prompt", "-", typed="from a\npipe\n")
    assert load_tokenizer(TOKENIZER).decode(engine.requests[0].ids) == "from a\npipe\n"


def test_markers_are_text_unless_asked_for(generate: Generate, engine: BlockingEngine) -> None:
    marker = load_tokenizer(TOKENIZER).marker("<eoh>")
    generate("--prompt", "a<eoh>")
    generate("--prompt", "a<eoh>", "--markers")
    assert marker not in engine.requests[0].ids
    assert engine.requests[1].ids[-1] == marker


def test_stop_strings_reach_the_engine(generate: Generate, engine: BlockingEngine) -> None:
    generate("--prompt", "a", "--stop", "\n\n", "--stop", "END")
    assert engine.requests[0].config.stop_strings == ("\n\n", "END")


def test_without_a_tokenizer_ids_go_in_and_out(
    engine: BlockingEngine, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moss_jt.load

    def load_model(path: Path, **_options: Any) -> Any:
        model = make_model(path)
        model.has_tokenizer, model.tokenizer = False, None
        return model

    monkeypatch.setattr(moss_jt.load, "load_model", load_model)
    engine.scripts[0] = (8, 9, engine.last)
    values = json.loads(generate("--ids", "5", "--json", "--max-new-tokens", "3").stdout)
    assert (values["ids"], values["text"]) == ([8, 9, engine.last], None)
    assert engine.requests[0].config.stop_ids == (make_model(TOKENIZER).config.eos_token_id,)
    engine.scripts.append((8, 9))
    assert generate("--ids", "5", "--max-new-tokens", "2").stdout == "8 9 \n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give either --prompt or --ids."),
        (["--prompt", "a", "--ids", "1"], "give either --prompt or --ids."),
        (["--ids", "1,x"], "--ids takes whole numbers with commas between, not 'x'."),
        (["--ids", "1,,2"], "not ''"),
        (["--ids", "-1"], "not '-1'"),
        (["--ids", "²"], "not '²'"),
        (["--ids", "1", "--host-share", "1.5"], "1.5 is not in the range 0<=x<=1"),
        (["--ids", "1", "--host-share", "most"], "'most' is not a valid float range"),
    ],
)
def test_wrong_use_is_told_with_2(generate: Generate, options: list[str], words: str) -> None:
    result = generate(*options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(("given", "share"), [((), 0.0), (("0.25",), 0.25), (("auto",), "auto")])
def test_a_share_of_the_host_reaches_loading(
    given: tuple[str, ...], share: float | str, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float | str] = []

    def load_model(*_: Any, host_share: float | str, **__: Any) -> None:
        asked.append(host_share)
        raise ConfigError("that is enough")

    monkeypatch.setattr("moss_jt.load.load_model", load_model)
    generate("--ids", "1", *(("--host-share", *given) if given else ()))
    assert asked == [share]


def test_an_option_that_cannot_work_is_one_line(generate: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    code = exit_code_of(make_group(), ["generate", "--model", str(TOKENIZER), "--ids", "1", "--max-new-tokens", "0"])
    assert code == 1
    assert capsys.readouterr().err == "moss-jt: max_new_tokens is 0; it must be at least 1.\n"


def test_ctrl_c_ends_with_130_and_what_was_there_is_shown(
    generate: Generate, engine: BlockingEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.interrupts = {(0, 1)}
    assert exit_code_of(make_group(), ["generate", "--model", str(TOKENIZER), "--ids", "1"]) == 130
    shown = capsys.readouterr()
    assert shown.out == " one\n"[: len(shown.out) - 1] + "\n"
    assert shown.err.endswith("Interrupted.\n")


def test_chinese(generate: Generate) -> None:
    set_language("zh")
    result = generate("--lang", "zh")
    assert "请给出 --prompt 或 --ids 之一。" in result.stderr
