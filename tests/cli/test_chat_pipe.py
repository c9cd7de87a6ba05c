"""`moss-jt chat` in a pipe, with a scripted model: what goes to stdout, what to stderr, the exit code."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import scripted_model
from click.testing import CliRunner, Result
from scripted_model import TOKENIZER, BlockingEngine, install, make_engine

from moss_jt import paths
from moss_jt.cli.chat_input import PipeInput
from moss_jt.cli.main import exit_code_of, make_group
from moss_jt.config import MossConfig, Sampling
from moss_jt.language import set_language

ROOT = Path(__file__).parent.parent.parent

Chat = Callable[..., Result]


@pytest.fixture
def engine() -> BlockingEngine:
    return make_engine(["Hello there.", "Second.", "Third.", "Fourth."])


@pytest.fixture
def chat(engine: BlockingEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Chat:
    """Run `moss-jt chat` with some input."""
    install(engine, monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)

    def run(typed: str, *options: str) -> Result:
        arguments = ["chat", "--model", str(TOKENIZER), "--system", "Be brief.", *options]
        return CliRunner().invoke(make_group(), arguments, input=typed)

    return run


def prompt_of(engine: BlockingEngine, number: int) -> str:
    """The text that a request sent to the model."""
    from moss_jt.tokenizer import load_tokenizer

    return load_tokenizer(TOKENIZER).decode(engine.requests[number].ids)


def test_answers_go_to_stdout_and_nothing_else_does(chat: Chat) -> None:
    result = chat("hi\nmore\nstop\n")
    assert result.exit_code == 0
    assert result.stdout == "Hello there.\nSecond.\n"
    assert "float16, 2 x 64, up to 2048 tokens, on cpu" in result.stderr
    assert "\x1b" not in result.output


def test_stop_ends_the_chat_and_later_lines_are_not_read(chat: Chat, engine: BlockingEngine) -> None:
    assert chat("hi\n stop \nmore\n").stdout == "Hello there.\n"
    assert len(engine.requests) == 1


def test_the_end_of_the_pipe_ends_the_chat(chat: Chat) -> None:
    result = chat("hi")
    assert (result.exit_code, result.stdout) == (0, "Hello there.\n")


def test_empty_lines_are_passed_over(chat: Chat, engine: BlockingEngine) -> None:
    assert chat("\n  \n\nhi\n").stdout == "Hello there.\n"
    assert len(engine.requests) == 1


def test_a_backslash_joins_lines_into_one_message(chat: Chat, engine: BlockingEngine) -> None:
    chat("def f():\\\n    return 1\\\n\nnext\\")
    assert prompt_of(engine, 0).endswith("<|Human|>: def f():\n    return 1\n<eoh>\n<|MOSS|>:")
    assert prompt_of(engine, 1).endswith("<|Human|>: next<eoh>\n<|MOSS|>:")


def test_clear_forgets_what_was_said(chat: Chat, engine: BlockingEngine) -> None:
    result = chat("hi\nclear\nagain\n")
    assert result.stdout == "Hello there.\nSecond.\n"
    assert prompt_of(engine, 1) == "Be brief.\n<|Human|>: again<eoh>\n<|MOSS|>:"
    assert "Everything said is forgotten." in result.stderr


def test_undo_and_retry(chat: Chat, engine: BlockingEngine) -> None:
    result = chat("one\ntwo\n/retry\n/undo\nthree\n")
    assert result.stdout == "Hello there.\nSecond.\nThird.\nFourth.\n"
    assert engine.requests[1].ids == engine.requests[2].ids
    assert "two" not in prompt_of(engine, 3)
    assert "Taken back: two" in result.stderr


def test_a_cut_answer_says_so_and_continues(chat: Chat, engine: BlockingEngine) -> None:
    ids = list(engine.scripts[0])
    engine.scripts.clear()
    engine.scripts.extend([tuple(ids[:2]), tuple(ids[2:])])
    result = chat("hi\n/set max_new_tokens 90\n/continue\n", "--max-new-tokens", "2")
    assert result.stdout.replace("\n", "") == "Hello there."
    assert "(cut off after 2 tokens; /continue goes on)" in result.stderr
    assert result.exit_code == 0


def test_an_empty_answer_says_so(chat: Chat, engine: BlockingEngine) -> None:
    engine.scripts[0] = (engine.last,)
    result = chat("hi\nmore\n")
    assert "(an empty answer; /retry asks again)" in result.stderr
    assert result.stdout == "Second.\n"


def test_system_shows_replaces_and_goes_back(chat: Chat, engine: BlockingEngine) -> None:
    result = chat("/system\n/system Be long.\nhi\n/system default\nagain\n")
    assert "Be brief." in result.stderr
    assert prompt_of(engine, 0).startswith("Be long.\n<|Human|>")
    assert prompt_of(engine, 1).startswith("You are an AI assistant whose name is MOSS.")


def test_save_and_load(chat: Chat, tmp_path: Path, engine: BlockingEngine) -> None:
    assert "Saved as talk.json." in chat("one\n/save talk.json\n").stderr
    assert json.loads((tmp_path / "talk.json").read_text())["turns"][0]["answer"] == "Hello there."
    result = chat("/load talk.json\ntwo\n")
    assert "Taken up again: 1 turn" in result.stderr
    assert "> one\nHello there." in result.stderr
    assert result.stdout == "Second.\n"
    assert "<|MOSS|>: Hello there.<eom>\n<|Human|>: two" in prompt_of(engine, 1)


def test_save_without_a_name_takes_the_time_as_name(chat: Chat, tmp_path: Path) -> None:
    chat("one\n/save\n")
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 1
    assert names[0].startswith("moss-chat-20")


def test_nothing_is_kept_of_a_chat_in_a_pipe(chat: Chat) -> None:
    chat("one\n")
    assert not paths.state_dir().exists()


def test_stats_tell_speed_memory_and_context(chat: Chat) -> None:
    shown = chat("hi\n/stats\n").stderr
    for words in (
        "last answer",
        "tokens/s",
        "first token",
        "memory",
        "at most",
        "of 2048 tokens",
        "turns    ",
        "cpu, fast",
        "`moss-jt fit` measures this machine",
    ):
        assert words in shown, words


def test_stats_before_the_first_answer(chat: Chat) -> None:
    result = chat("/stats\n")
    assert result.exit_code == 0
    assert "last answer" not in result.stderr
    assert "context" in result.stderr


def test_set_shows_and_changes_how_words_are_chosen(chat: Chat, engine: BlockingEngine) -> None:
    result = chat("/set\n/set temperature 0.5\n/set top-k 7\n/set greedy on\n/set seed 3\nhi\n/set seed none\nmore\n")
    assert result.exit_code == 0, result.stderr
    for line in (
        "temperature         0.7",
        "top_k               40",
        "top_p               0.8",
        "max_new_tokens      512",
        "greedy              off",  # as it is typed, not False
        "seed                none",
    ):
        assert line in result.stderr
    config = engine.requests[0].config
    assert (config.temperature, config.top_k, config.do_sample, config.seed) == (0.5, 7, False, 3)
    assert engine.requests[1].config.seed is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/set colour red", "there is no setting colour; there are: greedy, temperature"),
        ("/set top_k many", "top_k takes a whole number, not many."),
        ("/set temperature hot", "temperature takes a number, not hot."),
        ("/set temperature -1", "temperature is -1.0; it must be a finite number, 0 (greedy) or more."),
        ("/set top_p nan", "top_p is nan"),
        ("/set greedy maybe", "greedy is on or off, not maybe."),
        (
            "/retyr",
            "there is no command /retyr. Did you mean /retry? /help lists them; begin with // to send the text.",
        ),
        ("/undo", "there is no answer yet: nothing to undo"),
        ("/retry", "there is no answer yet: nothing to retry"),
        ("/continue", "there is no answer yet: nothing to continue"),
        ("/load missing.json", "missing.json does not exist"),
        ("/load", "last-chat.json does not exist"),
        # each of these three ended the chat with a traceback
        ("/save ~nobody-of-this-name/x", "~nobody-of-this-name/x cannot be written: No such file or directory."),
        (f"/save {'x' * 300}", "cannot be written: File name too long. Name another file"),
        ("/set seed -1", "seed is -1; it must be 0 or more"),
        ("word " * 3000, "the message has"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_the_chat_goes_on(chat: Chat, line: str, words: str) -> None:
    result = chat(f"{line}\nhi\n")
    assert words in result.stderr
    assert len([shown for shown in result.stderr.splitlines() if words in shown]) == 1
    assert result.stdout == "Hello there.\n"
    assert result.exit_code == 1, "a script should notice"


def test_two_slashes_send_a_message_that_begins_with_one(chat: Chat, engine: BlockingEngine) -> None:
    chat("//etc is a folder\n")
    assert prompt_of(engine, 0).endswith("<|Human|>: /etc is a folder<eoh>\n<|MOSS|>:")


def test_help_lists_every_command(chat: Chat) -> None:
    from moss_jt.cli.chat_commands import COMMANDS

    shown = chat("/help\n").stderr
    assert all(f"/{name}" in shown for name in COMMANDS)
    assert {"help", "system", "undo", "retry", "continue", "save", "load", "stats", "set", "clear", "exit"} <= set(
        COMMANDS
    )
    assert "Several lines" in shown


def test_exit_and_quit_leave(chat: Chat, engine: BlockingEngine) -> None:
    for word in ("/exit", "/quit", "stop"):
        assert chat(f"{word}\nhi\n").exit_code == 0
    assert engine.requests == []


def test_control_characters_of_the_model_do_not_reach_the_terminal(chat: Chat, engine: BlockingEngine) -> None:
    from moss_jt.tokenizer import load_tokenizer

    evil = "a\x1b[2J\x1b]0;owned\x07b\rc\x9b31md\x00e\x7ff\tg\nh 好"
    engine.scripts[0] = (*load_tokenizer(TOKENIZER).encode(" " + evil), engine.last)
    assert chat("hi\n").stdout == "a[2J]0;ownedbc31mdef\tg\nh 好\n"


def test_chinese_words_around_the_answers(chat: Chat) -> None:
    set_language("zh")
    result = chat("hi\n/stats\n/undo\n/undo\n", "--lang", "zh")
    assert result.stdout == "Hello there.\n"
    for words in ("最多 2048 个词元", "词元/秒", "内存", "已撤销：hi", "还没有任何回答，无法撤销"):
        assert words in result.stderr, words


def test_sampling_options_reach_the_engine(chat: Chat, engine: BlockingEngine) -> None:
    options = [
        "--temperature",
        "0.3",
        "--top-k",
        "5",
        "--top-p",
        "0.9",
        "--repetition-penalty",
        "1.1",
        "--seed",
        "4",
        "--max-new-tokens",
        "9",
    ]
    chat("hi\n", *options)
    config = engine.requests[0].config
    values = (
        config.temperature,
        config.top_k,
        config.top_p,
        config.repetition_penalty,
        config.seed,
        config.max_new_tokens,
    )
    assert values == (0.3, 5, 0.9, 1.1, 4, 9)
    assert not config.greedy


def test_the_defaults_are_those_of_moss(chat: Chat, engine: BlockingEngine) -> None:
    chat("hi\n")
    config = engine.requests[0].config
    assert (config.temperature, config.top_k, config.top_p, config.repetition_penalty) == (0.7, 40, 0.8, 1.02)


def test_who_sets_a_temperature_wants_draws(chat: Chat, engine: BlockingEngine) -> None:
    result = chat("/set temperature 0.5\nhi\nmore\n", "--greedy")
    assert "greedy       off\n  temperature  0.5\n" in result.stderr, "and is told so"
    assert not engine.requests[0].config.greedy


def test_what_nobody_says_is_as_the_model_is_best_asked(
    chat: Chat, engine: BlockingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = Sampling(do_sample=False, repetition_penalty=1.0)
    monkeypatch.setattr(scripted_model, "MossConfig", partial(MossConfig, sampling=best))
    chat("hi\n")
    chat("hi\n", "--temperature", "0.5")
    first, second = (request.config for request in engine.requests)
    assert first.greedy and first.repetition_penalty == 1.0
    assert not second.greedy and (second.temperature, second.repetition_penalty) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("template", "shown"), [("fields", "<|Inner Thoughts|>: None<eot>"), ("readme", "hi<eoh>\n<|MOSS|>:")]
)
def test_the_template_can_be_chosen(chat: Chat, engine: BlockingEngine, template: str, shown: str) -> None:
    chat("hi\n", "--template", template)
    assert shown in prompt_of(engine, 0)


def test_load_model_is_asked_for_fast_compute_unless_told_otherwise(
    engine: BlockingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = install(engine, monkeypatch.setattr)
    for options in ([], ["--compute", "exact", "--device", "cpu"]):
        CliRunner().invoke(make_group(), ["chat", "--model", str(TOKENIZER), *options], input="")
    assert [(call["compute"], call["device"]) for call in asked] == [("fast", "auto"), ("exact", "cpu")]


def test_the_licence_is_shown_where_it_is_known(
    engine: BlockingEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(engine, monkeypatch.setattr)
    for content, words in (
        ('{"license": "agpl-3.0"}', "Licence of the weights: agpl-3.0."),
        ("[", None),
        ("[1]", None),
    ):
        (tmp_path / "origin.json").write_text(content)
        result = CliRunner().invoke(make_group(), ["chat", "--model", str(tmp_path)], input="")
        assert result.exit_code == 0
        assert (words or "Licence") in result.stderr if words else "Licence" not in result.stderr


def test_a_model_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(make_group(), ["chat", "--model", "./nowhere/at/all"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.strip().splitlines()) == 1
    assert "nowhere/at/all" in shown.err


def test_bad_options_are_told_before_anything_is_loaded(
    engine: BlockingEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = install(engine, monkeypatch.setattr)
    assert exit_code_of(make_group(), ["chat", "--model", str(TOKENIZER), "--top-p", "7"]) == 1
    assert "top_p is 7.0; it must be above 0 and at most 1." in capsys.readouterr().err
    assert asked == []


def program_of(folder: Path, *answers: str, blocks: Sequence[tuple[int, int]] = ()) -> list[str]:
    """The command line of a chat with a model that gives these answers."""
    script = folder / "script.json"
    script.write_text(json.dumps({"answers": answers, "blocks": blocks}))
    return [sys.executable, str(Path(scripted_model.__file__)), str(script), "chat", "--model", str(TOKENIZER)]


def test_bytes_that_are_no_text_do_not_end_the_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    line = program_of(tmp_path, "One.", "Two.")
    result = subprocess.run(line, input=b"\xff\xfe\x00broken\nfine\n", capture_output=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (0, b"One.\nTwo.\n"), result.stderr


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pipe = subprocess.PIPE
    line = [*program_of(tmp_path, *["long " * 300] * 100), "--system", ""]
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"hi\nclear\n" * 100)
        process.stdin.close()
        assert process.stdout.read(8) == b"long lon"
        process.stdout.close()
        shown = process.stderr.read().decode()
        assert process.wait(60) == 1
    assert "Traceback" not in shown
    assert "Broken" not in shown


def test_ctrl_c_ends_a_chat_in_a_pipe_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    line = program_of(tmp_path, "one two three", "never asked for", blocks=[(0, 3)])
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"hi\nhi\n")
        process.stdin.close()
        waiting = scripted_model.WAITS.encode()
        shown = b""
        while not shown.endswith(waiting):
            shown += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        shown = process.stderr.read()
        answer = process.stdout.read().decode()
        assert process.wait(60) == 130
    assert shown.endswith(b"Interrupted.\n")
    assert b"Traceback" not in shown
    assert answer.endswith("\n")
    assert "one two three".startswith(answer.strip())


def test_a_person_whose_answers_go_to_a_file_is_asked_on_stderr() -> None:
    asked = io.StringIO()
    source = PipeInput(io.StringIO("a\\\nb\n"), ask=asked)
    assert source.read() == "a\nb"
    assert source.read() is None
    assert asked.getvalue() == "You: You: "
