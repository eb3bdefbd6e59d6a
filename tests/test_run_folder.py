import json
import os
from pathlib import Path

from dynmix.run_folder import RunFolder


def test_the_configuration_of_a_run_may_name_any_file(tmp_path):
    facts = {"domain": os.fsdecode(b"stadt-\xc3\xa4-\xff"), "path": Path("a")}
    RunFolder(tmp_path / "run").write_config(facts)
    assert json.loads((tmp_path / "run" / "config.json").read_bytes()) == facts | {"path": "a"}
