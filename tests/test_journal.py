import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmix.journal import Journal, Row
from tests.journal_rows import journal_row as row


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run" / "journal.jsonl")
    assert journal.rows() == []
    written = [row(0), row(1, message='two\nlines, "quotes", \u2028 and \ud800'), row(2, kind="final", weights=None)]
    for each in written:
        journal.append(each)
    assert journal.rows() == written
    assert journal.path.read_bytes().count(b"\n") == 3


@given(st.lists(st.floats() | st.sampled_from([math.nan, math.inf, -math.inf]), min_size=2, max_size=2))
def test_a_number_json_has_no_word_for_becomes_null(
    tmp_path_factory: pytest.TempPathFactory, pair: list[float]
) -> None:
    journal = Journal(tmp_path_factory.mktemp("run") / "journal.jsonl")
    journal.append(row(influence=np.array([pair]), task_loss={"qa": np.float64(pair[0])}, step=np.int64(3)))
    text = journal.path.read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    expected = [value if math.isfinite(value) else None for value in pair]
    (back,) = journal.rows()
    assert (back["influence"], back["task_loss"], back["step"]) == ([expected], {"qa": expected[0]}, 3)


@pytest.mark.parametrize("cut", [1, 2, 50, 400, -1])
def test_a_row_cut_short_by_a_kill_is_left_out_and_then_taken_away(
    tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(row(0))
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + whole[:cut])
    with caplog.at_level(logging.WARNING):
        assert journal.rows() == [row(0)]
    assert f"{journal.path}:2" in caplog.text
    journal.append(row(1))
    assert journal.rows() == [row(0), row(1)]


def test_a_kill_within_the_first_row_leaves_an_empty_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.path.write_bytes(b'{"kind": "sta')
    assert journal.rows() == []
    journal.append(row(0))
    assert journal.rows() == [row(0)]


@pytest.mark.parametrize("broken", [b"{", b"", b"[]", b'{"kind": "stage"}', b"\0\0", b"\xff"])
def test_a_broken_line_is_named_by_file_and_number(tmp_path: Path, broken: bytes) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(row(0))
    good = journal.path.read_bytes()
    journal.path.write_bytes(good + broken + b"\n" + good)
    with pytest.raises(ValueError, match=r"journal\.jsonl:2: "):
        journal.rows()


@pytest.mark.parametrize("key", sorted(Row.__required_keys__))
def test_a_missing_key_is_named_and_nothing_is_written(tmp_path: Path, key: str) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    lacking: Any = {name: value for name, value in row().items() if name != key}
    with pytest.raises(ValueError, match=f"lacks '{key}'"):
        journal.append(lacking)
    assert not journal.path.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 1}, "no place for 'weight'"),
        ({"kind": "end"}, "'kind' is 'stage' or 'final', got 'end'"),
        ({"influence": [[1.0], [2.0]]}, r"'influence' has shape \(2, 1\); tasks x domains is \(1, 2\)"),
        ({"standard_error": [[1.0]]}, "'standard_error' has shape"),
    ],
)
def test_a_row_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Journal(tmp_path / "journal.jsonl").append(row(**changes))


@pytest.mark.parametrize("stages", range(5))
def test_truncate_keeps_the_rows_a_checkpoint_knew(tmp_path: Path, stages: int) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.truncate(stages)
    assert not journal.path.exists()
    rows = [row(0), row(1), row(2), row(3, kind="final", weights=None)]
    for each in rows:
        journal.append(each)
    with open(journal.path, "ab") as file:
        file.write(b'{"half')
    journal.truncate(stages)
    assert journal.rows() == rows[: min(stages, 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]
    journal.append(row(9))
    assert journal.rows()[-1] == row(9)
