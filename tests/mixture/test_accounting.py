import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmix.mixture.accounting import NewEpoch, Remaining, first_epochs, in_words, new_epochs, remaining, used_up
from dynmix.mixture.roster import JoinedDomain
from dynmix.mixture.schedule import MixtureSchedule


@given(
    sizes=st.lists(st.integers(1, 60), min_size=3, max_size=3),
    weights=st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
    boundary=st.integers(1, 900),
    cuts=st.tuples(st.integers(0, 1000), st.integers(0, 1000)),
    policy=st.sampled_from(["repeat", "redistribute"]),
)
@settings(max_examples=15)
def test_epochs_and_what_is_left_agree_with_walking(
    sizes: list[int], weights: list[float], boundary: int, cuts: tuple[int, int], policy: str
) -> None:
    domains = dict(zip("abc", sizes, strict=True))
    shares = {name: w / sum(weights) for name, w in zip("abc", weights, strict=True)}
    made = MixtureSchedule(shares, domains, block=32, max_epochs={"a": 2.5}, when_exhausted=policy)  # type: ignore[arg-type]
    made.publish({"a": shares["b"], "b": shares["c"], "c": shares["a"]}, start=boundary)
    domain, _, epoch = made.assign(0, 1000)
    drawn, walked, states = [0, 0, 0], [], []
    for position in range(1000):
        states.append(list(drawn))
        k = int(domain[position])
        assert epoch[position] == drawn[k] // sizes[k]
        if drawn[k] and drawn[k] % sizes[k] == 0:
            walked.append(NewEpoch(position, "abc"[k], int(epoch[position])))
        drawn[k] += 1
    states.append(drawn)
    start, stop = sorted(cuts)
    told = [each for each in walked if each.epoch < 16 or (each.epoch + 1) & each.epoch == 0]
    within = [each for each in told if start <= each.position < stop]
    assert new_epochs(made, start, stop) == within
    assert new_epochs(made, start, stop, domain[start:stop]) == within
    for name, n, left in zip("abc", states[start], remaining(made, start, 7).values(), strict=True):
        size = domains[name]
        limit = max(0, int(2.5 * size) - n) if name == "a" else None
        of_epoch = size - n % size
        if policy == "redistribute" and limit is not None:
            of_epoch = min(of_epoch, limit)
        assert left == Remaining(n // size, of_epoch, of_epoch * 7, limit, None if limit is None else limit * 7)


def test_a_domain_that_is_read_very_often_is_told_of_at_every_doubling() -> None:
    made = MixtureSchedule({"one": 0.5, "many": 0.5}, {"one": 1, "many": 10**6})
    epochs = [each.epoch + 1 for each in new_epochs(made, 0, 2**21) if each.domain == "one"]
    assert epochs[:16] == [*range(2, 17), 32]
    assert epochs[16:] == [2**k for k in range(6, 20 + (int(made.counts(2**21)[0] >= 2**20)))]


def test_the_first_epochs_are_found_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that publishes stages of its own, open to the end of a long run, waits for nothing that is not shown."""
    sizes = {f"d{k}": 1000 + 37 * k for k in range(60)}
    made, counts, counted = MixtureSchedule(dict.fromkeys(sizes, 1 / 60), sizes), MixtureSchedule.counts, list[int]()

    def counting(schedule: MixtureSchedule, position: int) -> npt.NDArray[np.int64]:
        counted.append(position)
        return counts(schedule, position)

    monkeypatch.setattr(MixtureSchedule, "counts", counting)
    found, count = first_epochs(made, 5, 10**9)
    assert len(counted) < 100
    every = new_epochs(made, 5, 2 * 10**6)
    assert found == every[:8] == sorted(every)[:8]
    assert count > 1200
    assert in_words(found, count).endswith(f"position {found[7].position}, reshuffled; and {count - 8} more")
    assert first_epochs(made, 5, every[3].position + 1) == (every[:4], 4)


def test_it_takes_no_longer_at_the_end_of_a_long_run() -> None:
    made = MixtureSchedule({"a": 0.3, "b": 0.7}, {"a": 10**11, "b": 10**12})
    found, second = new_epochs(made, 0, 10**12)[:2]
    assert made.counts(second.position)[0] == 2 * 10**11
    assert made.counts(found.position)[0] == 10**11 == made.counts(found.position + 1)[0] - 1
    assert str(found) == f"domain 'a' begins its epoch 2 at position {found.position}, reshuffled"
    assert np.isclose(found.position, 10**11 / 0.3, rtol=1e-6)
    assert remaining(made, found.position, 1)["a"] == Remaining(1, 10**11, 10**11, None, None)


def test_positions_that_are_undecided_have_no_account() -> None:
    made = MixtureSchedule({"a": 1.0}, {"a": 5})
    made.hold(10)
    with pytest.raises(LookupError):
        new_epochs(made, 0, 11)


def test_the_position_at_which_a_domain_is_used_up_is_told() -> None:
    schedule = MixtureSchedule({"a": 0.4, "b": 0.4, "c": 0.2}, {"a": 90, "b": 10, "c": 7}, max_epochs={"b": 1, "c": 3})
    (first, second) = used_up(schedule, 0, 90)
    assert (first.domain, second.domain) == ("b", "c")
    domain, _, _ = schedule.assign(0, 90)
    for each, limit in ((first, 10), (second, 21)):
        mine = np.flatnonzero(domain == schedule.names.index(each.domain))
        assert each.position == mine[-1] + 1
        assert len(mine) == limit
    for cut in range(91):  # told once, wherever one stretch ends and the next begins
        assert used_up(schedule, 0, cut) + used_up(schedule, cut, 90) == [first, second]
    assert not used_up(schedule, 0, first.position)  # with the batch that begins there


@pytest.mark.parametrize("stop", [300, 20_000])  # walked, and halved first
def test_domains_that_join_from_another_process_meanwhile_change_nothing(
    monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    schedule = MixtureSchedule(
        {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 20, "b": 10, "c": 9_000}, max_epochs={"a": 4, "b": 2}
    )
    before = new_epochs(schedule, 1, stop), used_up(schedule, 1, stop)
    assert all(before)
    counts = schedule.counts

    def joining(position: int) -> npt.NDArray[np.int64]:
        schedule.extend([JoinedDomain(f"late{len(schedule.names)}", 3, {"hash": "of its content"})])
        return counts(position)

    monkeypatch.setattr(schedule, "counts", joining)
    assert (new_epochs(schedule, 1, stop), used_up(schedule, 1, stop)) == before


def test_many_domains_that_are_used_up_together_are_found_in_few_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {f"d{k}": 20 + k % 7 for k in range(300)}
    schedule = MixtureSchedule(dict.fromkeys(sizes, 1 / 300), sizes, max_epochs=1)
    domain = schedule.assign(0, sum(sizes.values()))[0]
    last = {name: int(np.flatnonzero(domain == k)[-1]) + 1 for k, name in enumerate(sizes)}
    counts, asked = MixtureSchedule.counts, list[int]()
    monkeypatch.setattr(MixtureSchedule, "counts", lambda self, g: asked.append(g) or counts(self, g))
    found = used_up(schedule, 0, len(domain))
    assert {each.domain: each.position for each in found} == {n: g for n, g in last.items() if g < len(domain)}
    assert found == sorted(found)
    assert len(asked) < 20
