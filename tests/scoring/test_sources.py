from pathlib import Path

import pytest

from dynmix.checkpoints import Checkpoint
from dynmix.scoring import Source, all_sources, peak_sources
from dynmix.scoring.sources import check_sources


def test_each_task_is_scored_by_the_checkpoint_where_it_peaks():
    late, early = Checkpoint(Path("run/step-90"), 90, 1.0), Checkpoint(Path("run/step-10"), 10, 2.0)
    assert peak_sources({"a": late, "b": early, "c": Checkpoint(late.path, 90, 3.0)}) == [
        Source("step-10", 10, early.path, ("b",)),
        Source("step-90", 90, late.path, ("a", "c")),
    ]


def test_every_task_by_every_checkpoint():
    points = [Checkpoint(Path(f"{run}/step-{step}"), step) for run, step in (("x", 1), ("x", 2), ("y", 2))]
    found = all_sources(points, ["a", "b"])
    assert [source.name for source in found] == ["step-1", "x-step-2", "y-step-2"]
    assert {source.tasks for source in found} == {("a", "b")}


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([], "checkpoints is empty"),
        ([("s", ("a",)), ("s", ("b",))], "2 have the name 's'; give each once"),
        ([("a/b", ("a", "b"))], "'a/b' cannot be the name of a folder"),
        ([(".s", ("a", "b"))], "'.s' cannot be"),
        ([("s", ())], r"'s' has tasks=\[\]"),
        ([("s", ("a", "a", "b"))], "each once"),
        ([("s", ("a", "c", "b"))], r"is to score task 'c'; there are \['a', 'b'\]"),
        ([("s", ("a",))], "task 'b' is scored by no checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused(sources, said):
    with pytest.raises(ValueError, match=said):
        check_sources([Source(name, 1, Path("x"), tasks) for name, tasks in sources], ["a", "b"])


def test_a_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path):
    def source(name, **files):
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file.replace("_", ".")).write_bytes(content)
        return Source("s", 1, folder, ("a",))

    weights = bytes(range(256)) * 40_000
    changed = weights[:-1] + b"x"
    first = source("one", config_json=b"{}", model_safetensors=weights, trainer_state=b"1")
    assert (
        source("two", config_json=b"{}", model_safetensors=weights, trainer_state=b"2").fingerprint == first.fingerprint
    )
    others = [
        source("three", config_json=b"{}", model_safetensors=changed),
        source("four", config_json=b"{}", model_safetensors=weights[1:]),
        source("five", config_json=b"[]", model_safetensors=weights),
        source("six", weights_bin=b"1"),
        Source("s", 1, tmp_path / "one" / "model.safetensors", ("a",)),
    ]
    assert len({each.fingerprint for each in [first, *others]}) == 6
    # Where the weights are in no safetensors, they are in whatever else is there.
    pickled = [source(f"own {n}", config_json=b"{}", model_bin=bytes(9) + n) for n in (b"1", b"2")]
    assert pickled[0].fingerprint != pickled[1].fingerprint
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no folder with a file in it"):
        _ = Source("s", 1, tmp_path / "empty", ("a",)).fingerprint
