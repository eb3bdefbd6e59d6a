import numpy as np

from dynmix.mixture.quota import TOTAL
from dynmix.mixture.stages import MAX_STAGES, StageRow, StageTable


def row(number: int, width: int, end: int | None = None) -> StageRow:
    rng = np.random.default_rng(number)
    cdf, base, owed = np.sort(rng.integers(0, TOTAL, width)), *rng.integers(-(2**60), 2**60, (2, width))
    return StageRow(number, 10 * number, end, cdf, base, owed)


def same(one: StageRow, other: StageRow) -> bool:
    return one[:3] == other[:3] and all(np.array_equal(a, b) for a, b in zip(one[3:], other[3:], strict=True))


def test_the_widest_and_the_last_stage_have_room() -> None:
    table = StageTable(1024)
    table.write(row(MAX_STAGES - 2, 1024), row(MAX_STAGES - 1, 1024, end=10**6))
    assert len(table) == MAX_STAGES
    assert same(table[MAX_STAGES - 2], row(MAX_STAGES - 2, 1024))
    assert same(table[MAX_STAGES - 1], row(MAX_STAGES - 1, 1024, end=10**6))
    assert table.end == 10**6


def test_stages_of_other_widths_stand_side_by_side() -> None:
    table = StageTable(5)
    table.write(row(0, 2), row(1, 5), row(2, 3))
    table.write(row(1, 4))
    assert len(table) == 2
    assert table.starts.tolist() == [0, 10]
    assert same(table[0], row(0, 2))
    assert same(table[1], row(1, 4))
    table.hold(99)
    assert table.end == 99


def test_domains_that_joined_since_are_never_drawn() -> None:
    wide = row(3, 2).widened(4)
    assert wide.cdf.tolist() == [*row(3, 2).cdf.tolist(), TOTAL, TOTAL]
    assert wide.base.tolist() == [*row(3, 2).base.tolist(), 0, 0]
    assert wide.owed.tolist() == [*row(3, 2).owed.tolist(), 0, 0]


def test_every_change_is_a_new_generation() -> None:
    table = StageTable(2)
    table.write(row(0, 2))
    seen = [table.generation]
    table.outdate()
    seen.append(table.generation)
    table.write(row(1, 2))
    assert len({*seen, table.generation}) == 3
