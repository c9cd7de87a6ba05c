"""Which cache a prompt continues: the user's own, idle, with the longest beginning."""

from __future__ import annotations

from moss_jt.server.warm import WarmCaches

LONG = tuple(range(100))


def test_the_longest_beginning_is_taken() -> None:
    forgotten: list[str] = []
    warm = WarmCaches(3, forgotten.append)
    short, long = warm.take("a", LONG[:40]), warm.take("a", LONG)
    assert short != long
    warm.give_back(short, (*LONG[:40], -1))
    warm.give_back(long, LONG)
    assert warm.take("a", (*LONG, 5)) == long
    assert warm.take("a", (*LONG, 5)) == short, "the other is lent"
    third = warm.take("a", (*LONG, 5))
    assert third not in (short, long)
    assert forgotten == []


def test_nobody_gets_what_another_computed() -> None:
    warm = WarmCaches(3, lambda _: None)
    name = warm.take("a", LONG)
    warm.give_back(name, LONG)
    assert warm.take("b", LONG) != name
    assert warm.take("a", (-1, *LONG)) != name, "nothing in common"


def test_the_oldest_idle_is_forgotten_and_none_that_is_lent() -> None:
    forgotten: list[str] = []
    warm = WarmCaches(2, forgotten.append)
    names = [warm.take("a", (number,) * 50) for number in range(4)]
    assert len(set(names)) == 4
    assert forgotten == [], "all are lent"
    for number in (2, 0, 1, 3):
        warm.give_back(names[number], (number,) * 50)
    assert forgotten == [names[2], names[0]]


def test_a_death_empties_them() -> None:
    warm = WarmCaches(2, lambda _: None)
    name = warm.take("a", LONG)
    warm.give_back(name, LONG)
    warm.clear()
    assert warm.take("a", LONG) != name
