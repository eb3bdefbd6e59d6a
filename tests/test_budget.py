import pytest

import dynmix.measurement
from dynmix import Identity, Static
from dynmix.budget import EpochBudget
from dynmix.journal import Journal
from dynmix.mixers import Mixer, Proposal
from dynmix.mixture.dataset import MixtureDataset
from tests import running
from tests.small import Bigram


def dataset(**options):
    domains = {name: [{"input_ids": [i, 1, 2]} for _ in range(100)] for i, name in enumerate("ab")}
    return MixtureDataset(domains, {"a": 0.5, "b": 0.5}, num_samples=400, block=10, **options)


def test_what_is_left_becomes_a_bound_on_the_weight():
    data = dataset()
    budget = EpochBudget(data, {"a": 1.5})
    drawn = int(data.schedule.counts(100)[0])
    assert budget.left(100) == {"a": 150 - drawn}
    assert budget.upper(100, 50) == {"a": (150 - drawn) / 50}
    assert EpochBudget(data, {"a": 0.1}).upper(100, 50) == {"a": 0.0}
    assert EpochBudget(data, None).upper(100, 50) == {}
    assert set(EpochBudget(data, 2).upper(100, 50)) == {"a", "b"}


def test_a_run_that_cannot_stay_within_it_is_refused():
    EpochBudget(dataset(), 2.0).check(400, 100)
    with pytest.raises(ValueError, match="leaves 380 samples over all domains and the run takes 400"):
        EpochBudget(dataset(), 1.9).check(400, 100)
    with pytest.raises(ValueError, match=r"first stage alone exceeds max_epochs of \['a'\]"):
        EpochBudget(dataset(), {"a": 0.2}).check(400, 100)


def test_domains_that_enter_are_bounded_by_a_number_for_all(tmp_path):
    data = MixtureDataset(
        {name: [{"input_ids": [1, 2]}] * 10 for name in ("a", "b")}, "uniform", num_samples=100, block=10
    )
    for_all, by_name = EpochBudget(data, 2.0), EpochBudget(data, {"a": 2.0})
    assert for_all.entering({"late": 5}, samples=40) == {"late": 0.25}
    assert by_name.entering({"late": 5}, samples=40) == {}
    assert (for_all.of_entering, by_name.of_entering, EpochBudget(data, None).of_entering) == (2.0, None, None)
    data.schedule.hold(20)
    data.extend({"late": ([0, 1], [3, 4])}, tmp_path)
    data.publish({"a": 0.0, "b": 0.0, "late": 1.0}, 20, 30)
    assert for_all.left(20)["late"] == 4
    assert for_all.upper(30, 10)["late"] == 0
    assert set(by_name.upper(20, 10)) == {"a"}


def test_the_dataset_s_own_limit_is_the_one_that_counts():
    data = dataset(max_epochs={"a": 1.5}, when_exhausted="stop")
    budget = EpochBudget(data, None)
    assert budget.max_epochs == {"a": 1.5} == EpochBudget(data, {"a": 1.5}).max_epochs
    assert budget.upper(0, 300) == {"a": 0.5}
    budget.check(400, 400)  # the dataset ends before it is exceeded
    with pytest.raises(ValueError, match=r"max_epochs=2, and the dataset's is \{'a': 1.5\}: say it once"):
        EpochBudget(data, 2)


def test_a_stage_that_is_longer_than_what_is_left_of_all_domains_is_as_long_as_that():
    data = dataset(max_epochs=1)
    a, b = (100 - n for n in data.schedule.counts(150).tolist())
    assert EpochBudget(data, None).upper(150, 80) == {"a": a / 50, "b": b / 50}
    assert EpochBudget(data, None).upper(150, 20) == {"a": a / 20, "b": b / 20}
    assert EpochBudget(data, None).upper(200, 20) == {}  # nothing is left that could be bounded


def test_what_is_gone_gets_nothing():
    data = dataset()
    data.publish({"a": 1.0, "b": 0.0}, start=10)
    rest = MixtureDataset({"a": [{"input_ids": [0, 1, 2]}] * 100}, num_samples=400, block=10)
    rest.load_state_dict(data.state_dict())
    assert EpochBudget(rest, {"a": 2}).upper(20, 400)["b"] == 0


def test_the_mixer_gets_the_prior_and_the_bounds_that_max_epochs_leaves():
    calls = []

    class Recorder(Mixer):
        def propose(self, influence, prior, upper=None):
            calls.append((influence, dict(prior), dict(upper)))
            return Proposal({"a": 0.25, "b": 0.75} if upper["a"] > 0.25 else dict(prior) | {"a": 0.0, "b": 1.0})

    data = running.dataset(rows=(50, 300), samples=100, weights={"a": 0.5, "b": 0.5})
    running.run(running.controller(data, Recorder(), max_epochs={"a": 0.5}))
    drawn = [data.schedule.counts(20 * k)[0] for k in range(1, 5)]
    calls = calls[1:]  # the first is the rehearsal's
    assert [prior for _, prior, _ in calls[:2]] == [
        pytest.approx({"a": 0.5, "b": 0.5}),
        pytest.approx({"a": 0.25, "b": 0.75}),
    ]
    assert [upper["a"] for _, _, upper in calls] == pytest.approx([max(0, 25 - n) / 20 for n in drawn])
    assert all(influence is None for influence, _, _ in calls)


def test_a_failed_measurement_still_keeps_within_max_epochs(monkeypatch):
    real, calls = dynmix.measurement.group_influence, []

    def measure(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("bad luck")
        return real(*args, **kwargs)

    monkeypatch.setattr(dynmix.measurement, "group_influence", measure)
    data = running.dataset(rows=(200, 30), samples=100, weights={"a": 0.5, "b": 0.5})
    running.run(running.controller(data, max_epochs={"b": 1}))
    assert data.schedule.counts(100)[1] <= 30 + 2


@pytest.mark.parametrize("seed", range(12))
def test_a_run_at_its_limit_of_epochs_can_be_resumed(seed):
    """Stages keep their proportions to within a few samples, so a limit may be passed by one or two."""

    def make():
        domains = {"a": running.sequences(0, 200), "b": running.sequences(1, 30)}
        return MixtureDataset(domains, {"a": 0.5, "b": 0.5}, num_samples=100, block=running.BATCH, seed=seed)

    first = running.controller(make(), Static(), max_epochs={"b": 1})
    running.run(first)
    second = running.controller(make(), Static(), max_epochs={"b": 1})
    second.load_state_dict(first.state_dict())
    running.begun(second, step=25)


@pytest.mark.parametrize("steps", [23, 10])
def test_a_run_that_takes_all_that_may_be_read_can_be_resumed_in_its_last_short_stage(steps):
    def loop():
        return running.controller(running.dataset(rows=(46, 46), samples=92), max_epochs=1, curvature=Identity())

    first = loop()
    running.run(first, steps=20)
    assert first.dataset.schedule.starts[-1] == 80
    second = loop()
    second.load_state_dict(first.state_dict())
    second.plan(batch_size=running.BATCH, max_steps=steps)
    second.begin(Bigram(), step=20)


@pytest.mark.parametrize("rows", [44, 40, 31])  # exhausted in the last stage that is decided, or where it would begin
@pytest.mark.parametrize("mixer", ["tikmix-d", "static"])
def test_data_that_is_exhausted_before_the_planned_end_ends_the_run_and_not_with_an_error(rows, mixer, tmp_path):
    domains = {name: running.sequences(i, rows) for i, name in enumerate(running.NAMES)}
    data = MixtureDataset(domains, num_samples=100, block=running.BATCH, max_epochs=1)
    loop, model = running.controller(data, mixer, output=tmp_path, keep=0), Bigram()
    running.begun(loop, model)
    step = 0
    while not loop.why_over(step):
        step += 1
        loop.step_ended(model, step)
    loop.finish(model, step)
    assert step == 2 * rows // running.BATCH
    assert not any(row["error"] for row in Journal(tmp_path / "journal.jsonl").rows())
