"""Citations in an answer that arrives in pieces."""

from __future__ import annotations

import pytest

from moss_jt.tools.citations import Citation, CitationStream, cited

CASES: dict[str, list[str | tuple[int, ...]]] = {
    "plain": ["plain"],
    "A<sup><|1|></sup>.": ["A", (1,), "."],
    "A<sup><|1|><|2|></sup> B<sup><|3|></sup>": ["A", (1, 2), " B", (3,)],
    "A<sup><|1|>, <|12|></sup>": ["A", (1, 12)],
    "x<sup>1</sup>": ["x", (1,)],
    "x<sup>2</sup": ["x<sup>2</sup"],
    "m<sup>th</sup> a < b <s>": ["m<sup>th</sup> a < b <s>"],
    "10<sup>-3</sup>": ["10<sup>-3</sup>"],
    "<sup>" + "1" * 200: ["<sup>" + "1" * 200],
    "": [],
}


def merged(parts: list[str | Citation]) -> list[str | tuple[int, ...]]:
    """Neighbouring texts joined, citations as their numbers."""
    found: list[str | tuple[int, ...]] = []
    for part in parts:
        last = found[-1] if found else ()
        if isinstance(part, str) and isinstance(last, str):
            found[-1] = last + part
        else:
            found.append(part if isinstance(part, str) else part.numbers)
    return found


@pytest.mark.parametrize("text", CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_pieces_of_any_size_give_the_same(text: str, size: int) -> None:
    stream = CitationStream()
    parts = [part for at in range(0, len(text), size) for part in stream.push(text[at : at + size])]
    parts += stream.flush()
    assert merged(parts) == CASES[text]
    assert "".join(part if isinstance(part, str) else part.text for part in parts) == text


def test_text_is_held_back_only_where_it_may_be_a_citation() -> None:
    stream = CitationStream()
    assert stream.push("Yes") == ["Yes"]
    assert stream.push(" <") == [" "]
    assert stream.push("b>") == ["<b>"]


def test_numbers_of_a_whole_answer() -> None:
    assert cited("a<sup><|2|></sup> b<sup><|1|></sup> c<sup><|2|></sup>") == (2, 1)
