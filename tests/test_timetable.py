import json

import numpy as np
import pytest
import torch

from dynmix import MixtureDataset
from dynmix.mixture import packed
from dynmix.timetable import Timetable
from tests import running

BATCH, STEPS = 4, 5


def dataset(samples=100, **options):
    rows = [{"input_ids": torch.tensor([1, 2])}] * 50
    found = MixtureDataset({"a": rows, "b": rows}, num_samples=samples, block=BATCH, **options)
    found.controlled = True
    return found


def planned(max_stages=None, max_steps=None, **options):
    timetable = Timetable(dataset(**options), STEPS, max_stages)
    timetable.plan(BATCH, max_steps, resumed=False)
    return timetable


def publish(timetable):
    schedule, start, end = timetable.dataset.schedule, timetable.boundary, timetable.next_end
    schedule.publish({"a": 0.5, "b": 0.5}, start, end if end < timetable.total else None)


def due(timetable, steps=25):
    found = []
    for step in range(1, steps + 1):
        if timetable.is_due(step):
            found.append(step)
            publish(timetable)
    return found


def test_a_stage_is_due_one_step_before_it_starts_up_to_the_end_of_the_run():
    timetable = planned()
    assert due(timetable) == [4, 9, 14, 19]
    assert timetable.dataset.schedule.starts == [0, 20, 40, 60, 80]
    assert due(planned(max_steps=16)) == [4, 9, 14]


def test_a_stage_is_due_as_it_starts_where_it_was_not_before():
    timetable = planned()
    assert [step for step in range(25) if timetable.is_due(step)] == [4, 5]


def test_the_last_of_max_stages_goes_on_to_the_end():
    timetable = planned(max_stages=3)
    assert due(timetable) == [4, 9]
    assert timetable.dataset.schedule.end is None


def test_the_run_ends_where_the_data_does_with_a_whole_step():
    timetable = planned(samples=200, max_epochs=0.5, max_stages=2)
    assert due(timetable) == [4]
    assert timetable.total == 48  # of 50 that may be read
    assert not timetable.why_over(11)
    assert "'a' (max_epochs=0.5)" in timetable.why_over(12)
    assert not planned(max_steps=25).why_over(25)
    assert not planned(samples=200, max_epochs=0.5, max_stages=2, max_steps=12).why_over(12)  # that is all it was to be


def test_boundaries_ahead_are_those_of_the_stages_that_are_left():
    timetable = planned()
    found = []
    for _ in range(4):
        found.append(list(timetable.boundaries_ahead()))
        publish(timetable)
    assert found == [[1, 2, 3, 4], [2, 3, 4], [3, 4], [4]]
    assert list(timetable.boundaries_ahead()) == [5]  # of a run that goes on


def test_no_boundary_is_ahead_of_the_last_of_max_stages():
    # For one, mixers that regroup the corpus would keep snapshots of the model to the end.
    timetable = planned(max_stages=3)
    found = []
    for _ in range(2):
        found.append(list(timetable.boundaries_ahead()))
        publish(timetable)
    assert found == [[1, 2], [2]]
    assert not timetable.boundaries_ahead()


def test_a_state_of_other_stages_is_refused():
    timetable = planned()
    state = timetable.state_dict() | {"dataset": timetable.dataset.state_dict()}
    Timetable(dataset(), STEPS, None).check(state)
    for changed, message in [
        ({"stage_steps": 6}, "the checkpoint's stages are 6 steps, stage_steps=5"),
        ({"max_stages": 3}, "the checkpoint has max_stages=3, this run None"),
    ]:
        with pytest.raises(ValueError, match=message):
            Timetable(dataset(), STEPS, None).check(state | changed)
    with pytest.raises(ValueError, match=r"take \[4, 8\] samples a step"):
        timetable.check(state | {"batch_size": 8})
    publish(timetable)
    state = timetable.state_dict() | {"dataset": timetable.dataset.state_dict()}
    with pytest.raises(ValueError, match=r"damaged: its stages start at \[0, 20\]"):
        Timetable(dataset(), STEPS, None).check(state | {"batch_size": 8})


def test_a_state_without_its_oldest_stages_is_checked_as_well(monkeypatch):
    monkeypatch.setattr(packed, "_ROOM", 0)  # as if there were very many stages
    timetable = planned(samples=4_000)
    due(timetable, steps=900)
    timetable.dataset.__getitems__(list(range(3_000, 3_004)))
    state = timetable.state_dict() | {"dataset": timetable.dataset.state_dict()}
    stages = state["dataset"]["schedule"]["stages"]
    assert stages["first"] > 0
    Timetable(dataset(4_000), STEPS, None).check(state)
    stages["first"] += 1
    with pytest.raises(ValueError, match="damaged: its stages start at"):
        Timetable(dataset(4_000), STEPS, None).check(state)


def test_a_state_that_is_older_than_the_model_is_refused():
    timetable = planned()
    timetable.check_step(5)
    with pytest.raises(ValueError, match="older than step 6: the stage of sample 20 is not in it"):
        timetable.check_step(6)


def test_a_second_run_of_one_dataset_is_refused_with_what_to_do():
    timetable = planned()
    due(timetable)
    with pytest.raises(ValueError, match="the dataset has 5 stages.* for another run make that .* anew, with its"):
        timetable.plan(BATCH, None, resumed=False)


def test_more_stages_than_a_schedule_takes_are_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr("dynmix.timetable.MAX_STAGES", 4)
    with pytest.raises(ValueError, match="25 steps would have 5 stages, and a schedule takes 4: make stages longer"):
        running.controller(running.dataset()).plan(batch_size=running.BATCH)
    running.controller(running.dataset(), max_stages=4).plan(batch_size=running.BATCH)
    running.controller(running.dataset(), stage_steps=7).plan(batch_size=running.BATCH)


def test_a_stage_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="the run of 25 steps ends before its first stage"):
        running.controller(running.dataset(), stage_steps=25).plan(batch_size=running.BATCH)


def test_numbers_of_a_plan_are_whole_and_those_of_numpy_do_not_keep_a_state_from_being_saved():
    for options in ({"batch_size": 2.5}, {"batch_size": "4"}, {"batch_size": running.BATCH, "max_steps": 7.5}):
        with pytest.raises(ValueError, match="give a whole number"):
            running.controller(running.dataset()).plan(**options)
    loop = running.controller(running.dataset(), stage_steps=np.int64(5), max_stages=np.int64(3))
    loop.plan(batch_size=np.int64(running.BATCH))
    assert json.loads(json.dumps(loop.state_dict()))["batch_size"] == running.BATCH


def test_what_a_loader_read_or_a_user_declared_before_may_not_part_the_first_stage():
    data = running.dataset()
    data.__getitems__(list(range(20)))  # as one that looks ahead
    running.controller(data).plan(batch_size=running.BATCH)
    data = running.dataset()
    data.schedule.hold(16)
    with pytest.raises(ValueError, match="end=20: the last stage was declared to end at 16, and that stays"):
        running.controller(data).plan(batch_size=running.BATCH)


def test_a_dataset_that_was_read_through_before_the_run_is_to_be_made_anew():
    data = running.dataset()
    list(torch.utils.data.DataLoader(data, batch_size=running.BATCH))
    with pytest.raises(ValueError, match="up to sample 100, past the end of the first stage at 20.* make it anew"):
        running.controller(data).plan(batch_size=running.BATCH)
