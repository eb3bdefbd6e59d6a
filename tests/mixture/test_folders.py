import os
from pathlib import Path
from typing import Any

import pytest

from dynmix.mixture.folders import files_in, matching


def test_each_real_folder_is_visited_once_by_its_own_name(tmp_path: Path) -> None:
    top, beside = tmp_path / "top", tmp_path / "beside"
    for file in (
        top / "z" / "in z",
        top / "in top",
        top / ".hidden" / "x",
        top / "_marked" / "x",
        beside / "in beside",
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    for link, folder in (
        ("a", top / "z"),
        ("up", top),
        ("z/up", top),
        ("b", beside),
        ("c", beside),
        ("h", top / ".hidden"),
    ):
        (top / link).symlink_to(folder)
    (beside / "back").symlink_to(top)
    (top / "file").symlink_to(beside / "in beside")
    found = sorted(os.path.relpath(path, top) for path in files_in(str(top)))
    assert found == ["b/in beside", "file", "h/x", "in top", "z/in z"]


def test_the_files_of_a_file_are_itself(tmp_path: Path) -> None:
    assert files_in(str(tmp_path / "x")) == [str(tmp_path / "x")]


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "locked").mkdir(parents=True)
    scandir = os.scandir

    def guarded(path: str) -> Any:
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(PermissionError, match="a/locked"):
        files_in(str(tmp_path))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**", ["a", "x/b", "x/y/c"]),
        ("**/", ["a", "x/b", "x/y/c"]),
        ("**/c", ["x/y/c"]),
        ("**/x/**/c", ["x/y/c"]),
        ("x/**", ["x/b", "x/y/c", "x/A/a"]),
        ("**/y", ["x/y/c"]),
        ("x/*", ["x/b", "x/y/c", "x/A/a"]),
        ("*/b", ["x/b"]),
        ("[ax]", ["a", "x/b", "x/y/c"]),
        ("none/**", []),
        ("**/none", []),
    ],
)
def test_globs_match_files_and_folders_each_once(
    pattern: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "corpus"
    for file in ("a", "x/b", "x/y/c"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("")
    (root / "x" / "A").symlink_to(root)
    (root / "x" / "y" / "up").symlink_to(root / "x")

    def found(where: str) -> list[str]:
        return sorted(os.path.realpath(file) for file in matching(where))

    wanted = sorted(os.path.realpath(root / file) for file in expected)
    assert found(f"{root}/{pattern}") == found(f"{tmp_path}/c*s/{pattern}") == wanted
    monkeypatch.chdir(root)
    assert found(pattern) == wanted


def test_one_folder_has_one_name(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.idx").write_text("")
    (tmp_path / "a").symlink_to("b")
    assert matching(f"{tmp_path}/*", f"{tmp_path}/b/*") == [f"{tmp_path}/a/x.idx"]
