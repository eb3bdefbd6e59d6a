import os
from pathlib import Path

from dynmix.mixture.folders import files_in


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
