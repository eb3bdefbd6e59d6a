import copy
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.limits import NEVER, Exhausted, Limits, bracket, redistributed
from dynmix.mixture.quota import TOTAL, Ints, Quota
from dynmix.mixture.roster import JoinedDomain
from dynmix.mixture.schedule import MixtureSchedule, Undecided
from dynmix.mixture.stages import StageRow
from dynmix.mixture.store import TokenStore
from dynmix.mixture.weights import integer_cdf

names = ["web", "code", "books", "law"]
shares = st.lists(st.one_of(st.just(0.0), st.floats(1e-4, 1)), min_size=4, max_size=4).filter(lambda w: sum(w) > 0)
limits_of_domains = st.one_of(
    st.floats(0, 4).map(lambda x: round(x, 2)), st.dictionaries(st.sampled_from(names), st.floats(0, 3), max_size=4)
)


def weights_of(values: list[float]) -> dict[str, float]:
    return {name: value / sum(values) for name, value in zip(names, values, strict=True)}


def shared_out(units: list[int]) -> list[int]:
    """`units` scaled to 2**32 by largest remainders, in fractions."""
    exact = [Fraction(unit * TOTAL, sum(units)) for unit in units]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(units)), key=lambda k: (whole[k] - exact[k], k))
    for k in by_remainder[: TOTAL - sum(whole)]:
        whole[k] += 1
    return whole


def enumerated(
    stages: list[tuple[int, dict[str, float]]], sizes: dict[str, int], seed: int, block: int, limits: Limits, stop: int
) -> Iterator[tuple[int, int]]:
    """Domain and draw of every position up to `stop`, walked one by one; ends where the stream does."""
    epochs = limits.epochs(sizes)
    most = [int(Fraction(repr(epochs[n])) * size) if n in epochs else NEVER for n, size in sizes.items()]
    drawn: Counter[int] = Counter()
    free, now, ahead = MixtureSchedule(stages[0][1], sizes, seed, block), (-1, [0]), [0]
    owed = at_start = [0] * len(sizes)
    for position in range(stop):
        number = max(k for k, (start, _) in enumerate(stages) if start <= position)
        start, weights = stages[number]
        units = np.diff(integer_cdf(list(weights.values())), prepend=0).tolist()
        full = [k for k, unit in enumerate(units) if unit and drawn[k] >= most[k]]
        if full and limits.when_exhausted == "stop":
            return
        if full and limits.when_exhausted == "redistribute":
            units = [0 if k in full else unit for k, unit in enumerate(units)]
            if not any(units):
                return
            units = shared_out(units)
        if number != now[0]:
            at_start = owed
        if (number, units) != now:
            none, debts = np.zeros(4, np.int64), np.array(at_start)
            now, row = (number, units), StageRow(number, start, None, np.cumsum(units), none, debts)
            free._assign_in(row, position, found := np.empty((3, stop - position), np.int64))
            ahead = found[0].tolist()[::-1]
        domain = ahead.pop()
        owed = [o + unit - (k == domain) * TOTAL for k, (o, unit) in enumerate(zip(owed, units, strict=True))]
        yield domain, drawn[domain]
        drawn[domain] += 1


@given(data=st.data(), seed=st.integers(0, 2**63 - 1), block=st.integers(1, 60))
@settings(max_examples=25)
def test_the_stream_under_limits_is_the_one_that_walks_it(data: st.DataObject, seed: int, block: int) -> None:
    policy: Any = data.draw(st.sampled_from(["repeat", "stop", "redistribute"]))
    limits = Limits(data.draw(limits_of_domains), policy)
    sizes = {name: data.draw(st.integers(1, 120)) for name in names}
    stages = [(0, weights_of(data.draw(shares)))]
    made = MixtureSchedule(stages[0][1], sizes, seed, block, limits.max_epochs, policy)
    for length in data.draw(st.lists(st.integers(1, 200), max_size=2)):
        stage = stages[-1][0] + length, weights_of(data.draw(shares))
        try:
            made.publish(stage[1], stage[0])
        except Exhausted:
            break
        stages.append(stage)
    expected = list(enumerated(stages, sizes, seed, block, limits, 700))
    end = made.exhausted_at
    assert len(expected) == (700 if end is None else min(end, 700))
    domain, row, epoch = made.assign(0, len(expected))
    assert domain.tolist() == [d for d, _ in expected]
    for d, (name, size) in enumerate(sizes.items()):
        here = np.flatnonzero(domain == d)
        assert epoch[here].tolist() == [draw // size for k, draw in expected if k == d], name
        assert row[here].tolist() == made.rows(d, np.arange(len(here)))[0].tolist()
    cuts = data.draw(st.lists(st.integers(0, len(expected)), max_size=4))
    for cut in [*cuts, len(expected)]:
        assert made.counts(cut).tolist() == np.bincount(domain[:cut], minlength=4).tolist()
        assert all(
            (a[cut:] == b).all() for a, b in zip((domain, row, epoch), made.assign(cut, len(expected)), strict=True)
        )
    if end is not None and end < 700:
        for look in (lambda: made.assign(end, end + 1), lambda: made.counts(end + 1), lambda: made.weights_at(end)):
            with pytest.raises(Exhausted, match=f"the stream ends at position {end}"):
                look()
    twin = MixtureSchedule(weights_of([1, 1, 1, 1]), sizes, seed, block, limits.max_epochs, policy)
    twin.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert all((a == b).all() for a, b in zip(twin.assign(0, len(expected)), (domain, row, epoch), strict=True))
    assert twin.exhausted_at == end


def one_epoch(policy: Any = None, **options: Any) -> MixtureSchedule:
    return MixtureSchedule({"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 40, "b": 90, "c": 70}, 0, 16, 1, policy, **options)


def test_all_is_read_once_and_then_the_stream_ends() -> None:
    made = one_epoch()
    assert made.exhausted_at == 200
    domain, row, epoch = made.assign(0, 200)
    assert (epoch == 0).all()
    assert len(set(zip(domain.tolist(), row.tolist(), strict=True))) == 200
    last_a = int(np.flatnonzero(domain == 0)[-1])
    assert made.weights_at(last_a) == pytest.approx({"a": 0.5, "b": 0.3, "c": 0.2})
    assert made.weights_at(last_a + 1) == pytest.approx({"a": 0.0, "b": 0.6, "c": 0.4})


def test_the_first_to_be_exhausted_stops_the_stream() -> None:
    made = one_epoch("stop")
    end = made.exhausted_at
    assert end is not None
    assert made.counts(end)[0] == 40 == made.counts(end - 1)[0] + 1
    with pytest.raises(Exhausted, match=rf"ends at position {end}, .*'a' \(max_epochs=1\)"):
        made.assign(0, end + 1)
    with pytest.raises(Exhausted):
        made.publish({"a": 0.0, "b": 0.5, "c": 0.5}, start=end + 1)
    made.publish({"a": 0.0, "b": 0.5, "c": 0.5}, start=end)  # without it the stream goes on
    assert made.exhausted_at is not None
    assert made.exhausted_at > end
    made.publish({"a": 0.1, "b": 0.5, "c": 0.4}, start=end + 10)
    assert made.exhausted_at == end + 10


def test_to_stop_is_to_stop_where_a_domain_is_used_up_with_its_stage() -> None:
    for policy in ("stop", "redistribute"):
        made = MixtureSchedule({"a": 1.0, "b": 0.0}, {"a": 50, "b": 9}, max_epochs=1, when_exhausted=policy)  # type: ignore[arg-type]
        made.hold(50)
        assert made.exhausted_at == (50 if policy == "stop" else None)
        made.publish({"a": 0.0, "b": 1.0}, start=50)  # whoever knows better may go on
        assert made.exhausted_at == 59


@given(data=st.data(), seed=st.integers(0, 2**63 - 1), group=st.integers(1, 9), blocks=st.integers(1, 12))
@settings(max_examples=25)
def test_groups_of_one_domain_are_the_stream_of_whole_groups(
    data: st.DataObject, seed: int, group: int, blocks: int
) -> None:
    """Walked as a stream whose every draw is a group, with as many of them as a domain's limit has room for."""
    policy: Any = data.draw(st.sampled_from(["repeat", "stop", "redistribute"]))
    limits = Limits(data.draw(limits_of_domains), policy)
    sizes = {name: data.draw(st.integers(group, 150)) for name in names}
    most = {n: int(Fraction(repr(limit)) * sizes[n]) for n, limit in limits.epochs(sizes).items()}
    made = MixtureSchedule(weights_of(data.draw(shares)), sizes, seed, group * blocks)
    first = made.weights_at(0)
    given: tuple[Any, ...] = (first, sizes, seed, group * blocks, limits.max_epochs, policy, group)
    if policy != "repeat" and any(0 < n < group for n in most.values()):
        with pytest.raises(ValueError, match="lower homogeneous, or raise its limit"):
            MixtureSchedule(*given)
        return
    made, stages = MixtureSchedule(*given), [(0, first)]
    for length in data.draw(st.lists(st.integers(1, 200 // group), max_size=2)):
        stage = stages[-1][0] + length, weights_of(data.draw(shares))
        try:
            made.publish(stage[1], stage[0] * group)
        except Exhausted:
            break
        stages.append(stage)
    in_groups = {name: max(1, most.get(name, 1) // group) for name in names}
    allowed = Limits({name: float(n >= group) for name, n in most.items()}, policy)
    walked = list(enumerated(stages, in_groups, seed, blocks, allowed, 700 // group))
    expected = [(d, j * group + i) for d, j in walked for i in range(group)]
    end = made.exhausted_at
    assert len(expected) == (700 // group * group if end is None else min(end, 700 // group * group))
    cut = data.draw(st.integers(0, len(expected)))
    domain, row, epoch = np.concatenate([made.assign(0, cut), made.assign(cut, len(expected))], axis=1)
    assert domain.tolist() == [d for d, _ in expected]
    assert made.counts(cut).tolist() == np.bincount(domain[:cut], minlength=4).tolist()
    for d, size in enumerate(sizes.values()):
        here = np.flatnonzero(domain == d)
        rows, epochs = made.rows(d, np.array([j for _, j in (expected[g] for g in here)], np.int64))
        assert row[here].tolist() == rows.tolist()
        assert epoch[here].tolist() == epochs.tolist() == (np.arange(len(here)) // size).tolist()
    twin = MixtureSchedule(*given)
    twin.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert twin.exhausted_at == end
    assert all((a == b).all() for a, b in zip(twin.assign(0, cut), made.assign(0, cut), strict=True))


def test_stages_begin_and_end_with_whole_groups() -> None:
    made = MixtureSchedule({"a": 0.5, "b": 0.5}, {"a": 50, "b": 70}, block=12, homogeneous=4)
    domain = made.assign(0, 1200)[0].reshape(-1, 4)
    assert (domain == domain[:, :1]).all()
    assert (
        abs(domain.sum(axis=1).reshape(-1, 3).sum(axis=1) - 6).max() <= 4 + 2
    )  # a block: its share, rounded to groups
    for publish in (
        lambda: made.publish({"a": 0.1, "b": 0.9}, start=6),
        lambda: made.publish({"a": 0.1, "b": 0.9}, start=8, end=18),
        lambda: made.hold(6),
    ):
        with pytest.raises(ValueError, match="is within a group of the homogeneous=4 samples of one domain"):
            publish()
    state = made.state_dict()
    with pytest.raises(ValueError, match="homogeneous was 4 and is 1"):
        MixtureSchedule({"a": 0.5, "b": 0.5}, {"a": 50, "b": 70}, block=12).load_state_dict(state)
    for wrong, message in ((5, "homogeneous=5 must divide block=12"), (0, "homogeneous=0: at least 1")):
        with pytest.raises(ValueError, match=message):
            MixtureSchedule({"a": 0.5, "b": 0.5}, {"a": 50, "b": 70}, block=12, homogeneous=wrong)


def test_an_exhausted_domain_stays_out_of_later_stages() -> None:
    made = one_epoch()
    made.hold(120)
    made.publish({"a": 0.8, "b": 0.1, "c": 0.1}, start=120, end=160)
    assert made.counts(120)[0] == 40
    assert (made.assign(120, 160)[0] > 0).all()
    assert made.exhausted_at is None
    with pytest.raises(Undecided):
        made.assign(120, 161)
    made.publish({"a": 1.0, "b": 0.0, "c": 0.0}, start=160)
    assert made.exhausted_at == 160


def test_stages_may_be_published_before_what_was_derived() -> None:
    made, other = one_epoch(), one_epoch()
    made.assign(0, 200)  # derives how the first stage goes on
    for each in (made, other):
        each.publish({"a": 0.0, "b": 0.5, "c": 0.5}, start=20)
    assert all((a == b).all() for a, b in zip(made.assign(0, 150), other.assign(0, 150), strict=True))
    assert (made.assign(20, 150)[0] > 0).all()


def test_domains_that_join_have_the_limit_of_all() -> None:
    made = one_epoch()
    made.extend([JoinedDomain("d", 5, {})])
    made.publish({"a": 0.0, "b": 0.0, "c": 0.5, "d": 0.5}, start=10)
    domain, _, epoch = made.assign(10, made.exhausted_at or 0)
    assert (domain == 3).sum() == 5
    assert (epoch == 0).all()


def read_on(made: MixtureSchedule, ready: Any, out: Any) -> None:
    made.assign(0, 100)
    ready.set()
    while made.end == 100:
        pass
    out.put([part.tolist() for part in made.assign(90, 180)])


def test_a_process_started_before_finds_the_same() -> None:
    made = one_epoch()
    made.hold(100)
    processes: Any = multiprocessing.get_context("forkserver")
    ready, out = processes.Event(), processes.Queue()
    reader = processes.Process(target=read_on, args=(made, ready, out), daemon=True)
    reader.start()
    assert ready.wait(60)
    made.publish({"a": 0.1, "b": 0.45, "c": 0.45}, start=100)
    assert out.get(timeout=60) == [part.tolist() for part in made.assign(90, 180)]
    reader.join(60)
    twin = copy.deepcopy(made)
    assert twin.state_dict() == made.state_dict()
    assert twin.exhausted_at == made.exhausted_at


def test_limits_are_part_of_the_state_where_the_order_depends_on_them() -> None:
    free = MixtureSchedule({"a": 0.5, "b": 0.5}, {"a": 5, "b": 6}, max_epochs=2, when_exhausted="repeat")
    assert "limits" not in free.state_dict()
    made = MixtureSchedule({"a": 0.5, "b": 0.5}, {"a": 5, "b": 6}, max_epochs=2)
    with pytest.raises(ValueError, match="max_epochs was None and is 2; when_exhausted was repeat and is redistribute"):
        made.load_state_dict(free.state_dict())
    other = MixtureSchedule({"a": 0.5, "b": 0.5}, {"a": 5, "b": 6}, max_epochs={"a": 2}, when_exhausted="stop")
    with pytest.raises(ValueError, match=r"max_epochs was 2 and is \{'a': 2\}"):
        other.load_state_dict(made.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": -1}, "max_epochs=-1: a number, at least 0"),
        ({"max_epochs": "2"}, "max_epochs='2': a number"),
        ({"max_epochs": {"a": [1]}}, r"max_epochs\['a'\]=\[1\]: a number"),
        ({"max_epochs": {"a": float("nan")}}, r"max_epochs\['a'\]=nan"),
        ({"max_epochs": {"z": 1}}, "max_epochs: no domain 'z'"),
        ({"max_epochs": 1, "when_exhausted": "end"}, "when_exhausted='end': 'repeat', 'stop' or"),
        ({"when_exhausted": "stop"}, "needs max_epochs"),
    ],
)
def test_bad_limits_are_named(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureSchedule({"a": 1.0}, {"a": 3}, **options)


def test_limits_count_rows_as_the_number_is_written() -> None:
    sizes = {"a": 100, "b": 10}
    assert Limits(0.29).draws(sizes).tolist() == [29, 2]
    assert Limits({"b": 1.1}).draws(sizes).tolist() == [NEVER, 11]
    assert Limits({"a": None, "b": 1.1}) == Limits({"b": 1.1})  # type: ignore[dict-item]
    assert Limits(1e300).draws(sizes).tolist() == [NEVER, NEVER]
    assert Limits(float("inf")).draws(sizes).tolist() == [NEVER, NEVER]


@given(st.lists(st.integers(0, 2**20), min_size=1, max_size=9).filter(any))
def test_shares_are_handed_on_exactly(units: list[int]) -> None:
    assert np.diff(redistributed(np.array(units)), prepend=0).tolist() == shared_out(units)


@given(st.integers(-5, 10**6), st.integers(1, 10**6), st.integers(-10, 2 * 10**6))
def test_a_beginning_is_found_from_any_guess(low: int, more: int, guess: int) -> None:
    asked: list[int] = []

    def reached(position: int) -> bool:
        asked.append(position)
        return position >= low + more

    for width in (1, 64):
        first, last = bracket(reached, low, guess, width)
        assert first < low + more <= last <= first + width
    assert min(asked) > low


def test_far_limits_are_exact() -> None:
    made = MixtureSchedule({"a": 0.3, "b": 0.7}, {"a": 10**11, "b": 10**10}, max_epochs=1.5)
    made.assign(0, 10)
    _, at = bracket(lambda g: bool(made.counts(g)[1] >= 15 * 10**9), 0, 10**9, 1)
    assert made.counts(at)[1] == 15 * 10**9
    assert (made.assign(at, at + 1000)[0] == 0).all()
    assert made.assign(at - 1, at)[0].tolist() == [1]
    assert made.exhausted_at == 15 * 10**9 + 15 * 10**10


def test_domains_that_are_used_up_together_are_counted_a_few_times_each(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, before = list[int](), Quota.before

    def count(quota: Quota, number: int) -> Ints:
        counted.append(number)
        assert quota.units.all()  # those that are used up take no time
        return before(quota, number)

    monkeypatch.setattr(Quota, "before", count)
    many = [f"domain {number}" for number in range(2000)]
    schedule = MixtureSchedule(dict.fromkeys(many, 1 / 2000), dict.fromkeys(many, 3), max_epochs=1)
    schedule.counts(4200)
    used_up = (schedule.counts(4200) == 3).sum()
    assert used_up > 100
    assert len(counted) < 5 * used_up


def test_a_domain_that_joined_under_limits_is_in_the_state(tmp_path: Path) -> None:
    for name, rows in (("a", 50), ("x", 20)):
        TokenStore.write(tmp_path / name, [np.arange(16)] * rows)

    def make() -> MixtureDataset:
        return MixtureDataset({"a": tmp_path / "a"}, num_samples=150, sequence_length=8, max_epochs=2)

    dataset, resumed = make(), make()
    dataset.extend({"x": tmp_path / "x"})
    dataset.publish({"a": 0.5, "x": 0.5}, 32)
    dataset.publish({"a": 0.3, "x": 0.7}, 64)
    resumed.load_state_dict(json.loads(json.dumps(dataset.state_dict())))
    for copied in (resumed.schedule, copy.deepcopy(dataset.schedule)):
        np.testing.assert_array_equal(copied.assign(0, 140), dataset.schedule.assign(0, 140))


def test_limits_by_name_of_domains_that_are_gone_stay_those_of_the_state() -> None:
    rows = {
        name: [{"input_ids": [first + i] * 4} for i in range(n)] for name, n, first in (("a", 50, 0), ("b", 30, 90))
    }
    dataset = MixtureDataset(rows, num_samples=120, max_epochs={"a": 3, "b": 1})
    dataset.publish({"a": 1, "b": 0}, 40)
    resumed = MixtureDataset({"a": rows["a"]}, num_samples=120, max_epochs={"a": 3})
    resumed.load_state_dict(dataset.state_dict())
    np.testing.assert_array_equal(resumed.schedule.assign(40, 120), dataset.schedule.assign(40, 120))
    with pytest.raises(ValueError, match="max_epochs was"):
        MixtureDataset({"a": rows["a"]}, num_samples=120, max_epochs={"a": 2}).load_state_dict(dataset.state_dict())


def test_a_copy_keeps_limits_that_only_bound_mixers() -> None:
    schedule = MixtureSchedule({"a": 1.0}, {"a": 5}, max_epochs=2, when_exhausted="repeat")
    assert copy.deepcopy(schedule).limits == schedule.limits
