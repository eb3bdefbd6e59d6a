"""Results that are made once."""

from pathlib import Path

import pytest

from benchmarks.pretraining.kept import check_settings, kept


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
