import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from dynmix import InRun, MixtureDataset, Static, TiKMiXD
from dynmix.callbacks import MixtureHook
from dynmix.journal import Journal

MICRO = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "data_options": {"homogeneous": 4}}
STEPS = 9  # a stage of 5, whose window begins after the first step, and what follows it


@pytest.fixture(scope="module")
def whole(training: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that measures itself, with a checkpoint in the middle of the window; its folder and trainer."""
    folder = tmp_path_factory.mktemp("in-run")
    saved = {"save_strategy": "steps", "save_steps": 3}
    return folder, training.run(folder, steps=STEPS, options={"in_run": InRun(window=3)}, **MICRO, **saved)


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [dict(row) for row in Journal(folder / "dynmix" / "journal.jsonl").rows()]
    for row in found:
        row.pop("seconds")
        row.pop("time", None)
    return found


def test_a_run_that_measures_itself_stays_what_it_is(training: Any, whole: tuple[Path, Any], tmp_path: Path) -> None:
    folder, trainer = whole
    stages = [(s.start, s.end, s.weights) for s in trainer.train_dataset.schedule.stages]
    assert stages[0][2] != pytest.approx(stages[1][2], abs=0.01)
    without = training.run(tmp_path, steps=STEPS, callback=False, stages=stages, **MICRO)
    assert training.facts(trainer) == training.facts(without)
    row = rows(folder)[1]
    assert (row["step"], row["error"]) == (4, None)
    # Of some domains whole micro-batches were seen, of those hardly seen single sequences: no number a sequence.
    assert row["scored_tokens"] is None
    assert not [words for words in row["warnings"] if "in-run" in words]
    influence = torch.tensor(row["influence"])
    assert influence.shape == (3, 3)  # two tasks and the guard
    assert (influence[0, 0] > influence[0, 1:]).all()
    assert (influence[1, 1] > influence[1, ::2]).all()
    assert (torch.tensor(row["standard_error"]) > 0).all()
    assert torch.tensor(row["standard_error"]).isfinite().all()


def test_it_goes_on_in_the_middle_of_a_window_bit_for_bit(training: Any, whole: tuple[Path, Any]) -> None:
    folder, trainer = whole
    before = rows(folder)
    for later in (6, 9):
        shutil.rmtree(folder / f"checkpoint-{later}")
    again = training.run(folder, steps=STEPS, options={"in_run": InRun(window=3)}, resume=True, **MICRO)
    assert trainer.order[3 * 8 :] == again.order
    assert training.facts(trainer)["parameters"] == training.facts(again)["parameters"]
    assert rows(folder) == before
    assert [file.name for file in (folder / "dynmix" / "in_run").iterdir()] == ["stage-0001.safetensors"]


def test_it_goes_on_in_a_window_that_is_several_stages_old(training: Any, tmp_path: Path) -> None:
    given = {"options": {"in_run": InRun(window=1), "stage_steps": 3}, **MICRO}
    whole = training.run(tmp_path, steps=19, save_strategy="steps", save_steps=10, **given)
    before = rows(tmp_path)
    files = sorted(file.name[6:10] for file in (tmp_path / "dynmix" / "in_run").iterdir())
    assert files == ["0004", "0005", "0006"]  # the first has a window that is open at the checkpoint
    shutil.rmtree(tmp_path / "checkpoint-19")
    again = training.run(tmp_path, steps=19, resume=True, **given)
    assert training.facts(whole)["parameters"] == training.facts(again)["parameters"]
    assert rows(tmp_path) == before


class Loop:
    """A plain loop with a hook, whose micro-batches are those positions of each step."""

    def __init__(self, training: Any, in_run: InRun | None, positions: Any, output: Path, **options: Any) -> None:
        self.dataset = training.dataset(samples=STEPS * 8, **options)
        self.model = training.model()
        self.hook = MixtureHook(
            self.model,
            self.dataset,
            training.tasks(),
            mixer=TiKMiXD(confidence=0.0),
            stage_steps=5,
            batch_size=8,
            output=output,
            in_run=in_run,
            **{"probe_sequences": 8, "curvature_sequences": 16, "task_sequences": 12, "keep": 0},
        )
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        for step in range(STEPS - 1):
            for some in positions:
                loader = DataLoader(self.dataset, batch_size=8, sampler=[8 * step + i for i in some])
                for batch in loader:
                    self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            self.hook.step()
        self.rows = list(Journal(output / "journal.jsonl").rows())


def test_mixed_micro_batches_where_they_should_not_be_are_measured_at_the_boundary(
    training: Any, tmp_path: Path
) -> None:
    # The hook looks at the last one it knows of, and that is of one domain.
    positions = [range(0, 8, 2), range(1, 4, 2), range(5, 8, 2)]
    loop = Loop(training, InRun(window=3), positions, tmp_path, homogeneous=4)
    [warning] = [words for words in loop.rows[1]["warnings"] if "in-run" in words]
    assert "measured at its boundary instead: ValueError: a micro-batch of 4 sequences holds several domains" in warning
    assert loop.rows[1]["influence"] is not None
    assert loop.rows[1]["error"] is None


def test_mixed_micro_batches_sequence_by_sequence(training: Any, tmp_path: Path) -> None:
    loop = Loop(training, InRun(window=3, every=2, least=2), [range(4), range(4, 8)], tmp_path / "a")
    assert not [words for words in loop.rows[1]["warnings"] if "in-run" in words]
    influence = torch.tensor(loop.rows[1]["influence"])
    assert (influence.diagonal()[:2] > influence[:2, 2]).all()
    assert loop.rows[1]["scored_tokens"] == dict.fromkeys(training.DOMAINS, training.LENGTH - 1)
    assert torch.tensor(loop.rows[1]["standard_error"]).isfinite().all()
    assert loop.hook.controller.state_dict()["in_run"] is None  # the window is closed


def test_what_does_not_go_together_is_refused(training: Any, tmp_path: Path) -> None:
    for wrong, message in (
        ({"window": 0}, r"InRun\(window=0\): at least 1"),
        ({"window": 3, "folds": 1}, r"InRun\(folds=1\): at least 2"),
        ({"window": 3, "every": 4}, r"from 1 to window=3 steps"),
    ):
        with pytest.raises(ValueError, match=message):
            InRun(**wrong)
    data, tasks = training.dataset(homogeneous=4), training.tasks()
    for dataset, mixer, options, message in (
        (data, TiKMiXD(), {"in_run": InRun(window=4)}, "at most stage_steps - 2 = 3 steps"),
        (data, Static(), {"in_run": InRun(window=3)}, "this mixer needs no influence"),
        (data, "tikmix-m", {"in_run": InRun(window=3)}, r"this mixer needs \['measure'\]"),
        (training.dataset(), TiKMiXD(), {"in_run": InRun(window=3)}, r"MixtureDataset\(homogeneous=...\)"),
        (data, TiKMiXD(), {"in_run": InRun(window=3), "batch_size": 8}, "pass output=, a folder"),
        (data, TiKMiXD(), {"batch_size": 6}, "a step takes whole groups of the homogeneous=4"),
    ):
        with pytest.raises(ValueError, match=message):
            MixtureHook(training.model(), dataset, tasks, mixer, 5, **options)
    with pytest.raises(ValueError, match="micro-batches of 8 sequences would hold several domains"):
        training.run(tmp_path, data_options={"homogeneous": 4})


def test_it_measures_the_domains_that_are_left_where_one_is_gone(training: Any, tmp_path: Path) -> None:
    def loop(names: list[str], weights: dict[str, float]) -> MixtureHook:
        rows = {name: training.sequences(number) for number, name in enumerate(training.DOMAINS) if name in names}
        dataset = MixtureDataset(rows, weights, num_samples=96, block=8, homogeneous=4)
        return MixtureHook(
            training.model(),
            dataset,
            training.tasks(),
            mixer=TiKMiXD(confidence=0.0, upper={"noise": 0.0}),
            stage_steps=5,
            batch_size=8,
            output=tmp_path,
            in_run=InRun(window=3),
            **{"probe_sequences": 8, "curvature_sequences": 16, "task_sequences": 12, "keep": 0},
        )

    def steps(hook: MixtureHook, last: int) -> None:
        for batch in DataLoader(hook.dataset, batch_size=4, sampler=range(8 * hook.steps, 8 * last)):
            hook.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
            if hook.dataset.read_until % 8 == 0:
                hook.model.zero_grad()
                hook.step()

    first = loop(["web", "code", "noise"], {"web": 0.5, "code": 0.5, "noise": 0.0})
    steps(first, 5)
    second = loop(["web", "code"], {"web": 0.5, "code": 0.5})
    second.load_state_dict(first.state_dict())
    steps(second, 9)
    row = Journal(tmp_path / "journal.jsonl").rows()[2]
    assert (row["step"], row["error"]) == (9, None)
    assert not [words for words in row["warnings"] if "in-run" in words]
    assert row["influence"] is not None
    influence = torch.tensor(row["influence"])
    assert (influence[:, :2] != 0).all()
    assert (influence[:, 2] == 0).all()


def test_a_domain_that_joins_in_a_window_is_measured_as_in_a_run_that_resumes(training: Any, tmp_path: Path) -> None:
    def loop(name: str, names: tuple[str, ...]) -> MixtureHook:
        sequences = {name: training.sequences(training.DOMAINS.index(name)) for name in names}
        weights = {name: 0.0 if name == "noise" else 0.5 for name in names}
        return MixtureHook(
            training.model(0.0),
            MixtureDataset(sequences, weights, num_samples=96, block=8, homogeneous=8),
            training.tasks(),
            mixer=TiKMiXD(confidence=0.0),
            stage_steps=5,
            batch_size=8,
            output=tmp_path / name,
            in_run=InRun(window=3),
            **{"probe_sequences": 8, "curvature_sequences": 16, "task_sequences": 12, "keep": 0},
        )

    def steps(hook: MixtureHook, last: int) -> None:
        for batch in DataLoader(hook.dataset, batch_size=8, sampler=range(8 * hook.steps, 8 * last)):
            hook.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
            hook.model.zero_grad()
            hook.step()

    first, again = loop("a", ("web", "code")), loop("b", training.DOMAINS)
    steps(first, 2)
    first.dataset.extend({"noise": training.sequences(2)})
    state = json.loads(json.dumps(first.state_dict()))
    steps(first, 5)
    shutil.copytree(tmp_path / "a" / "in_run", tmp_path / "b" / "in_run")
    again.load_state_dict(state)
    steps(again, 5)
    one, other = (Journal(tmp_path / name / "journal.jsonl").rows()[-1] for name in "ab")
    assert one["error"] is None
    assert (one["influence"], one["weights"]) == (other["influence"], other["weights"])
    assert (torch.tensor(one["influence"])[:, 2] != 0).all()
