"""Results that are made once."""

from pathlib import Path

import pytest

from benchmarks.pretraining.kept import check_settings, kept, write_text


def test_a_folder_is_of_the_settings_that_its_first_result_had(tmp_path: Path) -> None:
    check_settings(tmp_path, {"steps": 10, "split": ("a", "b")})
    check_settings(tmp_path, {"steps": 20, "split": ("a", "b")})  # there was none
    (tmp_path / "natural").mkdir()
    check_settings(tmp_path, {"steps": 20, "split": ("a", "b")})
    with pytest.raises(SystemExit, match=r"other settings \(steps was 20 and is 10\): choose another folder"):
        check_settings(tmp_path, {"steps": 10, "split": ("a", "b")})


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cell.json"
    file.write_text('{"method": "natu')
    with pytest.raises(SystemExit, match=r"cell\.json is damaged: delete it"):
        kept(file, dict)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(file := tmp_path / "cells.jsonl", "as it was")

    def fails(self: Path, text: str) -> int:
        with self.open("w") as half:
            half.write(text[:3])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(OSError, match="no space left"):
        write_text(file, "something else")
    assert file.read_text() == "as it was"
