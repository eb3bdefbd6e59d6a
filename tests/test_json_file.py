import json
import os

import pytest

from dynmix.json_file import write_json


def test_a_file_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "new" / "facts.json"
    write_json(path, {"städte": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"städte": 1}
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"städte": 2, "set": set()})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"städte": 3})
    assert json.loads(path.read_text(encoding="utf-8")) == {"städte": 1}


def test_options_are_those_of_json(tmp_path):
    write_json(tmp_path / "facts.json", {"path": tmp_path}, default=str)
    assert json.loads((tmp_path / "facts.json").read_text()) == {"path": str(tmp_path)}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "facts.json", float("nan"), allow_nan=False)
