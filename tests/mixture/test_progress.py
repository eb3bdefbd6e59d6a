import multiprocessing
from contextlib import nullcontext

import pytest

from dynmix.mixture import progress as module
from dynmix.mixture.progress import Progress
from dynmix.mixture.schedule import MixtureSchedule, Undecided


def test_a_worker_whose_parent_is_gone_stops_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
    schedule = MixtureSchedule({"a": 1.0}, {"a": 5})
    schedule.hold(20)
    monkeypatch.setattr(module, "get_worker_info", lambda: type("Worker", (), {"id": 0}))
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: process)
    Progress().wait(schedule, 20, "")
    with pytest.raises(RuntimeError, match="parent process ended before it published the stage of position 20"):
        Progress().wait(schedule, 24, "")


@pytest.mark.parametrize(("asleep", "gives_up"), [(7200.0, False), (0.5, True)])
def test_a_job_that_was_suspended_has_not_waited(
    monkeypatch: pytest.MonkeyPatch, asleep: float, gives_up: bool
) -> None:
    schedule, clock = MixtureSchedule({"a": 1.0}, {"a": 5}), iter(asleep * n for n in range(20_000))
    schedule.hold(20)

    def sleep(seconds: float) -> None:
        if not gives_up:
            schedule.publish({"a": 1.0}, 20)

    monkeypatch.setattr(module, "get_worker_info", lambda: type("Worker", (), {"id": 0}))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(module.time, "sleep", sleep)
    with pytest.raises(Undecided, match="not decided within 1800 s") if gives_up else nullcontext():
        Progress().wait(schedule, 24, "")
    assert next(clock) == (pytest.approx(1801, abs=1) if gives_up else 2 * asleep)


def test_what_each_process_read_is_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress()
    progress.plan_steps(32)
    progress.note(8, 24)
    assert (progress.read_until, progress.read_size, progress.by_workers) == (24, 8, False)
    monkeypatch.setattr(module, "get_worker_info", lambda: type("Worker", (), {"id": 3}))
    progress.note(4, 40)
    progress.note(4, 36)
    assert (progress.read_until, progress.read_size, progress.by_workers) == (40, 4, True)
    progress.forget()
    assert (progress.read_until, progress.read_size, progress.by_workers, progress.step_size) == (0, 0, False, 32)
