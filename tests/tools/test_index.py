"""The local index: Chinese and English, changes on disk, files of every kind, a broken index."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from moss_jt.errors import ToolError
from moss_jt.tools.index import Indexed, LocalIndex, terms, window
from moss_jt.tools.passages import LONGEST, documents, read_passages, split

DOCUMENTS: dict[str, str | bytes] = {
    "rivers.md": "# Rivers\n\nThe Lena flows north into the Laptev Sea.\n\n## Ports\n\nYakutsk lies on its bank.\n",
    "tea/茶.txt": "碧螺春产于苏州太湖的洞庭山。龙井茶产于杭州西湖。",
    "tea/old.txt": "信阳毛尖产于河南。".encode("gb18030"),
    "guide.rst": "Installing\n==========\n\nRun the installer twice.\n\nRemoving\n--------\n\nDelete the folder.\n",
    "page.html": "<html><head><title>t</title><style>p{}</style></head><body><h2>Fees &amp; costs</h2>"
    "<p>The <b>fee</b> is 12&nbsp;crowns.</p><script>evil()</script></body></html>",
    "mixed.md": "使用 Python3 编写的程序运行在Linux上。",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in DOCUMENTS.items():
        path = tmp_path / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "docs" / ".hidden").mkdir()
    (tmp_path / "docs" / ".hidden" / "secret.txt").write_text("zanzibar")
    (tmp_path / "docs" / "picture.png").write_bytes(b"\x89PNG zanzibar")
    (tmp_path / "docs" / "binary.txt").write_bytes(b"zanzibar\0\1\2")
    (tmp_path / "outside.txt").write_text("zanzibar")
    (tmp_path / "docs" / "link.txt").symlink_to(tmp_path / "outside.txt")
    return tmp_path / "docs"


@pytest.fixture
def index(folder: Path) -> LocalIndex:
    index = LocalIndex()
    index.add(folder)
    return index


FINDS = {
    "Where does the Lena flow?": "The Lena flows north into the Laptev Sea.",
    "yakutsk": "Yakutsk lies on its bank.",
    "installers": "Run the installer twice.",
    "removing": "Delete the folder.",
    "fee": "The fee is 12 crowns.",
    "苏州碧螺春": "碧螺春产于苏州太湖的洞庭山。龙井茶产于杭州西湖。",
    "龙井茶的产地": "碧螺春产于苏州太湖的洞庭山。龙井茶产于杭州西湖。",
    "毛尖": "信阳毛尖产于河南。",
    "湖": "碧螺春产于苏州太湖的洞庭山。龙井茶产于杭州西湖。",
    "ｐｙｔｈｏｎ３": "使用 Python3 编写的程序运行在Linux上。",
    "linux": "使用 Python3 编写的程序运行在Linux上。",
}


@pytest.mark.parametrize("query", FINDS)
def test_finds(index: LocalIndex, query: str) -> None:
    hits = index.search(query, 3)
    assert hits and hits[0].text.strip() == FINDS[query]
    assert Path(hits[0].url.removeprefix("file://")).suffix or "%" in hits[0].url


@pytest.mark.parametrize(
    "query", ["zanzibar", "evil", "京广线", "", "?!", '"; DROP TABLE files; --', "NEAR(", "a AND *"]
)
def test_finds_nothing_where_nothing_is(index: LocalIndex, query: str) -> None:
    assert index.search(query, 3) == []


def test_hits_name_their_heading_and_file(index: LocalIndex, folder: Path) -> None:
    (hit,) = index.search("Yakutsk", 3)
    assert (hit.title, hit.url) == ("Ports", (folder / "rivers.md").as_uri())
    (hit,) = index.search("毛尖", 3)
    assert hit.title == "old", "the name of a file without headings"


def test_hits_of_different_files_come_first(index: LocalIndex, folder: Path) -> None:
    (folder / "long.txt").write_text("\n\n".join(f"anchor number {n}. " + "words " * 90 for n in range(9)))
    (folder / "short.txt").write_text("An anchor.")
    index.add(folder)
    found = [Path(hit.url).name for hit in index.search("anchor", 3)]
    assert set(found) == {"long.txt", "short.txt"} and len(found) == 3


def test_only_changes_are_read_again(index: LocalIndex, folder: Path) -> None:
    assert index.add(folder) == Indexed(unchanged=len(DOCUMENTS) + 1, passages=8)
    (folder / "rivers.md").write_text("# Rivers\n\nThe Ob flows north.\n")
    (folder / "guide.rst").unlink()
    (folder / "new.txt").write_text("New words.")
    done = index.add(folder)
    assert (done.added, done.changed, done.removed) == (1, 1, 1)
    assert index.search("Lena", 3) == [] and index.search("installer", 3) == []
    assert index.search("Ob flows", 3)[0].text == "The Ob flows north."


def test_folders_are_listed_and_removed(index: LocalIndex, folder: Path, tmp_path: Path) -> None:
    (found,) = index.folders()
    assert (found.path, found.files) == (str(folder), len(DOCUMENTS) + 1)
    assert index.check().state == "ok" and "7 files" in index.check().text
    assert index.remove(folder) == len(DOCUMENTS) + 1
    assert index.folders() == [] and index.search("Lena", 3) == []
    assert index.check().state == "off"
    with pytest.raises(ToolError, match=r"is not in the index. `moss-jt index --list` shows"):
        index.remove(tmp_path)


def test_a_folder_within_an_indexed_one_stays_a_part_of_it(index: LocalIndex, folder: Path) -> None:
    """Once, its files went over to it, and were lost to the folder around when it was removed."""
    (folder / "tea" / "new.txt").write_text("Oolong leaves.")
    assert index.add(folder / "tea") == Indexed(added=1, unchanged=2, passages=3)
    assert index.add(folder / "rivers.md") == Indexed(unchanged=1, passages=2)
    assert [one.path for one in index.folders()] == [str(folder)]
    with pytest.raises(ToolError, match=r"tea is in the index as a part of .*docs, .* moss-jt index --remove .*docs$"):
        index.remove(folder / "tea")
    with pytest.raises(ToolError, match="rare is not in the index"):
        index.remove(folder / "rare")
    (folder / "tea").rename(folder / "drinks")
    with pytest.raises(ToolError, match=r"tea does not exist. To forget it: moss-jt index .*docs$"):
        index.add(folder / "tea")
    assert index.remove(folder) == len(DOCUMENTS) + 2


def test_a_folder_takes_in_those_within_it(folder: Path) -> None:
    index = LocalIndex()
    index.add(folder / "tea")
    index.add(folder / "rivers.md")
    index.add(folder / ".hidden")
    (folder / "tea" / "old.txt").unlink()
    assert index.add(folder) == Indexed(added=len(DOCUMENTS) - 2, unchanged=2, removed=1, passages=7)
    assert [one.path for one in index.folders()] == [str(folder), str(folder / ".hidden")], "which it does not read"
    assert index.remove(folder / ".hidden") == 1
    assert index.add(folder) == Indexed(unchanged=len(DOCUMENTS), passages=7)


def test_a_folder_is_known_by_one_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = LocalIndex()
    monkeypatch.setattr("moss_jt.tools.index._place", Path.absolute)  # as it once was
    index.add(folder / "tea" / "..")
    assert [one.path for one in index.folders()] == [str(folder / "tea" / "..")]
    monkeypatch.undo()
    monkeypatch.chdir(folder / "tea")
    assert index.add(Path("..")).added == len(DOCUMENTS) + 1
    assert [one.path for one in index.folders()] == [str(folder)]
    assert [hit.url for hit in index.search("Yakutsk", 3)] == [(folder / "rivers.md").as_uri()]
    (tmp_path / "link").symlink_to(folder / "tea")
    assert index.remove(tmp_path / "link" / "..") == len(DOCUMENTS) + 1, "where .. leads, not what it looks like"


def test_what_is_gone_is_not_found_any_more(index: LocalIndex, folder: Path) -> None:
    moved = folder.rename(folder.with_name("elsewhere"))
    assert index.search("Lena", 3) == []
    with pytest.raises(ToolError, match=r"does not exist. To forget it: moss-jt index --remove .*docs"):
        index.add(folder)
    index.add(moved)
    (hit,) = index.search("Lena", 3)
    assert hit.url == (moved / "rivers.md").as_uri()
    moved.rename(folder)
    (hit,) = index.search("Lena", 3)
    assert hit.url == (folder / "rivers.md").as_uri(), "a disk that was away is there again"


def test_names_that_are_no_text_are_counted(index: LocalIndex, folder: Path) -> None:
    (folder / os.fsdecode(b"\xb2\xe2\xca\xd4.txt")).write_text("zanzibar")
    assert index.add(folder).unreadable == 1
    other = folder.rename(folder.with_name(os.fsdecode(b"\xb2\xe2")))
    with pytest.raises(ToolError, match=r"is not UTF-8, .* Rename it"):
        index.add(other)


@pytest.mark.parametrize(
    "page",
    [
        "<head><title>t</title><meta charset=utf-8><body><p>Nine crowns.",
        "<html><head><style>p{}</style><h1>Fees</h1><p>Nine crowns.",
        "<head><title>t</title></head><![ endif]--><p>Nine crowns.<![foo]>",
        "<title>t</title><nav><p>Home</p></nav><p>Nine crowns.",
        "<p>Nine crowns.<nav><head><p>Home</p></nav>",
    ],
)
def test_pages_as_they_are_written(tmp_path: Path, page: str) -> None:
    (tmp_path / "page.html").write_text(page)
    text = "\n".join(passage.text for passage in read_passages(tmp_path / "page.html"))
    assert "Nine crowns." in text and "Home" not in text and "p{}" not in text


def test_the_index_is_for_its_owner_only(index: LocalIndex) -> None:
    assert stat.S_IMODE(index.path.stat().st_mode) == 0o600


def test_without_an_index(tmp_path: Path) -> None:
    index = LocalIndex(tmp_path / "none.sqlite")
    with pytest.raises(ToolError, match=r"no documents have been indexed. Run: moss-jt index FOLDER"):
        index.search("x", 3)
    with pytest.raises(ToolError, match=r"does not exist. Name a folder"):
        index.add(tmp_path / "missing")
    assert index.check().state == "off"


def test_a_broken_index_is_told(tmp_path: Path) -> None:
    (tmp_path / "i.sqlite").write_bytes(b"not a database" * 1000)
    index = LocalIndex(tmp_path / "i.sqlite")
    with pytest.raises(ToolError, match=r"i.sqlite is broken: .* Remove it, and index your folders again"):
        index.search("x", 3)
    assert index.check().state == "fail"


def test_a_single_file_can_be_indexed(tmp_path: Path) -> None:
    (tmp_path / "one.md").write_text("Only this.")
    index = LocalIndex()
    assert index.add(tmp_path / "one.md").added == 1
    assert index.search("only", 1)[0].text == "Only this."


def test_terms() -> None:
    assert terms("碧螺春 Tea2, été") == ["碧螺", "螺春", "tea2", "été"]
    assert terms("茶") == ["茶"]
    assert terms("a茶b") == ["a", "茶", "b"]
    assert terms("茶叶", ends=True) == ["茶叶", "叶"]


def test_long_texts_are_cut_into_passages() -> None:
    text = "# A\n\n" + "One sentence here. " * 200 + "\n\n# B\n\n" + "一句话。" * 400 + "\n\n" + "x" * 2000
    passages = list(split(text))
    assert {passage.heading for passage in passages} == {"A", "B"}
    assert max(len(passage.text) for passage in passages) <= LONGEST + 1
    kept = "".join("".join(passage.text.split()) for passage in passages)
    assert kept == "".join(text.replace("# A", "").replace("# B", "").split()), "nothing is lost or doubled"


def test_the_window_shows_what_was_asked_for() -> None:
    text = "Filler words stand here. " * 20 + "The anchor weighs much. " + "More filler. " * 10
    assert window(text, "anchor").startswith(("The anchor", "Filler")) and "anchor" in window(text, "anchor")[:400]
    assert window("short", "x") == "short"


def test_which_files_count(folder: Path) -> None:
    names = [path.relative_to(folder).as_posix() for path in documents(folder)]
    assert names == sorted([*DOCUMENTS, "binary.txt"], key=lambda name: ("/" in name, name))
    assert read_passages(folder / "binary.txt") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_cannot_be_read_is_counted(folder: Path) -> None:
    (folder / "rivers.md").chmod(0)
    assert LocalIndex().add(folder).unreadable == 1
