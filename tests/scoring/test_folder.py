import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dynmix.scoring.folder import OtherConfiguration, ScoreFolder, read_losses, read_scores

CONFIG = {
    "shard_samples": 3,
    "domains": [{"name": "a", "samples": 2}, {"name": "b", "samples": 2}],
    "checkpoints": [{"name": "x", "step": 1, "tasks": ["t", "u.v"]}, {"name": "y.0", "step": 2, "tasks": ["t"]}],
}


def part(checkpoint, tasks, shard):
    ids, names, seed = [([0, 1, 0], ["a", "a", "b"], 0), ([1], ["b"], 1)][shard]
    scores = np.random.default_rng([seed, len(tasks)]).random((len(tasks) + 1, len(ids))).astype(np.float32)
    columns = [*(f"score/{task}/{checkpoint}" for task in tasks), f"loss/{checkpoint}"]
    base = {"id": ids, "domain": pa.array(names).dictionary_encode(), "tokens": np.full(len(ids), 7)}
    return pa.table(base | dict(zip(columns, scores, strict=True)))


def write_all(folder, *shards):
    for shard in shards:
        for checkpoint in CONFIG["checkpoints"]:
            folder.write(checkpoint["name"], shard, part(checkpoint["name"], checkpoint["tasks"], shard))


def test_what_is_written_is_read_in_order(tmp_path):
    folder = ScoreFolder.begin(tmp_path, CONFIG)
    folder.write("x", 1, part("x", ["t", "u.v"], 1))
    folder.tidy()  # which takes nothing that is still needed
    assert (folder.done("x", 1), folder.done("y.0", 1)) == (True, False)
    write_all(folder, 1, 0)
    assert not [*tmp_path.glob("parts/*/*")]
    folder.tidy()
    found, losses = read_scores(tmp_path), read_losses(tmp_path)
    parts = {c["name"]: [part(c["name"], c["tasks"], shard) for shard in (0, 1)] for c in CONFIG["checkpoints"]}
    for column, values in zip(found.columns, found.scores.T, strict=True):
        name = f"score/{column.task}/{column.checkpoint}"
        assert (
            values.tolist()
            == pa.concat_tables(table.select([name]) for table in parts[column.checkpoint])[name].to_pylist()
        )
    assert losses.scores[:, 1].tolist() == pa.concat_tables(parts["y.0"])["loss/y.0"].to_pylist()
    assert found.domain.tolist() == [0, 0, 1, 1]
    assert found.row.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("kind", ["domains", "tasks", "checkpoints"])
def test_what_is_called_path_is_compared_as_anything_else(tmp_path, kind):
    def config(fingerprint, path="anywhere"):
        named = {"name": "path", "samples": 1, "path": path, "fingerprint": fingerprint}
        return CONFIG | {kind: [*CONFIG.get(kind, []), named]}

    ScoreFolder.begin(tmp_path, config("older"))
    folder = ScoreFolder.begin(tmp_path, config("old"))  # nothing was scored yet
    assert folder.config == config("old")
    folder.write("x", 0, part("x", ["t"], 0))
    ScoreFolder.begin(tmp_path, config("old", path="moved"))
    with pytest.raises(OtherConfiguration, match=f"{kind[:-1]}.path.fingerprint was 'old' and is 'new'"):
        ScoreFolder.begin(tmp_path, config("new"))


@pytest.mark.parametrize("moment", range(6))
def test_folders_that_another_process_tidies_away_are_made_again(tmp_path, monkeypatch, moment):
    """Between any two of the calls that a file takes: mkdir (and its is_dir), open, fsync, rename."""
    folder, events = ScoreFolder.begin(tmp_path, CONFIG), iter(range(1000))

    def first_tidied(call):
        def called(*args, **kwargs):
            if next(events) == moment:
                shutil.rmtree(tmp_path / "parts", ignore_errors=True)
            return call(*args, **kwargs)

        return called

    for owner, name in ((os, "mkdir"), (Path, "is_dir"), (os, "getpid"), (os, "fsync"), (os, "replace")):
        monkeypatch.setattr(owner, name, first_tidied(getattr(owner, name)))
    folder.write("x", 0, part("x", ["t", "u.v"], 0))
    assert next(events) > moment
    monkeypatch.undo()
    folder.write("y.0", 0, part("y.0", ["t"], 0))
    assert folder.missing == [1]


def test_scores_that_another_process_wrote_meanwhile_are_not_without_a_configuration(tmp_path, monkeypatch):
    glob = Path.glob

    def late(self, pattern):
        monkeypatch.undo()
        write_all(ScoreFolder.begin(tmp_path, CONFIG), 0)
        return glob(self, pattern)

    monkeypatch.setattr(Path, "glob", late)
    assert ScoreFolder.begin(tmp_path, CONFIG).missing == [1]


def test_two_that_join_the_same_parts_do_so_once(tmp_path, monkeypatch):
    folder, other = ScoreFolder.begin(tmp_path, CONFIG), ScoreFolder(tmp_path)
    read = ScoreFolder._read

    def late(self, file, columns=None):
        monkeypatch.setattr(ScoreFolder, "_read", read)
        other.join([0])
        return read(self, file, columns)

    folder.write("x", 0, part("x", ["t", "u.v"], 0))
    monkeypatch.setattr(ScoreFolder, "_read", late)
    folder.write("y.0", 0, part("y.0", ["t"], 0))
    assert folder.missing == [1]


def test_who_is_late_does_not_mind_that_all_is_done_and_tidied_up(tmp_path, monkeypatch):
    folder, other = ScoreFolder.begin(tmp_path, CONFIG), ScoreFolder(tmp_path)
    replace = os.replace

    def late(draft, file):
        monkeypatch.setattr(os, "replace", replace)
        write_all(other, 0, 1)
        other.tidy()
        replace(draft, file)

    monkeypatch.setattr(os, "replace", late)
    write_all(folder, 0, 1)
    folder.tidy()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "scores-00000.parquet", "scores-00001.parquet", "scoring.json"
    ]  # fmt: skip


def test_a_full_disk_does_not_keep_half_a_file(tmp_path, monkeypatch):
    folder = ScoreFolder.begin(tmp_path, CONFIG)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        folder.write("x", 1, part("x", ["t", "u.v"], 1))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["scoring.json"]


def test_a_folder_that_vanishes_is_an_error(tmp_path, monkeypatch):
    folder = ScoreFolder.begin(tmp_path, CONFIG)
    monkeypatch.setattr(os, "replace", lambda draft, file: os.stat(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError):
        folder.write("x", 0, part("x", ["t", "u.v"], 0))


@pytest.mark.parametrize("damage", [lambda whole: whole[:-9], lambda whole: whole[:4] + bytes(40) + whole[44:]])
def test_a_damaged_shard_is_named_with_what_to_do(tmp_path, damage):
    write_all(ScoreFolder.begin(tmp_path, CONFIG), 0, 1)
    file = tmp_path / "scores-00001.parquet"
    file.write_bytes(damage(file.read_bytes()))  # its end is missing; the header of its first page is zeros
    with pytest.raises(ValueError, match=r"(?s)scores-00001.parquet is damaged .*remove it and run"):
        read_scores(tmp_path)


def test_a_flipped_bit_of_any_column_is_found_out(tmp_path):
    write_all(ScoreFolder.begin(tmp_path, CONFIG), 0, 1)
    file = tmp_path / "scores-00001.parquet"
    group, whole = pq.ParquetFile(file).metadata.row_group(0), file.read_bytes()
    for column in map(group.column, range(group.num_columns)):
        first = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
        last = first + column.total_compressed_size - 1
        file.write_bytes(whole[:last] + bytes([whole[last] ^ 4]) + whole[last + 1 :])
        with pytest.raises(ValueError, match=r"(?s)scores-00001.parquet is damaged .*remove it and run"):
            read_scores(tmp_path), read_losses(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", '{"domains": 3}', "[]"])
def test_a_damaged_configuration_is_found_out(tmp_path, content):
    (tmp_path / "scoring.json").write_text(content)
    with pytest.raises(ValueError, match=r"scoring.json is damaged .*another folder"):
        ScoreFolder(tmp_path)
