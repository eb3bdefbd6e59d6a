import io
import json
import sys

import numpy as np
import pytest
import torch

import dynmix.measurement
import dynmix.run_folder
from dynmix import EKFAC, Identity, Influence, MixtureController, MixtureDataset, Static, TiKMiXD
from dynmix.journal import Journal
from dynmix.mixers import Mixer, Proposal
from dynmix.saved_influence import propose_from, read_influence
from tests.small import Bigram

NAMES = ("a", "b")
BATCH, STEPS = 4, 5


def sequences(domain: int, rows: int):
    return [{"input_ids": torch.tensor([domain, row % 64, row // 64, 3, 4])} for row in range(rows)]


def dataset(rows=(200, 300), samples=100, weights="natural"):
    return MixtureDataset(
        {name: sequences(i, n) for i, (name, n) in enumerate(zip(NAMES, rows, strict=True))},
        weights=weights,
        num_samples=samples,
        block=BATCH,
    )


def controller(data, mixer=None, **options):
    sizes = {"probe_sequences": 10, "curvature_sequences": 20, "task_sequences": 12}
    options = {"stage_steps": STEPS} | sizes | options
    return MixtureController(data, {"t": sequences(0, 6)}, mixer or TiKMiXD(), **options)


def rows_of(batches) -> set[tuple[int, int]]:
    return {(int(d), int(low + 64 * high)) for batch in batches for d, low, high in batch["input_ids"][:, :3]}


def begun(loop, model=None, step=0):
    """The loop, planned and begun after so many steps."""
    loop.plan(batch_size=BATCH)
    loop.begin(model or Bigram(), step)
    return loop


def run(loop, model=None, steps=25):
    model = model or Bigram()
    begun(loop, model)
    return [loop.step_ended(model, step) for step in range(1, steps + 1)]


@pytest.fixture
def measured(monkeypatch):
    """The domains and the curvature's batches of each measurement, the first of which is the rehearsal's."""
    seen, real = [], dynmix.measurement.group_influence

    def measure(model, domains, *args, curvature_batches=None, **kwargs):
        seen.append((domains, curvature_batches))
        return real(model, domains, *args, curvature_batches=curvature_batches, **kwargs)

    monkeypatch.setattr(dynmix.measurement, "group_influence", measure)
    return seen


def test_the_curvature_is_the_usual_ekfac_if_none_is_given() -> None:
    assert controller(dataset()).measurement.curvature == EKFAC(damping=0.1)


def test_decides_one_step_before_each_boundary_and_not_after_the_last():
    loop = controller(dataset())
    logs = run(loop)
    assert [step for step, entry in enumerate(logs, 1) if entry] == [4, 9, 14, 19]
    stages = loop.dataset.schedule.stages
    assert [(s.start, s.end) for s in stages] == [(0, 20), (20, 40), (40, 60), (60, 80), (80, None)]


def test_the_last_of_max_stages_goes_on_to_the_end(tmp_path):
    loop = controller(dataset(), max_stages=3, output=tmp_path / "whole")
    logs = run(loop)
    assert [step for step, entry in enumerate(logs, 1) if entry] == [4, 9]
    assert [(s.start, s.end) for s in loop.dataset.schedule.stages] == [(0, 20), (20, 40), (40, None)]
    assert loop.finish(Bigram(), 25)
    rows = Journal(tmp_path / "whole/journal.jsonl").rows()
    assert [(row["kind"], row["start"], row["end"]) for row in rows][-2:] == [("stage", 40, None), ("final", 100, None)]
    enough = controller(dataset(), max_stages=5)
    assert [step for step, entry in enumerate(run(enough), 1) if entry] == [4, 9, 14, 19]
    assert [(s.start, s.end) for s in enough.dataset.schedule.stages][-1] == (80, None)


@pytest.mark.parametrize("at", [3, 7, 12])
def test_a_run_of_max_stages_goes_on_from_a_checkpoint_with_the_same_decisions(at):
    torch.manual_seed(0)
    model = Bigram()
    whole = begun(controller(dataset(), max_stages=3), model)
    for step in range(1, 26):
        whole.step_ended(model, step)
        if step == at:
            state = json.loads(json.dumps(whole.state_dict()))
    again = controller(dataset(), max_stages=3)
    again.load_state_dict(state)
    begun(again, model, at)
    for step in range(at + 1, 26):
        again.step_ended(model, step)
    assert again.dataset.schedule.stages == whole.dataset.schedule.stages
    with pytest.raises(ValueError, match="has max_stages=3, this run None: pass that of"):
        controller(dataset()).load_state_dict(state)


def test_where_the_only_measurement_fails_the_first_mixture_goes_on_to_the_end(monkeypatch, caplog):
    loop = begun(controller(dataset(weights={"a": 0.3, "b": 0.7}), max_stages=2))
    monkeypatch.setattr(loop.measurement, "influence", lambda *_: 1 / 0)
    logs = [loop.step_ended(Bigram(), step) for step in range(1, 26)]
    assert [step for step, entry in enumerate(logs, 1) if entry] == [4]
    assert "stage 1 keeps the weights of the one before: ZeroDivisionError" in caplog.text
    assert [(s.start, s.end) for s in loop.dataset.schedule.stages] == [(0, 20), (20, None)]
    assert loop.dataset.schedule.weights_at(99) == pytest.approx({"a": 0.3, "b": 0.7})


def test_probes_are_not_trained_on_within_the_coming_stage(measured):
    loop = controller(dataset(rows=(60, 60), samples=400), stage_steps=10)
    run(loop, steps=100)
    stages = loop.dataset.schedule.stages
    assert len(measured) == len(stages) == 10
    for (domains, pooled), stage in zip(measured[1:], stages[1:], strict=True):
        domain, row, _ = loop.dataset.schedule.assign(stage.start, stage.end or 400)
        trained = set(zip(domain.tolist(), row.tolist(), strict=True))
        for name in NAMES:
            assert len(rows_of(domains[name])) == 10
            assert not rows_of(domains[name]) & trained
        assert not rows_of(pooled) & trained


def test_a_domain_too_small_to_hold_probes_back_says_so(caplog):
    run(controller(dataset(rows=(200, 12), samples=100, weights={"a": 0.5, "b": 0.5})))
    assert "probe sequences of domain 'b' are trained on within the next stage" in caplog.text


def test_the_curvature_is_fitted_in_the_proportions_of_the_mixture(measured):
    run(controller(dataset(weights={"a": 0.9, "b": 0.1}), Static(observe=True)))
    for _, batches in measured[1:]:
        counts = np.bincount(np.concatenate([batch["input_ids"][:, 0] for batch in batches]), minlength=2)
        assert counts.tolist() == [18, 2]


def test_the_mixer_gets_the_prior_and_the_bounds_that_max_epochs_leaves():
    calls = []

    class Recorder(Mixer):
        def propose(self, influence, prior, upper=None):
            calls.append((influence, dict(prior), dict(upper)))
            return Proposal({"a": 0.25, "b": 0.75} if upper["a"] > 0.25 else dict(prior) | {"a": 0.0, "b": 1.0})

    data = dataset(rows=(50, 300), samples=100, weights={"a": 0.5, "b": 0.5})
    run(controller(data, Recorder(), max_epochs={"a": 0.5}))
    drawn = [data.schedule.counts(20 * k)[0] for k in range(1, 5)]
    calls = calls[1:]  # the first is the rehearsal's
    assert [prior for _, prior, _ in calls[:2]] == [
        pytest.approx({"a": 0.5, "b": 0.5}),
        pytest.approx({"a": 0.25, "b": 0.75}),
    ]
    assert [upper["a"] for _, _, upper in calls] == pytest.approx([max(0, 25 - n) / 20 for n in drawn])
    assert all(influence is None for influence, _, _ in calls)


def test_files_of_a_run_hold_no_code_and_say_what_it_was(tmp_path):
    loop = controller(dataset(), output=tmp_path, keep=1)
    run(loop)
    loop.finish(Bigram(), 25)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [
        "config.json",
        "journal.jsonl",
        "snapshots/stage-0004/model.safetensors",
        "snapshots/stage-0004/snapshot.json",
    ]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mixer"]["name"] == "TiKMiXD"
    assert config["stage_steps"] == STEPS
    assert len(Journal(tmp_path / "journal.jsonl").rows()) == 6


def test_a_run_that_is_rolled_back_keeps_its_own_snapshots_and_not_those_of_what_is_undone(tmp_path):
    first, model = controller(dataset(), output=tmp_path), Bigram()
    begun(first, model)
    for step in range(1, 26):
        first.step_ended(model, step)
        if step == 5:
            state = first.state_dict()
    kept = tmp_path / "snapshots"
    assert sorted(path.name for path in kept.iterdir()) == ["stage-0003", "stage-0004"]
    again = controller(dataset(), output=tmp_path)
    again.load_state_dict(state)
    begun(again, model, 5)
    assert not list(kept.iterdir())
    for step in range(6, 10):
        again.step_ended(model, step)
    assert [path.name for path in kept.iterdir()] == ["stage-0002"]


def test_state_survives_json_and_the_journal_is_cut_back_to_it(tmp_path):
    first = controller(dataset(), output=tmp_path, keep=0)
    model = Bigram()
    begun(first, model)
    states = {}
    for step in range(1, 26):
        first.step_ended(model, step)
        states[step] = json.dumps(first.state_dict())
    rows = Journal(tmp_path / "journal.jsonl").rows()
    second = controller(dataset(), output=tmp_path, keep=0)
    second.load_state_dict(json.loads(states[11]))
    assert Journal(tmp_path / "journal.jsonl").rows() == rows[:3]
    begun(second, model, step=11)
    for step in range(12, 26):
        second.step_ended(model, step)
    again = Journal(tmp_path / "journal.jsonl").rows()
    assert [row["weights"] for row in again] == [row["weights"] for row in rows]
    assert json.dumps(second.state_dict()) == states[25]


def test_a_state_older_than_the_run_is_refused():
    first = controller(dataset())
    first.plan(batch_size=BATCH)
    old = first.state_dict()
    second = controller(dataset())
    second.load_state_dict(old)
    with pytest.raises(ValueError, match="the stage of sample 20 is not in it"):
        begun(second, step=9)


def test_a_mixer_that_fails_keeps_the_weights(caplog):
    class Broken(Static):
        calls = 0

        def propose(self, *args, **kwargs):
            Broken.calls += 1
            if Broken.calls > 1:
                raise ZeroDivisionError("bad luck")
            return super().propose(*args, **kwargs)

    data = dataset()
    run(controller(data, Broken()))
    assert len(data.schedule.stages) == 5
    assert all(stage.weights == data.schedule.stages[0].weights for stage in data.schedule.stages)
    assert "bad luck" in caplog.text


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0}, "missing"),
        ({"a": 0.9, "b": 0.6}, "sum to 1.5"),
        ({"a": float("nan"), "b": 0.5}, "finite"),
        ({"a": 0.9, "b": 0.1}, "above its bound"),
    ],
)
def test_an_answer_that_is_no_mixture_keeps_the_weights_and_at_the_start_is_an_error(weights, message, caplog):
    class Wrong(Static):
        late = True

        def propose(self, influence, prior, upper=None):
            return Proposal(weights) if not self.late else super().propose(influence, prior, upper)

    mixer = Wrong()
    data = dataset(weights={"a": 0.5, "b": 0.5})
    loop = begun(controller(data, mixer, max_epochs={"a": 0.07}))
    mixer.late = False
    loop.step_ended(Bigram(), 4)
    assert data.schedule.stages[1].weights["a"] <= 0.5
    assert message in caplog.text
    early = controller(dataset(weights={"a": 0.5, "b": 0.5}), mixer, max_epochs={"a": 0.07})
    with pytest.raises(ValueError, match=message):
        begun(early)


def test_a_bound_on_a_domain_that_is_not_there_fails_at_the_start():
    loop = controller(dataset(), TiKMiXD(upper={"wbe": 0.3}))
    with pytest.raises(ValueError, match="no domain 'wbe'"):
        begun(loop)


def test_an_influence_that_is_not_finite_is_not_even_shown_to_the_mixer(monkeypatch, tmp_path):
    real, calls = dynmix.measurement.group_influence, []

    def measure(*args, **kwargs):
        calls.append(1)
        influence = real(*args, **kwargs)
        return influence if len(calls) == 1 else Influence([[np.nan, 1.0]], influence.tasks, influence.domains)

    class Blind(Static):
        needs = frozenset({"influence"})

        def __init__(self):
            pass

        def propose(self, influence, prior, upper=None):
            return Proposal({"a": 0.9, "b": 0.1})

    monkeypatch.setattr(dynmix.measurement, "group_influence", measure)
    data = dataset()
    run(controller(data, Blind(), output=tmp_path, keep=0))
    assert all(stage.weights == data.schedule.stages[0].weights for stage in data.schedule.stages)
    row = Journal(tmp_path / "journal.jsonl").rows()[1]
    assert "not finite" in row["error"]
    assert row["influence"] == [[None, 1.0]]


def test_a_failed_measurement_still_keeps_within_max_epochs(monkeypatch):
    real, calls = dynmix.measurement.group_influence, []

    def measure(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("bad luck")
        return real(*args, **kwargs)

    monkeypatch.setattr(dynmix.measurement, "group_influence", measure)
    data = dataset(rows=(200, 30), samples=100, weights={"a": 0.5, "b": 0.5})
    run(controller(data, max_epochs={"b": 1}))
    assert data.schedule.counts(100)[1] <= 30 + 2


@pytest.mark.parametrize("seed", range(12))
def test_a_run_at_its_limit_of_epochs_can_be_resumed(seed):
    """Stages keep their proportions to within a few samples, so a limit may be passed by one or two."""

    def make():
        domains = {"a": sequences(0, 200), "b": sequences(1, 30)}
        return MixtureDataset(domains, {"a": 0.5, "b": 0.5}, num_samples=100, block=BATCH, seed=seed)

    first = controller(make(), Static(), max_epochs={"b": 1})
    run(first)
    second = controller(make(), Static(), max_epochs={"b": 1})
    second.load_state_dict(first.state_dict())
    begun(second, step=25)


@pytest.mark.parametrize("steps", [23, 10])
def test_a_run_that_takes_all_that_may_be_read_can_be_resumed_in_its_last_short_stage(steps):
    def loop():
        return controller(dataset(rows=(46, 46), samples=92), max_epochs=1, curvature=Identity())

    first = loop()
    run(first, steps=20)
    assert first.dataset.schedule.starts[-1] == 80
    second = loop()
    second.load_state_dict(first.state_dict())
    second.plan(batch_size=BATCH, max_steps=steps)
    second.begin(Bigram(), step=20)


@pytest.mark.parametrize("rows", [44, 40, 31])  # exhausted in the last stage that is decided, or where it would begin
@pytest.mark.parametrize("mixer", ["tikmix-d", "static"])
def test_data_that_is_exhausted_before_the_planned_end_ends_the_run_and_not_with_an_error(rows, mixer, tmp_path):
    domains = {name: sequences(i, rows) for i, name in enumerate(NAMES)}
    data = MixtureDataset(domains, num_samples=100, block=BATCH, max_epochs=1)
    loop, model = controller(data, mixer, output=tmp_path, keep=0), Bigram()
    begun(loop, model)
    step = 0
    while not loop.why_over(step):
        step += 1
        loop.step_ended(model, step)
    loop.finish(model, step)
    assert step == 2 * rows // BATCH
    assert not any(row["error"] for row in Journal(tmp_path / "journal.jsonl").rows())


def test_the_last_row_counts_the_samples_that_there_were(tmp_path):
    loop = controller(dataset(samples=98), output=tmp_path, keep=0)
    run(loop)
    loop.finish(Bigram(), 25)
    last = Journal(tmp_path / "journal.jsonl").rows()[-1]
    assert last["start"] == 98
    assert sum(last["tokens"].values()) == 98 * 5
    assert last["seconds"]["measure"] > 0


def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    loop = begun(controller(dataset(), output=tmp_path, keep=1))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dynmix.run_folder, "write_snapshot", full)
    monkeypatch.setattr(Journal, "append", full)
    assert loop.step_ended(Bigram(), 4)
    assert len(loop.dataset.schedule.stages) == 2
    assert caplog.text.count("No space left on device") == 2


def test_many_domains_still_share_the_curvature_sequences(measured):
    domains = {f"d{i}": sequences(i % 60, 8) for i in range(50)}
    data = MixtureDataset(domains, "uniform", num_samples=16, block=BATCH)
    loop = MixtureController(
        data, {"t": sequences(0, 6)}, TiKMiXD(confidence=0), stage_steps=2, probe_sequences=2, curvature_sequences=10
    )
    run(loop, steps=3)
    assert sum(len(batch["input_ids"]) for batch in measured[1][1]) == 10
    assert data.schedule.stages[1].weights != data.schedule.stages[0].weights


def test_a_first_sequence_without_a_scored_token_is_no_obstacle():
    task = [{"input_ids": [3]}, *sequences(0, 5)]
    begun(MixtureController(dataset(), {"t": task}, TiKMiXD(), stage_steps=STEPS, probe_sequences=4))
    for mixer in (TiKMiXD(), Static()):  # which reads tasks for the journal alone
        nothing = MixtureController(dataset(), {"t": [{"input_ids": [3]}]}, mixer, stage_steps=STEPS)
        with pytest.raises(ValueError, match=r"tasks\['t'\]: no sequence has a token to score"):
            begun(nothing)


def test_a_first_row_of_a_domain_without_a_scored_token_is_no_obstacle(caplog):
    data = MixtureDataset(
        {
            name: [{**row, "labels": row["input_ids"] if n else torch.full((5,), -100)} for n, row in enumerate(rows)]
            for name, rows in (("a", sequences(0, 200)), ("b", sequences(1, 300)))
        },
        num_samples=100,
        block=BATCH,
    )
    run(controller(data), steps=4)
    assert data.schedule.num_stages == 2
    assert "keeps the weights" not in caplog.text


def test_a_domain_of_which_hardly_a_row_has_a_scored_token_is_refused_in_words_that_are_true():
    rows = [row | {"labels": torch.full((5,), -100)} for row in sequences(0, 200)]
    rows[1] = sequences(0, 2)[1]  # not among those that are looked at, which are spread over it
    loop = controller(MixtureDataset({"a": rows, "b": sequences(1, 300)}, num_samples=100, block=BATCH))
    with pytest.raises(ValueError, match=r"domains\['a'\], of which 32 sequences were looked at: no sequence has a"):
        begun(loop)


def test_more_stages_than_a_schedule_takes_are_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr("dynmix.timetable.MAX_STAGES", 4)
    with pytest.raises(ValueError, match="25 steps would have 5 stages, and a schedule takes 4: make stages longer"):
        controller(dataset()).plan(batch_size=BATCH)
    controller(dataset(), max_stages=4).plan(batch_size=BATCH)
    controller(dataset(), stage_steps=7).plan(batch_size=BATCH)


@pytest.mark.parametrize("mixer", ["tikmix-d", "tikmix-m", "doge", "odm", "ado", "fixed", "staged"])
@pytest.mark.parametrize("then", ["abc", "ab"])
def test_a_run_goes_on_without_a_domain_that_is_not_drawn_and_with_one_that_joined(mixer, then, caplog):
    def loop_of(names):
        domains = {name: sequences("abc".index(name), 200) for name in names}
        weights = {"a": 0.5, "b": 0.5} | dict.fromkeys(domains.keys() - {"a", "b"}, 0.0)
        data = MixtureDataset(domains, weights, num_samples=100, block=BATCH)
        by_hand = {"fixed": {"weights": weights}, "staged": {"stages": [weights, weights]}}
        return controller(data, {"name": mixer} | by_hand.get(mixer, {}), curvature=Identity())

    def steps(loop, model, first, last):
        loop.watch(model)
        for step in range(first, last):
            model(torch.stack([loop.dataset[g]["input_ids"] for g in range(step * BATCH - BATCH, step * BATCH)]))
            loop.step_ended(model, step)

    before, model = loop_of(then), Bigram()
    begun(before, model)
    steps(before, model, 1, 3)
    now = "ab" if then == "abc" else "abc"
    after = loop_of(now)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    begun(after, model, 2)
    steps(after, model, 3, 12)
    stages = after.dataset.schedule.stages
    assert "keeps the weights" not in caplog.text
    assert "taught the mixer nothing" not in caplog.text
    assert len(stages) == 3
    assert now == "abc" or stages[-1].weights["c"] == 0
    assert now == "ab" or mixer not in ("doge", "odm") or stages[-1].weights["c"] > 0.2


def test_a_stage_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="the run of 25 steps ends before its first stage"):
        controller(dataset(), stage_steps=25).plan(batch_size=BATCH)


def test_large_tasks_are_cut_to_a_spread_of_them():
    loop = MixtureController(dataset(), {"t": sequences(0, 60)}, Static(), stage_steps=5, task_sequences=6)
    rows = [
        int(batch["input_ids"][i, 1]) for batch in loop.measurement.sets["t"] for i in range(len(batch["input_ids"]))
    ]
    assert rows == [0, 10, 20, 30, 40, 50]


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("dataset"),
        lambda state: state.update(dataset=None),
        lambda state: state["dataset"].update(fingerprint={}),
        lambda state: state["dataset"]["schedule"]["stages"]["starts"].pop(1),
        lambda state: state["dataset"]["schedule"]["stages"].pop("weights"),
        lambda state: state["dataset"]["schedule"]["stages"]["starts"].__setitem__(1, 21),
    ],
)
def test_a_damaged_state_is_refused_as_such(damage):
    first = controller(dataset())
    run(first)
    state = json.loads(json.dumps(first.state_dict()))
    damage(state)
    with pytest.raises(ValueError, match="damaged"):
        controller(dataset()).load_state_dict(state)


def test_final_losses_that_cannot_be_measured_do_not_end_the_run(tmp_path, monkeypatch):
    loop = controller(dataset(), output=tmp_path, keep=0)
    run(loop)

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(dynmix.measurement, "task_losses", fail)
    loop.finish(Bigram(), 25)
    last = Journal(tmp_path / "journal.jsonl").rows()[-1]
    assert last["kind"] == "final"
    assert "no room" in last["error"]


def test_influence_reaches_the_journal_as_measured(tmp_path, monkeypatch):
    scores, errors = np.array([[1.5, -0.5]]), np.array([[0.1, np.inf]])

    def measure(model, domains, tasks, *args, **kwargs):
        return Influence(scores, list(tasks), list(domains), errors, [2.0], [0.5])

    monkeypatch.setattr(dynmix.measurement, "group_influence", measure)
    loop = controller(dataset(), TiKMiXD(confidence=0), guards=None, output=tmp_path, keep=0)
    logs = run(loop)[3]
    row = Journal(tmp_path / "journal.jsonl").rows()[1]
    assert row["influence"] == [[1.5, -0.5]]
    assert row["standard_error"] == [[0.1, None]]
    assert row["task_loss"] == {"t": 2.0}
    assert logs["dynmix/influence/t/a"] == 1.5
    assert logs["dynmix/task_loss/t"] == 2.0
    assert logs["dynmix/weight/a"] > 0.4


def test_a_row_has_what_decided_where_a_mixer_remembers_and_decides_the_same_again(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)

    def measure(model, domains, tasks, *args, **kwargs):
        errors = generator.uniform(0.5, 1, (1, 2))
        scores = generator.normal(size=(1, 2))
        return Influence(scores, list(tasks), list(domains), errors, [2.0], [0.5], scored_tokens=[2.0, 5.0])

    monkeypatch.setattr(dynmix.measurement, "group_influence", measure)
    run(controller(dataset(), TiKMiXD(confidence=0), guards=None, output=tmp_path, keep=0))
    rows = Journal(tmp_path / "journal.jsonl").rows()
    alone = TiKMiXD(confidence=0).propose(Influence(rows[3]["influence"], ["t"], NAMES), rows[3]["weights_before"])
    assert alone.weights != pytest.approx(rows[3]["weights"], abs=1e-3)
    for row in rows[1:4]:
        influence, facts = read_influence(tmp_path, row["stage"])
        again = propose_from(influence, facts["weights"], "tikmix-d", {"confidence": 0})
        assert again.weights == pytest.approx(row["weights"], abs=1e-6)
        assert again.predicted_gain == pytest.approx(row["predicted_gain"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage_steps": 1}, "stage_steps=1: at least 2"),
        ({"max_stages": 1}, "max_stages=1: at least 2"),
        ({"probe_sequences": 0}, "probe_sequences=0"),
        ({"keep": -1}, "keep=-1"),
        ({"stage_steps": "500"}, "stage_steps='500': give a whole number"),
        ({"stage_steps": 2.5}, "stage_steps=2.5: give a whole number"),
        ({"probe_sequences": None}, "probe_sequences=None: give a whole number"),
        ({"layer_groups": 2.5}, "layer_groups=2.5: give a whole number"),
        ({"micro_batch": "8"}, "micro_batch='8': give a whole number"),
        ({"mixer": "tikmix"}, "did you mean 'tikmix"),
        ({"mixer": "doremi"}, "pass reference="),
        ({"mixer": object()}, "subclass of dynmix.mixers.Mixer"),
        ({"guards": "all"}, "guards='all'"),
        ({"guards": ["web"]}, r"guards=\['web'\]"),
        ({"guards": {"t": [{"input_ids": [1, 2]}]}}, r"\['t'\] are tasks and guards"),
        ({"mixer": TiKMiXD}, "pass an instance"),
        ({"curvature": "ekfac"}, "curvature='ekfac' is no curvature: pass an instance"),
        ({"layers": "*.q_proj"}, r"layers='\*.q_proj' is no regular expression: nothing to repeat"),
        ({"layers": ["head"]}, r"layers=\['head'\] is no regular expression"),
        ({"curvature": EKFAC}, "is no curvature: pass an instance"),
        ({"max_epochs": {"c": 1}}, "no domain 'c'"),
        ({"max_epochs": {"a": -1}}, "at least 0"),
    ],
)
def test_bad_arguments_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        controller(dataset(), **options)


def test_numbers_of_a_plan_are_whole_and_those_of_numpy_do_not_keep_a_state_from_being_saved():
    for options in ({"batch_size": 2.5}, {"batch_size": "4"}, {"batch_size": BATCH, "max_steps": 7.5}):
        with pytest.raises(ValueError, match="give a whole number"):
            controller(dataset()).plan(**options)
    loop = controller(dataset(), stage_steps=np.int64(5), max_stages=np.int64(3))
    loop.plan(batch_size=np.int64(BATCH))
    assert json.loads(json.dumps(loop.state_dict()))["batch_size"] == BATCH


@pytest.mark.parametrize("wrong", [torch.utils.data.Subset(sequences(0, 8), range(8)), Bigram(), sequences(0, 8)])
def test_what_is_no_mixture_is_refused_as_the_dataset(wrong):
    with pytest.raises(ValueError, match=f"dataset is a {type(wrong).__name__}: give the MixtureDataset"):
        controller(wrong)


def test_a_dataset_that_was_read_through_before_the_run_is_to_be_made_anew():
    data = dataset()
    list(torch.utils.data.DataLoader(data, batch_size=BATCH))
    with pytest.raises(ValueError, match="up to sample 100, past the end of the first stage at 20.* make it anew"):
        controller(data).plan(batch_size=BATCH)


def test_no_tasks_and_decided_stages_are_refused():
    with pytest.raises(ValueError, match="tasks is empty"):
        MixtureController(dataset(), {}, TiKMiXD(), stage_steps=5)
    for wrong, name in (("stores/web.valid", "str"), ([sequences(0, 8)], "list")):
        with pytest.raises(ValueError, match=f"tasks is a {name}: give .* as {{name: batches}}"):
            MixtureController(dataset(), wrong, TiKMiXD(), stage_steps=5)
    data = dataset()
    data.schedule.publish({"a": 0.5, "b": 0.5}, 20)
    with pytest.raises(ValueError, match="the dataset has 2 stages"):
        controller(data).plan(batch_size=BATCH)


def test_materialising_tasks_does_not_touch_the_random_state():
    loader = torch.utils.data.DataLoader(sequences(0, 8), batch_size=2, shuffle=True)
    before = torch.get_rng_state()
    MixtureController(dataset(), {"t": loader}, Static(), stage_steps=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_mixer_of_ones_own_gets_wrong_is_said_at_the_start():
    class Arrays(Static):
        def state_dict(self):
            return {"sum": np.zeros(2)}

    class Forgetful(Static):
        def state_dict(self):
            return {"sum": 1}

    class Plain(Static):
        def propose(self, influence, prior, upper=None):
            return dict(prior)

    class Greedy(Static):
        needs = "everything"

        def __init__(self):
            pass

    for mixer, message in (
        (Arrays(), "has to go through JSON, but Object of type ndarray"),
        (Forgetful(), r"Forgetful has no state, but was given \['sum'\]"),
        (Plain(), "propose returned dict, not a Proposal"),
    ):
        loop = controller(dataset(), mixer)
        with pytest.raises(ValueError, match=message):
            begun(loop)
    with pytest.raises(ValueError, match=r"Greedy needs \['everything'\]"):
        controller(dataset(), Greedy())


def test_losses_for_the_journal_are_measured_as_often_as_asked(tmp_path):
    loop = controller(dataset(), Static(), loss_every=2, output=tmp_path, keep=0)
    run(loop)
    rows = Journal(tmp_path / "journal.jsonl").rows()
    assert [row["task_loss"] is None for row in rows] == [False, True, False, True, False]


def test_only_what_a_mixer_needs_is_measured(monkeypatch):
    calls = []
    for name in ("influence", "gradient", "losses"):
        real = getattr(dynmix.measurement.Measurement, name)

        def counted(self, *args, name=name, real=real):
            calls.append(name)
            return real(self, *args)

        monkeypatch.setattr(dynmix.measurement.Measurement, name, counted)

    def measured_for(needs):
        class Needy(Static):
            def __init__(self):
                self.needs = needs

            def propose(self, influence, prior, upper=None, **more):
                assert (influence is None) == ("influence" not in needs)
                assert set(more) == ({"measure"} & set(needs))
                return super().propose(influence, prior, upper)

        loop = begun(controller(dataset(), Needy()))
        calls.clear()
        loop.step_ended(Bigram(), 4)
        return list(calls)

    assert measured_for(set()) == ["losses"]
    assert measured_for({"influence"}) == ["influence"]
    assert measured_for({"gradient"}) == ["gradient"]
    assert measured_for({"measure"}) == ["influence"]
    assert measured_for(["influence", "gradient", "guards"]) == ["influence", "gradient"]


def test_factors_that_are_carried_from_stage_to_stage_survive_a_kill(tmp_path):
    """Killed after any stage and resumed, a run with a moving average publishes and journals the same."""

    def start(folder, state=None, steps=25, first=1):
        torch.manual_seed(0)
        model = Bigram()
        curvature = EKFAC(ema=0.5, refresh_every=2, factor_tokens=15 * 5)
        loop = controller(dataset(), curvature=curvature, output=folder)
        if state is not None:
            loop.load_state_dict(state)
        begun(loop, model, first - 1)
        states = []
        for step in range(first, steps + 1):
            loop.step_ended(model, step)
            states.append(json.loads(json.dumps(loop.state_dict())))
        return loop, states

    whole, states = start(tmp_path / "whole")
    assert states[0]["curvature"] is None
    assert states[-1]["curvature"] == "stage-0004.safetensors"
    assert len(list((tmp_path / "whole" / "factors").iterdir())) == 2
    assert whole.measurement.curvature_sequences == 15
    _, before = start(tmp_path / "killed", steps=11)
    again, _ = start(tmp_path / "killed", before[-1], first=12)
    for one, other in zip(whole.dataset.schedule.stages, again.dataset.schedule.stages, strict=True):
        assert one == other
    rows = [Journal(tmp_path / name / "journal.jsonl").rows() for name in ("whole", "killed")]
    for one, other in zip(*rows, strict=True):
        assert one["influence"] == other["influence"]

    for file in (tmp_path / "killed" / "factors").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"stage-0002.safetensors is gone.* go on from a newer checkpoint, or with"):
        start(tmp_path / "killed", before[-1], first=12)
    with pytest.raises(ValueError, match="carried from stage to stage are kept in files: pass output="):
        run(controller(dataset(), curvature=EKFAC(ema=0.5)))


def test_factors_of_the_last_checkpoint_are_kept_however_many_stages_it_is_old(tmp_path):
    def start(steps, saved, state=None):
        torch.manual_seed(0)
        model, first = Bigram(), 1 if state is None else saved[-1] + 1
        loop = controller(dataset(), curvature=EKFAC(ema=0.5), output=tmp_path)
        if state is not None:
            loop.load_state_dict(state)
        loop.plan(batch_size=BATCH)
        loop.begin(model, first - 1)
        for step in range(first, steps + 1):
            loop.step_ended(model, step)
            if step in saved:
                state = json.loads(json.dumps(loop.state_dict()))
                loop.saved(step)
        return loop.dataset.schedule.stages, state

    def kept():
        return [int(file.stem[6:]) for file in sorted((tmp_path / "factors").iterdir())]

    stages, state = start(20, saved=[2, 6])
    assert kept() == [1, 3, 4]
    assert start(20, [6], state)[0] == stages
    assert kept() == [1, 3, 4]  # the next kill may come before the next checkpoint
    start(20, saved=[2, 6, 11])
    assert kept() == [2, 3, 4]


def test_what_a_measurement_takes_is_said_before_and_what_a_low_rank_leaves_out_is_journaled(tmp_path, capsys):
    def influence(name, **options):
        torch.manual_seed(0)
        run(controller(dataset(), output=tmp_path / name, keep=0, **options), steps=4)
        return Journal(tmp_path / name / "journal.jsonl").rows()[1]

    plain, low = influence("plain"), influence("low", offload="disk", layer_groups=2, rank=4)
    assert capsys.readouterr().err.count("dynmix: a measurement takes about") == 2
    config = json.loads((tmp_path / "low" / "config.json").read_text())
    assert config["peak_memory"]["total"] > 0
    assert (config["offload"], config["layer_groups"], config["rank"]) == ("disk", 2, 4)
    assert plain["left_out"] is None
    assert 0 < low["left_out"]["t"] < 1
    apart = np.abs(np.subtract(low["influence"], plain["influence"]))
    assert (apart <= np.array(low["left_out_bound"]) * (1 + 1e-3)).all()
    assert (apart > 0).any()


def test_a_run_begins_where_nobody_reads_what_a_measurement_takes(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Gone())
    begun(controller(dataset()))
