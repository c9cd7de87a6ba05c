"""`moss-jt tools` and `moss-jt index`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from local_server import serving

from moss_jt.cli.main import exit_code_of, make_group
from moss_jt.language import set_language


def run(*words: str) -> Result:
    return CliRunner().invoke(make_group(), list(words))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back ends of libraries that may be installed here are left out."""
    monkeypatch.setattr("moss_jt.tools.search_web.find_spec", lambda name: None)
    monkeypatch.setattr("moss_jt.tools.drawing_diffusers.find_spec", lambda name: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_tools_are_listed_and_tried() -> None:
    result = run("tools", "--json")
    rows = {(row["tool"], row["backend"]): row for row in json.loads(result.stdout)}
    assert {backend for tool, backend in rows if tool == "search"} == {"local", "ddgs", "bing", "searxng"}
    assert {backend for tool, backend in rows if tool == "draw"} == {"placeholder", "diffusers", "a1111", "comfyui"}
    assert rows["calc", ""]["state"] == rows["solve", ""]["state"] == "ok"
    assert [row["backend"] for row in rows.values() if row["chosen"] and row["backend"]] == ["local", "placeholder"]
    assert rows["search", "local"]["state"] == "off"
    shown = run("tools").stdout
    assert "✓ calc: computes here" in shown
    assert "- search local (in use): nothing indexed yet: moss-jt index FOLDER" in shown
    set_language("zh")
    assert "✓ calc: 在本机计算" in run("tools").stdout


def test_a_chosen_back_end_that_fails_gives_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        server.routes["/search"] = (200, {"results": []})
        monkeypatch.setenv("MOSS_JT_SEARCH", f"searxng={server.url}")
        assert exit_code_of(make_group(), ["tools"]) == 0
        del server.routes["/search"]
        assert exit_code_of(make_group(), ["tools"]) == 1


def test_index_add_list_find_remove(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.md").write_text("# Title\n\nThe lighthouse is white.\n")
    assert run("index", str(docs)).stdout == f"{docs}: 1 files new, 0 changed, 0 gone, 0 as before; 1 passages.\n"
    assert json.loads(run("index", str(docs), "--json").stdout)["unchanged"] == 1
    assert run("index", "--list").stdout == f"{docs}: 1 files, 1 passages\n"
    assert json.loads(run("index", "--list", "--json").stdout) == [{"path": str(docs), "files": 1, "passages": 1}]
    found = run("index", "--find", "lighthouse").stdout
    assert found == f"[1] Title  {(docs / 'a.md').as_uri()}\nThe lighthouse is white.\n\n"
    assert json.loads(run("index", "--find", "lighthouse", "--json").stdout)[0]["text"] == "The lighthouse is white."
    assert "Nothing was found." in run("index", "--find", "submarine").stderr
    set_language("zh")
    assert run("index", "--remove", str(docs)).stdout == f"{docs}：已移除 1 个文件。\n"
    assert "尚无索引" in run("index", "--list").stderr


def test_index_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(make_group(), ["index"]) == 1
    assert exit_code_of(make_group(), ["index", str(tmp_path / "none")]) == 1
    errors = capsys.readouterr().err
    assert "a folder to index is missing" in errors
    assert "none does not exist. Name a folder of documents." in errors
