import json
import os

import pytest

from dynmix.whole_file import whole_file, write_json, write_whole


def test_a_file_is_there_whole_or_as_it_was_and_nothing_is_left(tmp_path, monkeypatch):
    path = tmp_path / "new" / "facts.json"
    write_json(path, {"städte": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"städte": 1}
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"städte": 2, "set": set()})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"städte": 3})
    assert json.loads(path.read_text(encoding="utf-8")) == {"städte": 1}
    assert list(path.parent.iterdir()) == [path]


def test_a_path_that_is_no_text_is_read_back_as_it_was(tmp_path):
    facts = {os.fsdecode(b"stadt-\xff"): os.fsdecode(b"/caf\xc3\xa9/\xff"), "escaped": "\\udcff"}
    write_json(tmp_path / "facts.json", facts)
    assert json.loads((tmp_path / "facts.json").read_text(encoding="utf-8")) == facts


def test_what_a_kill_left_is_overwritten(tmp_path):
    (tmp_path / ".a.tmp").write_text("half of another, and longer than what comes")
    write_whole(tmp_path / "a", "käse")
    assert (tmp_path / "a").read_bytes() == "käse".encode()
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_several_may_write_the_same_at_once(tmp_path):
    with whole_file(tmp_path / "a", shared=True) as one, whole_file(tmp_path / "a", shared=True) as other:
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_options_are_those_of_json(tmp_path):
    write_json(tmp_path / "facts.json", {"path": tmp_path}, default=str)
    assert json.loads((tmp_path / "facts.json").read_text()) == {"path": str(tmp_path)}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "facts.json", float("nan"), allow_nan=False)
