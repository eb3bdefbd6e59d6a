import gzip

import pytest

from dynmix.task_records import Record, read_records


def test_a_file_is_read_record_by_record(tmp_path):
    path, lines = tmp_path / "x.jsonl", b'{"text": "fine", "id": 3}\n\n{"context": "", "gold": " a", "choices": null}\n'
    expected = [Record(f"{path}, line 1", "", "fine"), Record(f"{path}, line 3", "", " a")]
    path.write_bytes(lines)
    assert read_records(path) == expected
    zipped = tmp_path / "x.jsonl.gz"
    zipped.write_bytes(gzip.compress(lines[:-1]))
    assert [record.gold for record in read_records(zipped)] == ["fine", " a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"context": "a"}', "line 2: no field 'gold'; there are 'context'"),
        ('{"gold": " a"}', "line 2: no field 'context'"),
        ('{"context": null, "gold": " a"}', "line 2: field 'context' holds null"),
        ('{"context": "", "gold": ""}', "line 2: field 'gold' is empty"),
        ('{"text": ""}', "line 2: field 'text' is empty"),
        ('{"context": "", "gold": 3}', "line 2: field 'gold' holds int"),
        ('{"context": "", "gold": " a", "choices": " a"}', "line 2: field 'choices' is str"),
        ('{"context": "", "gold": " a", "choices": [" a", " a"]}', "field 'choices' has 1 different texts"),
        ('{"context": "", "gold": " a", "choices": [" b", "a"]}', "line 2: field 'gold' ' a' is none of"),
        ('{"context": "", "gold": " a", "choices": [" a", null]}', "field 'choices' holds null"),
        ('{"text": "\\ud800"}', "line 2: field 'text' is not UTF-8"),
        ("[1]", "line 2: a JSON list"),
        ('{"text": "a"', "line 2: not JSON"),
        ("\udcff", "line 2: not JSON"),
    ],
)
def test_a_broken_record_is_named_with_file_line_and_field(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(ValueError, match=f"x.jsonl, {message}" if message.startswith("line") else message):
        read_records(path)
