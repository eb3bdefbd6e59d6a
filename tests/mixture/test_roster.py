import multiprocessing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmix.mixture.roster import JoinedDomain, Roster

names = st.text(min_size=1, max_size=8)


@given(steps=st.lists(st.tuples(st.booleans(), st.dictionaries(names, st.integers(1, 2**61), max_size=4)), max_size=6))
def test_a_second_reader_follows_every_change(steps: list[tuple[bool, dict[str, int]]]) -> None:
    roster = Roster({"first": 3})
    reader = Roster({"first": 3})
    reader._log = roster._log  # as in a process started now
    expected: dict[str, int] = {}
    for replace, sizes in steps:
        kept = {} if replace else expected
        fresh = {name: size for name, size in sizes.items() if name not in {"first", *kept}}
        roster.put([JoinedDomain(name, size, {"file": name}) for name, size in fresh.items()], keep=len(kept))
        expected = {**kept, **fresh}
        for each in (roster, reader):
            assert each.now.sizes == {"first": 3, **expected}
            assert list(each.now.sizes) == list(each.now.names)
            assert each.now.rows.tolist() == list(each.now.sizes.values())
            assert each.now.joined == tuple(JoinedDomain(name, size, {"file": name}) for name, size in expected.items())


def names_in(roster: Roster, out: Any) -> None:
    out.put(roster.now)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_sees_what_joined_before_it_looks(method: str) -> None:
    roster = Roster({"a": 1})
    roster.put([JoinedDomain("b\n", 2, {"file": "/tmp/\udcff\u2028"})], keep=0)
    processes: Any = multiprocessing.get_context(method)
    out = processes.Queue()
    process = processes.Process(target=names_in, args=(roster, out))
    process.start()
    found = out.get(timeout=60)
    process.join(60)
    assert found.names == roster.now.names == ("a", "b\n")
    assert found.joined == roster.now.joined


def test_what_is_there_already_takes_no_room() -> None:
    roster = Roster({"a": 1})
    roster.put([JoinedDomain("b", 2, {})], keep=0)
    used = int(roster._log.array[0])
    for _ in range(3):
        roster.put([JoinedDomain("b", 2, {})], keep=0)
    assert roster._log.array[0] == used
