"""Pages: where a stretch begins, what of it is in memory, what is given back, what cannot be had."""

from __future__ import annotations

import mmap

import pytest
from residency import resident_bytes

from moss_jt.errors import DeviceMemoryError
from moss_jt.memory import HUGE_PAGE
from moss_jt.pages import Pages

MANY = 3 * HUGE_PAGE + mmap.PAGESIZE


@pytest.mark.parametrize("huge", [True, False])
def test_it_begins_on_a_page_and_holds_zeros(huge: bool) -> None:
    pages = Pages(MANY, "a test", "Stop.", huge=huge)
    assert pages.array.ctypes.data % (HUGE_PAGE if huge else mmap.PAGESIZE) == 0
    assert pages.array.shape == (MANY,) and not pages.array[:: mmap.PAGESIZE].any()


def test_only_what_is_touched_is_in_memory() -> None:
    pages = Pages(MANY, "a test", "Stop.", huge=False, reserve=False)
    assert resident_bytes(pages.array) == 0
    pages.array[5 * mmap.PAGESIZE] = 1
    assert resident_bytes(pages.array) == mmap.PAGESIZE
    pages.touch()
    assert resident_bytes(pages.array) == MANY


def test_what_is_given_back_is_gone_and_its_neighbours_stay() -> None:
    pages = Pages(MANY, "a test", "Stop.")
    pages.array.fill(7)
    pages.give_back(HUGE_PAGE, HUGE_PAGE)
    assert resident_bytes(pages.array) == MANY - HUGE_PAGE
    assert not pages.array[HUGE_PAGE : 2 * HUGE_PAGE].any()
    assert (pages.array[:HUGE_PAGE] == 7).all() and (pages.array[2 * HUGE_PAGE :] == 7).all()


def test_after_stay_small_one_page_returns_alone() -> None:
    pages = Pages(MANY, "a test", "Stop.")
    pages.touch()
    pages.stay_small()
    pages.give_back(0, MANY)
    pages.array[HUGE_PAGE] = 1
    assert resident_bytes(pages.array) == mmap.PAGESIZE


def test_nothing_at_all_is_a_size_too() -> None:
    pages = Pages(0, "a test", "Stop.")
    pages.touch()
    pages.give_back(0, 0)
    assert pages.array.size == 0


def test_the_array_keeps_the_memory() -> None:
    array = Pages(mmap.PAGESIZE, "a test", "Stop.").array
    array.fill(3)
    assert int(array.sum()) == 3 * mmap.PAGESIZE


def test_too_much_is_a_memory_error_with_purpose_and_advice() -> None:
    with pytest.raises(DeviceMemoryError, match=r"does not give .* for a test .*Ask for less\."):
        Pages(1 << 62, "a test", "Ask for less.")
